"""What models are asked in tests whose texts are split among ranks: run in their own processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from hf_models import FULL, GEMMA2, WINDOWED, model_of, padding, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import DynamicCache, Trainer, TrainingArguments

from longspan.errors import LongspanError
from longspan.extend.loss import chunked
from longspan.hf import PatternCache, held, sequence_parallel, set_pattern, share_batches
from longspan.layout import contiguous, striped, zigzag
from longspan.pattern import Causal, LongMixed, LongNet, Streaming

ROWS, LENGTH = 3, 41
PATTERN = Streaming(9, sinks=2)
EVERY = ("plain", "left", "right", "holes", "packed", "skipping")
# Configuration, pattern or none, kinds of batches, layout.
MODELS: dict[str, tuple[Any, ...]] = {
    # The one of them that works in float64 throughout; the others round their norms or losses to float32.
    "gpt2": (FULL["gpt2"], PATTERN, EVERY, zigzag),
    "llama, dense": (FULL["llama"], None, ("plain",), contiguous),
    "llama by layers": (
        FULL["llama"],
        [PATTERN, LongMixed(8), LongNet((8, 32), (1, 2))],
        ("packed",),
        contiguous,
    ),
    "mistral": (WINDOWED["mistral"], Causal(), ("holes",), striped),
    "gemma2": (GEMMA2, PATTERN, ("plain",), zigzag),
}


def batches() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield batches of all kinds, each with labels."""
    ids = tokens(ROWS, LENGTH)
    # A batch whose rows have different numbers of labels: the mean of means would not be the mean.
    labels = ids.clone()
    labels[0, 5:30], labels[2, :20] = -100, -100
    yield "plain", {"input_ids": ids, "labels": labels}
    for kind in ("left", "right", "holes"):
        mask = padding(kind, ROWS, LENGTH)
        # What padding guesses is nobody's business.
        unknown = (mask == 0) | (F.pad(mask, (1, 0), value=1)[:, :-1] == 0)
        yield kind, {"input_ids": ids, "labels": labels.masked_fill(unknown, -100), "attention_mask": mask}
    packed = torch.cat([torch.arange(tokens_in) for tokens_in in (7, 1, 20, 13)])
    yield "packed", {"input_ids": ids, "labels": labels, "position_ids": packed.expand(ROWS, -1)}
    skipping = torch.arange(LENGTH)[None] + 5 * (torch.arange(LENGTH)[None] > 17)
    yield (
        "skipping",
        {
            "input_ids": ids,
            "labels": labels,
            "position_ids": skipping,
            "attention_mask": torch.ones_like(ids),
        },
    )


def equal(rank: int) -> list[str]:
    """Hold loss, logits and gradients of every model on every batch to one process; return what is wrong."""
    wrong = []
    for name, (config, pattern, kinds, layout) in MODELS.items():
        model = model_of(config, **({"n_layer": 2} if name == "gpt2" else {}))
        if pattern is not None:
            set_pattern(model, pattern)
        for kind, batch in batches():
            if kind not in kinds:
                continue
            for loss in ("chunked", "whole") if name == "llama, dense" else ("chunked",):
                with chunked(model) if loss == "chunked" else nullcontext():
                    found = faults(rank, model, batch, layout)
                    wrong += [f"{name}, {kind} batch, {loss} loss: {fault}" for fault in found]
    return wrong


def faults(rank: int, model: Any, batch: dict[str, torch.Tensor], layout: Any) -> Iterator[str]:
    ids = {name: side for name, side in batch.items() if name != "labels"}
    truth = model(**batch, use_cache=False).loss
    wanted = torch.autograd.grad(truth, list(model.parameters()))
    with torch.no_grad():
        logits = model(**ids, use_cache=False).logits
    with sequence_parallel(model, layout=layout) as split:
        output = model(**batch)
        grads = torch.autograd.grad(output.loss, list(model.parameters()))
        at = torch.from_numpy(split.layout(LENGTH).positions(rank))
        with torch.no_grad():
            own, last = model(**ids).logits, model(**ids, logits_to_keep=5).logits
    real = batch.get("attention_mask", torch.ones(ROWS, LENGTH))[:, :, None]
    pairs = [
        ("loss", output.loss, truth),
        ("logits", own * real[:, at], (logits * real)[:, at]),
        ("last logits", last * real[:, -5:], (logits * real)[:, -5:]),
    ]
    for grad, whole, (name, _) in zip(grads, wanted, model.named_parameters(), strict=True):
        dist.all_reduce(grad)
        pairs.append((f"gradient of {name}", grad / dist.get_world_size(), whole))
    tolerance = 1e-12 if model.config.model_type == "gpt2" else 1e-6
    for name, got, right in pairs:
        off = (got - right).abs().max().item() if got.shape == right.shape else float("nan")
        if not off <= tolerance * max(1.0, right.abs().max().item()):
            yield f"{name} is off by {off:.1e}"


def trained(rank: int) -> list[str]:
    """Train under DDP over two texts at a time, each split among two ranks, and hold the weights to one process."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    text = mesh.get_local_rank("data")
    ids = tokens(2, LENGTH)
    labels = ids.clone()
    labels[0, 3:20] = -100
    items = labels[:, 1:].ne(-100).sum()
    wrong = []
    for wrap in ("ddp", "fsdp2"):
        model, alone = model_of(FULL["llama"]), model_of(FULL["llama"])
        weights = dict(alone.named_parameters())
        with chunked(alone):
            alone(input_ids=ids, labels=labels).loss.backward()
        torch.optim.SGD(alone.parameters(), lr=0.1).step()
        causal = model
        if wrap == "ddp":
            model = DistributedDataParallel(model)
        else:
            for layer in model.model.layers:
                fully_shard(layer, mesh=init_device_mesh("cpu", (4,)))
            fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        one = slice(text, text + 1)
        with (
            chunked(causal) if wrap == "ddp" else nullcontext(),
            sequence_parallel(model, group=mesh["sequence"]),
        ):
            loss = model(input_ids=ids[one], labels=labels[one], num_items_in_batch=items).loss
            # Ranks average what texts add up to.
            (2 * loss).backward()
        optimizer.step()
        for name, weight in causal.named_parameters():
            whole = weight.full_tensor() if wrap == "fsdp2" else weight
            off = (whole - weights[name]).abs().max().item()
            if not off <= (1e-12 if wrap == "ddp" else 1e-6):
                wrong.append(f"{wrap}: {name} is off by {off:.1e}")
    return wrong


class _Shared(Trainer):
    """The Trainer as it is, but that both ranks are given the same batches."""

    def get_train_dataloader(self) -> Any:
        return share_batches(super().get_train_dataloader(), 2)


def looped(rank: int, folder: Path) -> list[str]:
    """Take two steps with the Trainer and two with accelerate, each text on both ranks; hold both to one process."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, LENGTH)]
    alone = model_of(FULL["llama"])
    losses = []
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for one in (rows[:2], rows[2:]):
        ids = torch.stack([row["input_ids"] for row in one])
        loss = alone(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    found = {}

    model = model_of(FULL["llama"])
    arguments = TrainingArguments(
        str(folder / f"trained{rank}"),
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        train_sampling_strategy="sequential",
        optim="sgd",
    )
    with sequence_parallel(model):
        trainer = _Shared(model=model, args=arguments, train_dataset=rows)
        trainer.train()
    found["Trainer"] = model, [line["loss"] for line in trainer.state.log_history if "loss" in line]

    model = model_of(FULL["llama"])
    accelerator = Accelerator(cpu=True)
    wrapped, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(rows, batch_size=2)
    )
    seen = []
    with sequence_parallel(wrapped):
        for batch in share_batches(loader, 2):
            loss = wrapped(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
    found["accelerate"] = model, seen

    wrong = []
    for name, (got, seen) in found.items():
        if not torch.allclose(torch.tensor(seen), torch.tensor(losses), rtol=0, atol=1e-5):
            wrong.append(f"{name}: losses {seen}, not {losses}")
        for (label, weight), whole in zip(got.named_parameters(), alone.parameters(), strict=True):
            off = (weight - whole).abs().max().item()
            if not off <= 1e-6:
                wrong.append(f"{name}: {label} is off by {off:.1e}")
    return wrong


def refusals(rank: int) -> list[str]:
    """Do what cannot be done, and return what was said."""
    model, said = model_of(FULL["llama"]), []
    ids = tokens(2, LENGTH)

    def refused(**batch: Any) -> None:
        try:
            with sequence_parallel(model):
                model(**batch)
            said.append("nothing")
        except LongspanError as error:
            said.append(str(error))

    # Each rank its own batch, as loaders deal them out.
    refused(input_ids=ids + rank)
    refused(input_ids=ids[:, : 20 + rank])
    refused(input_ids=ids[:, :2])
    refused(input_ids=ids, attention_mask=torch.ones(2, 1, LENGTH, LENGTH))
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache)
    refused(input_ids=ids, past_key_values=cache)
    set_pattern(model, Streaming(8 + rank))
    refused(input_ids=ids)
    # After all that, ranks that agree go on.
    set_pattern(model, PATTERN)
    with sequence_parallel(model):
        model(input_ids=ids)
    return said


def written(rank: int) -> list[str]:
    """Write on after padded rows with a cache that is split among ranks, and hold the tokens to one process."""
    wrong = []
    held.BLOCK = 8
    ids, mask = tokens(ROWS, 23), padding("left", ROWS, 23)
    for name, pattern, given in (
        ("window and sinks", PATTERN, {}),
        ("beams", [LongMixed(8), LongNet((8, 32), (1, 2))], {"num_beams": 2}),
    ):
        model = model_of(FULL["llama"], num_hidden_layers=2)
        set_pattern(model, pattern)
        options = given | {"max_new_tokens": 24, "do_sample": False, "attention_mask": mask}
        alone = model.generate(ids, past_key_values=PatternCache(model), **options)
        with sequence_parallel(model):
            found = model.generate(ids, return_dict_in_generate=True, **options)
        if not torch.equal(found.sequences, alone):
            wrong.append(f"{name}: {found.sequences.tolist()}, not {alone.tolist()}")
        kept = torch.tensor([layer.positions.shape[1] for layer in found.past_key_values.layers])
        dist.all_reduce(kept)
        # A window of 9 and 2 sinks, of rows that begin apart, and what has come since keys were let go.
        if name == "window and sinks" and kept.max() > 9 + 2 * ROWS + held.BLOCK:
            wrong.append(f"{name}: {kept.tolist()} keys are held")
    return wrong
