"""Libraries: how each flash attention is called, and what it answers, in one convention.

Forward gives the output, laid out as the query, and the log-sum-exp `[rectangles, heads, rows]`, in float32 or wider.
Backward is given the output and the log-sum-exp of a whole softmax, of which the call may be a part, and gives the
gradients of query, key and value, laid out as these. All libraries count a window from the diagonal that ends in the
last row and column, and take as many key heads as there are.

Nothing is imported before it is asked for. What a library is called with is held against its signature first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from longspan.kernel.flash.band import Band

_OTHERWISE = "is installed, but takes other arguments than those known here"


@dataclass(frozen=True, eq=False)
class Asked:
    """What one call is asked.

    Attributes:
        query, key, value: `[rectangles, places, heads, width]`, in which the numbers of a head lie in one piece.
        band: which columns each row reads.
        scale: what scores are multiplied by.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    band: Band
    scale: float

    @property
    def sides(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, with a copy of what does not start, or whose rows do not, where a kernel can load."""
        return aligned(self.query), aligned(self.key), aligned(self.value)

    @property
    def window(self) -> dict[str, int]:
        left, right = self.band.window
        return {"window_size_left": left, "window_size_right": right}


class Library(Protocol):
    """A flash attention."""

    @staticmethod
    def missing() -> str | None:
        """Say why it cannot be called here, or None where it can."""

    @staticmethod
    def forward(asked: Asked) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp."""

    @staticmethod
    def backward(asked: Asked, grad: Tensor, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value."""


class Torch:
    """FlashAttention in PyTorch. What its operators take has grown since PyTorch 2.11; only what they took then is
    handed to them."""

    @staticmethod
    def missing() -> str | None:
        there = torch.backends.cuda.is_flash_attention_available()
        return None if there else "this PyTorch was built without it"

    @staticmethod
    def forward(asked: Asked) -> tuple[Tensor, Tensor]:
        places = asked.query.shape[1], asked.key.shape[1]
        output, lse, *_ = torch.ops.aten._flash_attention_forward(
            *asked.sides,
            None,
            None,
            *places,
            0.0,
            asked.band.causal,
            False,
            scale=asked.scale,
            **asked.window,
        )
        return output, lse

    @staticmethod
    def backward(asked: Asked, grad: Tensor, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        places = asked.query.shape[1], asked.key.shape[1]
        # Nothing is dropped at random, so nothing looks at the state of a generator.
        unused = torch.empty(2, dtype=torch.uint64, device=grad.device)
        return torch.ops.aten._flash_attention_backward(
            grad.contiguous(),
            *asked.sides,
            output.contiguous(),
            lse.contiguous(),
            *(None, None, *places, 0.0, asked.band.causal, unused, unused),
            scale=asked.scale,
            **asked.window,
        )


class CuDNN:
    """cuDNN, by way of PyTorch: `[rectangles, heads, places, width]`, and a log-sum-exp with a last axis of one.

    PyTorch keeps a graph for the shapes and strides of query, key and value, and reads and writes all else by strides
    that follow from those of the query, which it does not look at in every version.
    """

    @staticmethod
    def missing() -> str | None:
        # What stands in its place on ROCm counts its versions otherwise.
        there = torch.backends.cudnn.is_available() and torch.version.hip is None
        version = torch.backends.cudnn.version() if there else None
        if version is None or version < 90_000:
            return f"needs cuDNN 9, got {'none' if version is None else version}"
        if not torch.backends.cuda.cudnn_sdp_enabled():
            return "is switched off in torch.backends.cuda"
        return "has no gradients that come out the same each time" if repeatable() else None

    @staticmethod
    def forward(asked: Asked) -> tuple[Tensor, Tensor]:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *map(_packed, (asked.query, asked.key, asked.value)),
            *(None, True, 0.0, asked.band.causal, False),
            scale=asked.scale,
        )
        return output.transpose(1, 2), lse.squeeze(-1)

    @staticmethod
    def backward(asked: Asked, grad: Tensor, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = map(_packed, (asked.query, asked.key, asked.value))
        unused = torch.empty((), dtype=torch.int64, device=grad.device)
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            _laid_as(query, grad),
            *(query, key, value),
            _laid_as(query, output),
            lse.contiguous().unsqueeze(-1),
            *(unused, unused, None, None, None, query.shape[2], key.shape[2], 0.0, asked.band.causal),
            scale=asked.scale,
        )
        return grads[0].transpose(1, 2), grads[1].transpose(1, 2), grads[2].transpose(1, 2)


class Three:
    """FlashAttention 3, made for Hopper: operators of PyTorch that `flash_attn_interface` brings."""

    @staticmethod
    @lru_cache(maxsize=1)
    def missing() -> str | None:
        if why := _unloadable("flash_attn_interface", "flash_attn_interface"):
            return why
        taken = "softmax_scale", "is_causal", "window_size_left", "window_size_right"
        # What is left out of a call has a default value since the operators can be compiled.
        fits = _takes("flash_attn_3::fwd", (*taken, "out"), defaults=True) and _takes(
            "flash_attn_3::bwd", ("dq", "dk", "dv", *taken, "deterministic"), defaults=True
        )
        return None if fits else _OTHERWISE

    @staticmethod
    def forward(asked: Asked) -> tuple[Tensor, Tensor]:
        output, lse, *_ = torch.ops.flash_attn_3.fwd(
            *asked.sides, softmax_scale=asked.scale, is_causal=asked.band.causal, **asked.window
        )
        return output, lse

    @staticmethod
    def backward(asked: Asked, grad: Tensor, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sides = asked.sides
        dq, dk, dv = made = _gradients(sides)
        torch.ops.flash_attn_3.bwd(
            aligned(grad),
            *sides,
            aligned(output),
            lse.contiguous(),
            dq=dq,
            dk=dk,
            dv=dv,
            softmax_scale=asked.scale,
            is_causal=asked.band.causal,
            deterministic=repeatable(),
            **asked.window,
        )
        return made


class Four:
    """FlashAttention 4: functions in Python, compiled when first called, with None for no limit of a window."""

    @staticmethod
    @lru_cache(maxsize=1)
    def missing() -> str | None:
        if why := _unloadable("flash_attn.cute.interface", "flash_attn"):
            return why
        taken = {"softmax_scale", "causal", "window_size_left", "window_size_right"}
        # Gradients of windows on Hopper came before the gradient of the log-sum-exp.
        known = {
            "_flash_attn_fwd": taken | {"return_lse"},
            "_flash_attn_bwd": taken | {"deterministic", "dlse"},
        }
        for name, arguments in known.items():
            function = getattr(import_module("flash_attn.cute.interface"), name, None)
            if function is None or not arguments <= set(inspect.signature(function).parameters):
                return _OTHERWISE
        return None

    @staticmethod
    def forward(asked: Asked) -> tuple[Tensor, Tensor]:
        module = import_module("flash_attn.cute.interface")
        output, lse, *_ = module._flash_attn_fwd(*asked.sides, return_lse=True, **Four._facts(asked))
        return output, lse

    @staticmethod
    def backward(asked: Asked, grad: Tensor, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        module = import_module("flash_attn.cute.interface")
        into_query, into_key, into_value, *_ = module._flash_attn_bwd(
            *(*asked.sides, aligned(output), aligned(grad), lse.contiguous()),
            deterministic=repeatable(),
            **Four._facts(asked),
        )
        return into_query, into_key, into_value

    @staticmethod
    def _facts(asked: Asked) -> dict[str, Any]:
        window = {name: None if side < 0 else side for name, side in asked.window.items()}
        return {"softmax_scale": asked.scale, "causal": asked.band.causal, **window}


class Two:
    """FlashAttention 2 as a package: operators of PyTorch that `flash_attn` brings."""

    @staticmethod
    @lru_cache(maxsize=1)
    def missing() -> str | None:
        if why := _unloadable("flash_attn.flash_attn_interface", "flash_attn_2_cuda"):
            return why
        taken = "dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right", "softcap"
        fits = _takes(
            "flash_attn::_flash_attn_forward", (*taken, "alibi_slopes", "return_softmax")
        ) and _takes(
            "flash_attn::_flash_attn_backward", ("dq", "dk", "dv", *taken, "alibi_slopes", "deterministic")
        )
        return None if fits else _OTHERWISE

    @staticmethod
    def forward(asked: Asked) -> tuple[Tensor, Tensor]:
        output, lse, *_ = torch.ops.flash_attn._flash_attn_forward(
            *asked.sides, return_softmax=False, **Two._facts(asked)
        )
        return output, lse

    @staticmethod
    def backward(asked: Asked, grad: Tensor, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sides = asked.sides
        made = _gradients(sides)
        torch.ops.flash_attn._flash_attn_backward(
            *(aligned(grad), *sides, aligned(output), lse.contiguous(), *made),
            deterministic=repeatable(),
            **Two._facts(asked),
        )
        return made

    @staticmethod
    def _facts(asked: Asked) -> dict[str, Any]:
        scores = {"softmax_scale": asked.scale, "softcap": 0.0, "alibi_slopes": None}
        return {"dropout_p": 0.0, "causal": asked.band.causal, **scores, **asked.window}


def repeatable() -> bool:
    """Say whether gradients are to come out the same each time, or else not at all."""
    asked = torch.are_deterministic_algorithms_enabled()
    return asked and not torch.is_deterministic_algorithms_warn_only_enabled()


def aligned(side: Tensor) -> Tensor:
    """Return a view that starts, and whose rows start, where the kernel can load 16 bytes; else a copy."""
    size = side.element_size()
    steps = (
        stride * size
        for length, stride in zip(side.shape[:-1], side.stride()[:-1], strict=True)
        if length > 1
    )
    return side if not side.data_ptr() % 16 and not any(step % 16 for step in steps) else side.contiguous()


def _packed(side: Tensor) -> Tensor:
    """Return a side with heads before places, without gaps: a copy where there are any, or rectangles overlap."""
    turned = side.transpose(1, 2)
    packed = side.is_contiguous() or turned.is_contiguous()
    return turned if packed and not side.data_ptr() % 16 else side.contiguous().transpose(1, 2)


def _laid_as(query: Tensor, side: Tensor) -> Tensor:
    """Return a side with the strides that an output has which is made for a query."""
    turned, made = side.transpose(1, 2), torch.empty_like(query)
    return turned if turned.stride() == made.stride() else made.copy_(turned)


def _gradients(sides: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    into_query, into_key, into_value = (
        torch.empty_like(side, memory_format=torch.contiguous_format) for side in sides
    )
    return into_query, into_key, into_value


def _unloadable(module: str, package: str) -> str | None:
    """Say why a module of a package cannot be imported, or None where it is; what is not there is not tried."""
    if find_spec(package) is None:
        return f"{package} is not installed"
    try:
        import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported: {error}"
    return None


def _takes(operator: str, names: Iterable[str], *, defaults: bool = False) -> bool:
    """Say whether an operator takes arguments of these names, all of which can be left out if that is asked."""
    space, name = operator.split("::")
    found: Callable[..., Any] | None = getattr(getattr(torch.ops, space), name, None)
    if found is None:
        return False
    arguments = found.default._schema.arguments  # type: ignore[attr-defined]
    return set(names) <= {each.name for each in arguments if each.has_default_value() or not defaults}
