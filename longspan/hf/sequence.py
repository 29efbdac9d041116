"""The sequence: a transformers model whose texts are split among ranks, each of which reads its share."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from longspan.errors import InputError, ShapeError, message
from longspan.hf.attention import NAME, attention_modules, reset, set_pattern
from longspan.hf.batch import SHARED
from longspan.hf.captured import capturing
from longspan.hf.held import HeldCache, held_cache
from longspan.hf.shards import shared
from longspan.layout import Layout, zigzag
from longspan.pattern import Causal
from longspan.ring.agreement import agree, same
from longspan.ring.attention import group_of
from longspan.ring.transport import reaching

_IGNORED = -100
_ROUNDING = 1e-3
# Inputs that have one column for each token.
_COLUMNS = ("input_ids", "inputs_embeds", "token_type_ids")


class Split:
    """How the texts of a model are split among ranks, and what the model does with its share.

    Attributes:
        group: the ranks.
        rank, ranks: number of this one, and how many there are.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        group: dist.ProcessGroup,
        layout: Callable[[int, int], Layout],
        strategy: str | None,
    ) -> None:
        self.model, self.group, self.strategy = model, group, strategy
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.own = model.forward
        self._layout, self._signature = layout, inspect.signature(model.forward)
        self._checked = False

    def layout(self, length: int) -> Layout:
        """Return where the tokens of a text lie, or raise ShapeError where a rank would have none."""
        made = self._layout(length, self.ranks)
        if min(made.places(rank) for rank in range(self.ranks)) < 1:
            raise ShapeError(
                message(
                    "A text has to give every rank a token.",
                    {"text": f"{length} tokens", "layout": str(made)},
                    fix=f"texts of {2 * self.ranks} tokens or more, or fewer ranks",
                )
            )
        return made

    def forward(self, *positional: Any, **named: Any) -> Any:
        """Do what the model's own forward does, of which every rank is given the same whole batch."""
        if capturing(self.model.device):
            raise ShapeError(
                message(
                    "Texts that are split among ranks cannot be read while a CUDA graph is captured.",
                    {"model": type(self.model).__name__, "why": "ranks compare what each of them was given"},
                    fix="no graph, or a text on one rank",
                )
            )
        given = self._bound(positional, named)
        cache = held_cache(given.get("past_key_values"))
        if cache is not None:
            # A few new tokens are read by all ranks alike, but for the keys, of which each holds some.
            self._same(given)
            return self.own(**given)
        tokens = given.get("input_ids")
        tokens = given["inputs_embeds"] if tokens is None else tokens
        rows, length = tokens.shape[:2]
        mask, positions = given.pop("attention_mask", None), given.pop("position_ids", None)
        labels, keep = given.pop("labels", None), given.pop("logits_to_keep", 0)
        items = given.pop("num_items_in_batch", None)
        self._agree(given, mask, positions, labels, rows, length)
        layout = self.layout(length)
        at = torch.from_numpy(layout.positions(self.rank)).to(tokens.device)
        mask = None if mask is None else mask.bool()
        batch = shared(mask, positions, rows, layout, self.group, self.strategy)
        if positions is None:
            positions = torch.arange(length, device=tokens.device)[None]
        cut = {name: given[name][:, at] for name in _COLUMNS if given.get(name) is not None}
        writes = bool(given.pop("use_cache", False))
        given.pop("past_key_values", None)
        options = given | cut | {"position_ids": positions[:, at], "use_cache": writes}
        if writes:
            if mask is None and len(batch.segments) > 1:
                raise self._refused(
                    ["a row holds several documents, and only one of them can be gone on with"]
                )
            options["past_key_values"] = HeldCache(self.model, self.group)
        if labels is not None:
            # The token that is guessed at the end of a piece stands at the beginning of another.
            after = F.pad(labels, (0, 1), value=_IGNORED)[:, 1:]
            items = after.ne(_IGNORED).sum() if items is None else items
            options |= {
                "labels": labels[:, at],
                "shift_labels": after[:, at].contiguous(),
                "num_items_in_batch": items,
            }
        last = length - keep if isinstance(keep, int) else None
        if last is not None and keep and "logits_to_keep" in self._signature.parameters:
            options["logits_to_keep"] = (at >= last).nonzero().flatten()
        token = SHARED.set(batch)
        try:
            output = self.own(**options)
        finally:
            SHARED.reset(token)
        if labels is not None:
            self._check(output, options["shift_labels"], items)
            output.loss = _Total.apply(output.loss, self.group)
        if last is not None and keep:
            output.logits = self._joined(output.logits, at, last, keep)
        return output

    def _bound(self, positional: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """Return all arguments by name, or raise ShapeError for what cannot be split."""
        given = dict(self._signature.bind(*positional, **named).arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        given = {name: value for name, value in given.items() if value is not None}
        known = {*_COLUMNS, "attention_mask", "position_ids", "labels", "num_items_in_batch"}
        reasons = [
            f"{name} is a tensor {list(value.shape)}, which nobody knows how to split"
            for name, value in given.items()
            if isinstance(value, Tensor) and value.dim() > 0 and name not in known
        ]
        reasons += [
            f"{name} has shape {list(given[name].shape)}, not [rows, tokens]"
            for name in ("attention_mask", "position_ids", "labels")
            if name in given and given[name].dim() != 2
        ]
        cache = given.get("past_key_values")
        if cache is not None and cache.get_seq_length() and held_cache(cache) is None:
            reasons.append("keys of earlier tokens are given, which lie on one rank")
        if given.get("output_router_logits"):
            reasons.append("the loss of experts is asked for, which is no sum over tokens")
        if reasons:
            raise self._refused(reasons)
        return given

    def _refused(self, reasons: list[str]) -> ShapeError:
        return ShapeError(
            message(
                "This batch cannot be split among ranks.",
                {"model": type(self.model).__name__, "why": reasons},
                fix="input_ids, attention_mask, position_ids and labels of whole texts, use_cache=False",
            )
        )

    def _agree(
        self, given: dict[str, Any], mask: Any, positions: Any, labels: Any, rows: int, length: int
    ) -> None:
        """Find out whether all ranks read the same batch by the same patterns."""
        patterns = [str(module.longspan.pattern) for module in attention_modules(self.model)]
        named = {"attention_mask": mask, "position_ids": positions, "labels": labels} | given
        facts = {
            "model": type(self.model).__name__,
            "patterns": "; ".join(dict.fromkeys(patterns)),
            "layout": str(self._layout(length, self.ranks)),
            "strategy": str(self.strategy),
            "batch": f"{rows} x {length} tokens",
            "inputs": ", ".join(sorted(name for name, value in named.items() if isinstance(value, Tensor))),
            "dtype": str(self.model.dtype),
            "gradients": "wanted" if torch.is_grad_enabled() else "not wanted",
        }
        agree(self.group, facts, None)
        self._same(named)

    def _same(self, named: dict[str, Any]) -> None:
        whole = (value for name, value in sorted(named.items()) if isinstance(value, Tensor))
        sums = [
            zlib.crc32(value.contiguous().cpu().numpy()) for value in whole if not value.is_floating_point()
        ]
        device = next(self.model.parameters()).device
        same(
            self.group, torch.tensor(sums, device=device), "the batch, of which every rank is given the whole"
        )

    def _check(self, output: Any, targets: Tensor, items: Any) -> None:
        """Hold the first loss of the model to the sum that it is split as."""
        if self._checked or output.logits is None:
            return
        self._checked = True
        with torch.no_grad():
            rows = zip(output.logits, targets, strict=True)
            parts = [F.cross_entropy(row.float(), aims, reduction="sum") for row, aims in rows]
            wanted, got = float(sum(parts) / items), float(output.loss)
        if not abs(got - wanted) <= _ROUNDING * max(1.0, abs(wanted)):
            raise InputError(
                message(
                    "The loss of this model cannot be split among ranks.",
                    {
                        "model": type(self.model).__name__,
                        "its loss": f"{got:.6f} on the tokens of rank {self.rank}",
                        "wanted": f"{wanted:.6f}, the sum over tokens",
                    },
                    fix="a model whose loss is the cross-entropy of its logits",
                )
            )

    def _joined(self, logits: Tensor, at: Tensor, last: int, keep: int) -> Tensor:
        """Return the logits of the last columns on every rank."""
        mine = at[at >= last] - last
        if logits.shape[1] != len(mine):
            logits = logits[:, at >= last]
        whole = logits.new_zeros(logits.shape[0], keep, logits.shape[2])
        return _Total.apply(whole.index_copy(1, mine, logits), self.group)


class _Total(torch.autograd.Function):
    """The sum over ranks. What flows back is scaled so that the mean over ranks of their gradients is the gradient."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.ranks = dist.get_world_size(group)
        total = part.detach().clone()
        with reaching(dist.get_rank(group), "the other ranks", "adding up what each rank has"):
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.ranks, None


@contextmanager
def sequence_parallel(
    model: nn.Module,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    layout: Callable[[int, int], Layout] = zigzag,
    strategy: str | None = None,
) -> Iterator[Split]:
    """Let a transformers decoder read texts that are split among ranks, for as long as a block runs.

    The law: every rank calls the model with the same whole batch, and gets the loss that one process gets, and the
    logits of its own tokens, those at `split.layout(length).positions(split.rank)`; with `logits_to_keep`, the last
    logits, on every rank, so `generate` writes on, from a cache of which each rank keeps a part. The ids, positions and labels are cut by the layout after labels have been shifted, padding
    and packed documents are those of the whole row, and keys move as `longspan.ring` plans it. After `backward` the
    *mean* over ranks of the gradients is the gradient, which is what DistributedDataParallel and FSDP2 make of them.

    Args:
        model: a decoder, wrapped by peft, DDP or FSDP2 or not; without patterns it reads densely, as it did.
        group: the ranks that share each text: a process group or a one-dimensional DeviceMesh; None for all ranks.
        layout: `contiguous`, `zigzag` or `striped` of `longspan.layout`, or another function of length and ranks.
        strategy: as for `longspan.ring.attend`; None takes the cheapest.

    Yields:
        The split.

    Raises:
        InputError: a model that passes on what is between tokens by other means than attention, or whose loss is
            no sum over tokens.
        RankError: ranks that are given different batches or read by different patterns, a rank that does not answer.
        ShapeError: later, by the model's forward: input that cannot be split, a text with fewer tokens than ranks, a
            CUDA graph that is being captured.

    Example:
        A group of one rank; torchrun starts as many as there are.

        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2)
        >>> model = LlamaForCausalLM(config)
        >>> ids = torch.arange(40)[None]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        ...     with sequence_parallel(model):
        ...         loss = model(ids, labels=ids).loss
        ...     dist.destroy_process_group()
        >>> torch.allclose(loss, model(ids, labels=ids).loss)
        True
    """
    members = group_of(group)
    causal = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    require(model, causal)
    dense = not any(hasattr(module, NAME) for module in attention_modules(causal))
    if dense:
        set_pattern(causal, Causal())
    split = Split(causal, members, layout, strategy)
    replaced = "forward" in vars(causal)

    # A function, since accelerate binds methods anew.
    @wraps(split.own)
    def forward(*positional: Any, **named: Any) -> Any:
        return split.forward(*positional, **named)

    causal.forward = forward
    try:
        yield split
    finally:
        if replaced:
            causal.forward = split.own
        else:
            del causal.forward
        if dense:
            reset(causal)


def require(model: nn.Module, causal: PreTrainedModel | None) -> None:
    """Refuse a model in which anything but attention and the loss joins tokens, as far as can be seen."""
    reasons = []
    if causal is None:
        reasons.append("it is no model of transformers")
    else:
        config = causal.config.get_text_config()
        others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if others:
            reasons.append(f"some of its layers are of another kind: {', '.join(sorted(others))}")
        elif any(isinstance(module, nn.Conv1d) for module in causal.modules()):
            reasons.append("it has convolutions, which read neighbouring tokens")
        given = getattr(config, "rope_parameters", None) or {}
        kinds = {
            given.get("rope_type"),
            *(kind.get("rope_type") for kind in given.values() if isinstance(kind, dict)),
        }
        if kinds & {"dynamic", "longrope"}:
            reasons.append("its rotary positions follow the length, of which each rank sees a part")
        if causal.loss_function is not ForCausalLMLoss and causal.get_output_embeddings() is not None:
            reasons.append(f"its loss is {getattr(causal.loss_function, '__name__', 'another one')}")
    if reasons:
        raise InputError(
            message(
                "This model cannot read texts that are split among ranks.",
                {"model": type(causal or model).__name__, "why": reasons},
                fix="a decoder of transformers, such as Llama, Mistral, Qwen or Gemma",
            )
        )
