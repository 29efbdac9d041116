"""Stand-ins for the flash attentions of CUDA: the same operators and functions, on cpu, by the definition.

Each has the signature and the conventions of its library, and refuses what that refuses, or would read past: other
widths, other dtypes on the two sides, rows that do not lie in one piece, windows below -1, a log-sum-exp of another
shape or dtype. What is not read is multiplied by 0, as in a kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Calls = list[dict[str, Any]]

THREE_FORWARD = """fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None, Tensor(v_new!)? v_new = None,
    Tensor? q_v = None, Tensor(out!)? out = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None,
    Tensor? cu_seqlens_k_new = None, Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None,
    int? max_seqlen_k = None, Tensor? page_table = None, Tensor? kv_batch_idx = None, Tensor? leftpad_k = None,
    Tensor? rotary_cos = None, Tensor? rotary_sin = None, Tensor? seqlens_rotary = None, Tensor? q_descale = None,
    Tensor? k_descale = None, Tensor? v_descale = None, float? softmax_scale = None, bool is_causal = False,
    int window_size_left = -1, int window_size_right = -1, int attention_chunk = 0, float softcap = 0.0,
    bool is_rotary_interleaved = False, Tensor? scheduler_metadata = None, int num_splits = 0,
    bool? pack_gqa = None, int sm_margin = 0) -> (Tensor(out!), Tensor, Tensor, Tensor)"""
THREE_BACKWARD = """bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,
    Tensor(dq!)? dq = None, Tensor(dk!)? dk = None, Tensor(dv!)? dv = None, Tensor? cu_seqlens_q = None,
    Tensor? cu_seqlens_k = None, Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None,
    int? max_seqlen_k = None, float? softmax_scale = None, bool is_causal = False, int window_size_left = -1,
    int window_size_right = -1, float softcap = 0.0, bool deterministic = False, int sm_margin = 0) ->
    (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"""
TWO_FORWARD = """_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal,
    SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax) ->
    (Tensor, Tensor, Tensor, Tensor)"""
TWO_BACKWARD = """_flash_attn_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,
    Tensor(dq!)? dq, Tensor(dk!)? dk, Tensor(dv!)? dv, float dropout_p, float softmax_scale, bool causal,
    SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool deterministic,
    Tensor? rng_state = None) -> Tensor"""


@contextmanager
def flash_on_cpu() -> Iterator[Calls]:
    """Put the stand-in behind PyTorch's operators, and record what they are called with."""
    calls: Calls = []

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *facts: Any,
        scale: float,
        window_size_left: int,
        window_size_right: int,
    ) -> tuple[Tensor, ...]:
        assert facts == (None, None, query.shape[1], key.shape[1], 0.0, facts[5], False)
        window = (window_size_left, window_size_right)
        output, lse = _forward(calls, query, key, value, window, facts[5], scale)
        unused = torch.zeros(2, dtype=torch.uint64)
        return output, lse, unused, unused, query.new_zeros(0)

    def backward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        *facts: Any,
        scale: float,
        window_size_left: int,
        window_size_right: int,
    ) -> tuple[Tensor, ...]:
        assert facts[:6] == (None, None, query.shape[1], key.shape[1], 0.0, facts[5])
        assert grad.is_contiguous() and output.is_contiguous()
        window = (window_size_left, window_size_right)
        return _backward(calls, grad, query, key, value, output, lse, window, facts[5], scale)

    with _operators("aten", {"_flash_attention_forward": forward, "_flash_attention_backward": backward}):
        yield calls


@contextmanager
def cudnn_on_cpu() -> Iterator[Calls]:
    """Put a stand-in for cuDNN behind PyTorch's operators: heads before places, the upper left triangle, no windows.

    It holds the strides of all sides against what PyTorch's graph has them at.
    """
    calls: Calls = []
    version, available = torch.backends.cudnn.version, torch.backends.cudnn.is_available

    def forward(*given: Any, **named: Any) -> tuple[Any, ...]:
        facts = _facts("aten", "_scaled_dot_product_cudnn_attention", given, named)
        query, key, value = (facts[name] for name in ("query", "key", "value"))
        assert facts["attn_bias"] is None and facts["compute_log_sumexp"] is True
        assert facts["dropout_p"] == 0.0 and not facts["return_debug_mask"]
        sides = _turned(query, key, value, facts["is_causal"])
        output, lse = _forward(calls, *sides, (-1, -1), facts["is_causal"], facts["scale"])
        laid = torch.empty_like(query).copy_(output.transpose(1, 2))
        none = torch.empty(0)
        return laid, lse.unsqueeze(-1), none, none, query.shape[2], key.shape[2], none, none, none

    def backward(*given: Any, **named: Any) -> tuple[Tensor, ...]:
        facts = _facts("aten", "_scaled_dot_product_cudnn_attention_backward", given, named)
        grad, query, key, value, output, lse = given[:6]
        assert facts["attn_bias"] is facts["cum_seq_q"] is facts["cum_seq_k"] is None
        assert (facts["max_q"], facts["max_k"], facts["dropout_p"]) == (query.shape[2], key.shape[2], 0.0)
        assert grad.stride() == output.stride() == torch.empty_like(query).stride()
        assert lse.shape == (*query.shape[:3], 1)
        sides = _turned(query, key, value, facts["is_causal"])
        turned = (grad.transpose(1, 2), *sides, output.transpose(1, 2), lse.squeeze(-1))
        grads = _backward(calls, *turned, (-1, -1), facts["is_causal"], facts["scale"])
        made = zip((query, key, value), grads, strict=True)
        return tuple(torch.empty_like(side).copy_(part.transpose(1, 2)) for side, part in made)

    torch.backends.cudnn.version, torch.backends.cudnn.is_available = lambda: 91_900, lambda: True
    operators = {
        "_scaled_dot_product_cudnn_attention": forward,
        "_scaled_dot_product_cudnn_attention_backward": backward,
    }
    try:
        with _operators("aten", operators):
            yield calls
    finally:
        torch.backends.cudnn.version, torch.backends.cudnn.is_available = version, available


@contextmanager
def three_on_cpu() -> Iterator[Calls]:
    """Install a stand-in for FlashAttention 3."""
    calls: Calls = []

    def forward(*given: Any, **named: Any) -> tuple[Tensor, ...]:
        facts = _facts("flash_attn_3", "fwd", given, named)
        window = (facts["window_size_left"], facts["window_size_right"])
        scale, none = facts["softmax_scale"], torch.empty(0)
        output, lse = _forward(calls, *given[:3], window, facts["is_causal"], scale)
        return output, lse, none, none

    def backward(*given: Any, **named: Any) -> tuple[Tensor, ...]:
        facts = _facts("flash_attn_3", "bwd", given, named)
        made = _written(calls, facts, facts["is_causal"])
        return *made, *(torch.empty(0) for _ in range(5))

    with (
        _modules({"flash_attn_interface": {}}),
        _operators(
            "flash_attn_3",
            {"fwd": forward, "bwd": backward},
            (THREE_FORWARD, THREE_BACKWARD),
        ),
    ):
        yield calls


@contextmanager
def four_on_cpu() -> Iterator[Calls]:
    """Install a stand-in for FlashAttention 4."""
    calls: Calls = []

    def _flash_attn_fwd(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        assert return_lse and cu_seqlens_q is None
        window = _counted(window_size_left, window_size_right)
        return _forward(calls, q, k, v, window, causal, softmax_scale)

    def _flash_attn_bwd(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        deterministic: bool = False,
        dlse: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        assert dlse is None and not deterministic
        window = _counted(window_size_left, window_size_right)
        return _backward(calls, dout, q, k, v, out, lse, window, causal, softmax_scale)

    functions = {"_flash_attn_fwd": _flash_attn_fwd, "_flash_attn_bwd": _flash_attn_bwd}
    with _modules({"flash_attn": {}, "flash_attn.cute": {}, "flash_attn.cute.interface": functions}):
        yield calls


@contextmanager
def two_on_cpu() -> Iterator[Calls]:
    """Install a stand-in for FlashAttention 2."""
    calls: Calls = []

    def forward(*given: Any, **named: Any) -> tuple[Tensor, ...]:
        facts = _facts("flash_attn", "_flash_attn_forward", given, named)
        assert facts["alibi_slopes"] is None and not facts["return_softmax"]
        assert facts["dropout_p"] == facts["softcap"] == 0.0
        window = (facts["window_size_left"], facts["window_size_right"])
        output, lse = _forward(calls, *given[:3], window, facts["causal"], facts["softmax_scale"])
        return output, lse, torch.empty(0), torch.empty(0)

    def backward(*given: Any, **named: Any) -> Tensor:
        facts = _facts("flash_attn", "_flash_attn_backward", given, named)
        assert facts["alibi_slopes"] is None and facts["dropout_p"] == 0.0
        _written(calls, facts, facts["causal"])
        return torch.empty(0)

    modules = {"flash_attn": {}, "flash_attn_2_cuda": {}, "flash_attn.flash_attn_interface": {}}
    operators = {"_flash_attn_forward": forward, "_flash_attn_backward": backward}
    with _modules(modules), _operators("flash_attn", operators, (TWO_FORWARD, TWO_BACKWARD)):
        yield calls


@contextmanager
def _operators(
    space: str, made: dict[str, Callable[..., Any]], schemas: tuple[str, ...] = ()
) -> Iterator[None]:
    """Put functions behind operators, which are defined before where they have schemas."""
    library = torch.library.Library(space, "FRAGMENT" if schemas else "IMPL")
    for schema in schemas:
        library.define(" ".join(schema.split()))
    for name, function in made.items():
        library.impl(name, function, "CPU")
    try:
        yield
    finally:
        library._destroy()


@contextmanager
def _modules(made: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Install modules for a while."""
    for name, attributes in made.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__dict__.update(attributes)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def _facts(space: str, operator: str, given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of an operator by name; those with their default values do not reach it."""
    arguments = getattr(getattr(torch.ops, space), operator).default._schema.arguments
    facts = {each.name: each.default_value for each in arguments if each.has_default_value()}
    return facts | dict(zip((each.name for each in arguments), given, strict=False)) | named


def _counted(left: int | None, right: int | None) -> tuple[int, int]:
    """Return a window as the others have it, with -1 for no limit; a side below 0 is another window in this library."""
    assert left is None or left >= 0
    assert right is None or right >= 0
    return (-1 if left is None else left), (-1 if right is None else right)


def _turned(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, ...]:
    """Return sides with places before heads, after a look at what cuDNN is particular about."""
    assert not causal or query.shape[2] == key.shape[2]
    for side in (query, key, value):
        # No gaps, no overlaps: what is made like it has its strides.
        assert side.stride() == torch.empty_like(side).stride() and side.shape[2] > 1
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _written(calls: Calls, facts: dict[str, Any], causal: bool) -> tuple[Tensor, ...]:
    """Write gradients where a library is told to."""
    assert not facts["deterministic"] and facts["softcap"] == 0.0
    window = (facts["window_size_left"], facts["window_size_right"])
    sides = [facts[name] for name in ("dout", "q", "k", "v", "out", "softmax_lse")]
    made = tuple(facts[name] for name in ("dq", "dk", "dv"))
    for room, side, grad in zip(
        made, sides[1:4], _backward(calls, *sides, window, causal, facts["softmax_scale"]), strict=True
    ):
        assert room.is_contiguous() and room.shape == side.shape and room.dtype == side.dtype
        room.copy_(grad)
    return made


def _forward(
    calls: Calls,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: tuple[int, int],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    calls.append(_call("forward", query, key, value, window, causal))
    scores, read = _scores(query, key, window, causal, scale)
    # Of a row without a key the operators say something else than longspan does.
    assert False not in read.any(-1).tolist()
    scores = scores.masked_fill(~read, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse[..., None])
    values = _wide(value).transpose(1, 2).repeat_interleave(query.shape[2] // value.shape[2], 1)
    output = (weights @ values).transpose(1, 2)
    # The operators' results lie so.
    return output.to(query.dtype).contiguous(), lse.contiguous()


def _backward(
    calls: Calls,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    window: tuple[int, int],
    causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    assert lse.is_contiguous() and lse.shape == (query.shape[0], query.shape[2], query.shape[1])
    assert lse.dtype == _wide(query).dtype and grad.shape == output.shape == query.shape
    assert grad.dtype == output.dtype == query.dtype and grad.stride(-1) == output.stride(-1) == 1
    calls.append(_call("backward", query, key, value, window, causal))
    scores, read = _scores(query, key, window, causal, scale)
    weights = torch.exp(scores - lse[..., None]).masked_fill(~read, 0.0)
    grad, output, rows = (_wide(side).transpose(1, 2) for side in (grad, output, query))
    share = query.shape[2] // key.shape[2]
    keys, values = (_wide(side).transpose(1, 2).repeat_interleave(share, 1) for side in (key, value))
    steep = weights * (grad @ values.mT - (grad * output).sum(-1, keepdim=True)) * scale
    into_query = (steep @ keys).transpose(1, 2)
    shared = (steep.mT @ rows, weights.mT @ grad)
    into_key, into_value = (side.unflatten(1, (-1, share)).sum(2).transpose(1, 2) for side in shared)
    return tuple(side.to(query.dtype).contiguous() for side in (into_query, into_key, into_value))


def _call(
    name: str, query: Tensor, key: Tensor, value: Tensor, window: tuple[int, int], causal: bool
) -> dict[str, Any]:
    assert query.dtype == key.dtype == value.dtype
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    assert key.shape == value.shape and key.shape[0] == query.shape[0] and query.shape[2] % key.shape[2] == 0
    assert all(side.stride(-1) == 1 and side.data_ptr() % 16 == 0 for side in (query, key, value))
    assert min(window) >= -1
    return {"name": name, "query": query, "key": key, "value": value, "window": window, "causal": causal}


def _scores(
    query: Tensor, key: Tensor, window: tuple[int, int], causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    rows, columns = query.shape[1], key.shape[1]
    left, right = window
    assert not causal or (left == -1 and right in (-1, 0))
    away = torch.arange(columns) - torch.arange(rows)[:, None] - (columns - rows)
    read = torch.ones_like(away, dtype=torch.bool)
    if left >= 0:
        read &= away >= -left
    if right >= 0 or causal:
        read &= away <= max(right, 0)
    keys = _wide(key).transpose(1, 2).repeat_interleave(query.shape[2] // key.shape[2], 1)
    return _wide(query).transpose(1, 2) @ keys.mT * scale, read


def _wide(side: Tensor) -> Tensor:
    """Return numbers as the operators compute with them."""
    return side.to(torch.promote_types(side.dtype, torch.float32))
