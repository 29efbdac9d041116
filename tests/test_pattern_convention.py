"""Conventions: our words for the arguments of other libraries, against their own masks where they are installed."""

from __future__ import annotations

import numpy as np
import oracle
import pairs
import pytest
import torch
from transformers import BigBirdConfig, LongformerConfig, masking_utils
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from longspan.derive.mask import counts
from longspan.errors import PatternError
from longspan.pattern import Pattern, convention

LENGTHS = (1, 2, 31, 97)


def same_as(pattern: Pattern, n: int, reads) -> None:
    """Hold a pattern to a mask function of transformers, read pair by pair."""
    q, k = torch.arange(n)[:, None], torch.arange(n)[None]
    truth = reads(torch.tensor(0), torch.tensor(0), q, k).expand(n, n)
    oracle.same_pairs(counts(pattern, length=n)[None].numpy(), truth.long().numpy()[None], str(pattern))


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_sliding_windows_are_those_of_transformers(size: int, n: int):
    same_as(convention.mistral(size), n, masking_utils.sliding_window_causal_mask_function(size))
    both = masking_utils.sliding_window_bidirectional_mask_function(size)
    same_as(convention.transformers_encoder(size), n, both)
    chunked = masking_utils.chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long))
    same_as(convention.transformers_chunked(size), n, chunked)


@pytest.mark.parametrize("n", LENGTHS)
def test_no_window_reads_all(n: int):
    same_as(convention.mistral(None), n, masking_utils.causal_mask_function)
    same_as(convention.transformers_encoder(None), n, masking_utils.bidirectional_mask_function)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "window", [(-1, -1), (0, 0), (5, 0), (0, 3), (4, 4), (5, 2), (-1, 3), (2, -1), (-1, 0)]
)
def test_windows_are_those_that_flash_attention_documents(window: tuple[int, int], causal: bool, n: int):
    """Query i reads keys from i - left to i + right, where -1 is no bound; the package needs a GPU to run."""
    left, right = window[0] if window[0] >= 0 else n, window[1] if window[1] >= 0 else n
    right = 0 if causal else right
    truth = oracle.tally(1, n, lambda head, q: range(q - left, q + right + 1))
    pattern = convention.flash(window, causal=causal)
    oracle.same_pairs(counts(pattern, length=n)[None].numpy(), truth, f"flash {window}")


@pytest.mark.parametrize(("kernel", "apart"), [(1, 1), (2, 1), (7, 1), (4, 3), (5, 6)])
def test_neighborhoods_are_those_that_natten_documents(kernel: int, apart: int):
    for n in (kernel * apart, 31, 97):
        both = convention.natten(kernel, dilation=apart, length=n)
        truth = pairs.neighborhood(1, n, kernel, apart)
        oracle.same_pairs(counts(both, length=n)[None].numpy(), truth, str(both))
        assert (truth.sum(axis=2) == kernel).all()
        causal = convention.natten(kernel, dilation=apart, length=n, is_causal=True)
        truth = pairs.neighborhood(1, n, kernel, apart, causal=True)
        oracle.same_pairs(counts(causal, length=n)[None].numpy(), truth, str(causal))


def test_names_of_other_code_mean_what_their_formulas_say():
    n = 31
    q, k = np.arange(n)[:, None], np.arange(n)[None]
    for pattern, truth in [
        (convention.attention_gym(5), (q - k <= 5) & (k <= q)),
        (convention.longformer(6), abs(q - k) <= 3),
        (convention.longformer_code(6), abs(q - k) <= 6),
        (convention.longformer_code(6, autoregressive=True), (q - k <= 6) & (k <= q)),
        (convention.sparse_strided(5)[0], (q - k < 5) & (k <= q)),
        (convention.sparse_strided(5)[1], ((q - k) % 5 == 0) & (k <= q)),
        (convention.sparse_fixed(8, blocksize=2), ((q // 8 == k // 8) | (k % 8 >= 6)) & (k <= q)),
    ]:
        claimed = counts(pattern, length=n, heads=1).numpy()
        oracle.same_pairs(claimed, truth[None].astype(np.int64), str(pattern))


def test_torchscale_gives_neighbouring_heads_the_same_tokens():
    pattern = convention.torchscale([8, 16], [1, 4])
    truth = oracle.longnet(6, 33, [8, 16], [1, 4], torchscale=True)
    oracle.same_pairs(counts(pattern, length=33, heads=6).numpy(), truth, str(pattern))
    assert (truth[0] == truth[1]).all() and (truth[1] != truth[2]).any()


# Whole layers of transformers: their output against attention over our counts.


def projected(layer: torch.nn.Module, hidden: torch.Tensor, heads: int) -> list[torch.Tensor]:
    return [
        part(hidden).unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in (layer.query, layer.key, layer.value)
    ]


def close(output: torch.Tensor, layer: torch.nn.Module, hidden: torch.Tensor, often: torch.Tensor) -> float:
    """Return the largest difference between a layer's output and attention over counts `[heads, n, n]`."""
    given = projected(layer, hidden, len(often))
    truth, _ = oracle.dense(*given, often, scale=given[0].shape[-1] ** -0.5)
    return float((output - truth.transpose(1, 2).flatten(2)).abs().max())


@pytest.mark.parametrize("anchors", [(), (0,), (3, 20, 21)], ids=str)
def test_longformer_reads_as_in_transformers(anchors: tuple[int, ...]):
    torch.manual_seed(0)
    config = LongformerConfig(
        hidden_size=16, num_attention_heads=2, attention_window=[8, 12], num_hidden_layers=2
    )
    layer = LongformerSelfAttention(config, layer_id=0).double().eval()
    # Separate projections belong to the model; with equal ones only the pattern is left.
    for name in ("query", "key", "value"):
        getattr(layer, f"{name}_global").load_state_dict(getattr(layer, name).state_dict())
    hidden = torch.randn(1, 48, 16, dtype=torch.float64)
    mask = torch.zeros(1, 48, dtype=torch.float64)
    mask[0, list(anchors)] = 10000.0
    with torch.no_grad():
        output = layer(
            hidden,
            attention_mask=mask,
            is_index_masked=mask < 0,
            is_index_global_attn=mask > 0,
            is_global_attn=bool(anchors),
        )[0]
        pattern = convention.longformer(config.attention_window[0], global_tokens=anchors)
        # Transformers computes this softmax in float32.
        assert close(output, layer, hidden, counts(pattern, length=48, heads=2)) < 1e-5
        wider = convention.longformer(config.attention_window[0] + 2, global_tokens=anchors)
        assert close(output, layer, hidden, counts(wider, length=48, heads=2)) > 1e-3


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Return a list that fills with the plans of random blocks that transformers makes."""
    made: list[np.ndarray] = []
    original = BigBirdBlockSparseAttention._bigbird_block_rand_mask_with_head

    def kept(self, *arguments, **options):
        plan = original(self, *arguments, **options)
        made.append(np.stack(plan))
        return plan

    monkeypatch.setattr(BigBirdBlockSparseAttention, "_bigbird_block_rand_mask_with_head", kept)
    return made


def bigbird_layer(mode: str) -> tuple[BigBirdBlockSparseAttention, torch.Tensor, torch.Tensor]:
    """Return a layer, what went in and what came out, in "train" or "eval"."""
    torch.manual_seed(0)
    config = BigBirdConfig(hidden_size=16, num_attention_heads=2, block_size=4, num_random_blocks=3)
    layer = getattr(BigBirdBlockSparseAttention(config, seed=5).double(), mode)()
    hidden = torch.randn(1, 64, 16, dtype=torch.float64)
    masks = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, 64, dtype=torch.float64), 4)
    blocked, band, rows, columns = masks
    before = np.random.get_state()  # noqa: NPY002 - transformers seeds the generator of everyone
    try:
        with torch.no_grad():
            output = layer(hidden, band, rows, columns, blocked, blocked)[0]
    finally:
        np.random.set_state(before)  # noqa: NPY002
    return layer, hidden, output


def test_bigbird_reads_as_in_transformers_while_it_trains(plans: list[np.ndarray]):
    layer, hidden, output = bigbird_layer("train")
    pattern = convention.bigbird(plans[0], block=4)
    with torch.no_grad():
        assert close(output, layer, hidden, counts(pattern, length=64, heads=2)) < 1e-10
        without = convention.bigbird(plans[0][:, :, :0], block=4)
        assert close(output, layer, hidden, counts(without, length=64, heads=2)) > 1e-3


def test_bigbird_of_transformers_counts_the_first_block_four_times_when_evaluated(plans: list[np.ndarray]):
    """The deviation has a name; if transformers mends it, this fails and the name can go."""
    layer, hidden, output = bigbird_layer("eval")
    assert not plans[0].any()
    pattern = convention.bigbird_evaluated(block=4, length=64)
    assert counts(pattern, length=64)[20, 0] == 4
    with torch.no_grad():
        assert close(output, layer, hidden, counts(pattern, length=64, heads=2)) < 1e-10


def test_draws_that_repeat_count_again():
    plan = np.array([[[0, 3, 3], [4, 4, 4], [1, 2, 0]]])
    often = counts(convention.bigbird(plan, block=1), length=5)
    assert often.tolist() == [
        [1, 1, 1, 1, 1],
        [2, 1, 1, 2, 1],
        [1, 1, 1, 1, 4],
        [2, 1, 2, 1, 1],
        [1, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: convention.longformer(7),
            """\
Longformer's attention_window is even: half of it lies on each side.
  got  attention_window=7
  try  longformer(512), or Longformer(window) with the keys of one side and the query's own""",
        ),
        (
            lambda: convention.flash((-2, 0)),
            """\
A side of `window_size` is a number of tokens, or -1 for all.
  got  window_size=(-2, 0)
  try  window_size=(511, 0), or (-1, -1) for no window""",
        ),
        (
            lambda: convention.bigbird([[1, 2]], block=4),
            """\
A plan of random blocks is an array of integers, [heads, blocks - 2, random].
  got  [1, 2] int64
  try  the array `rand_attn` of transformers, without its batch""",
        ),
    ],
)
def test_what_cannot_be_converted_says_so(call, text: str):
    with pytest.raises(PatternError) as caught:
        call()
    assert str(caught.value) == text
