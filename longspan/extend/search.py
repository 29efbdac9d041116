"""Search: a stretch for every pair of a model's heads, found by trying many on long texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from longspan.errors import InputError, message
from longspan.frequency import NTK, Frequency, Linear, LongRoPE, Plain, YaRN, factors
from longspan.hf.rope import from_config, head_width

# Factors are tried on a grid, from 1 to a little more than the lengths ask for, as in the paper.
_DIGITS = 2
_BEYOND = 1.25
# Standard deviation of a change, as a share of the whole range of factors in logarithms.
_SPREAD = 0.15


@dataclass(frozen=True)
class Budget:
    """How much a search may try.

    Attributes:
        population: candidates at the start, 3 known methods among them; 3 or more.
        parents: best candidates of all so far that the next ones come from; 2 to `population`.
        mutations: candidates of each round with some factors of one parent changed.
        crossovers: candidates of each round with factors of two parents.
        rounds: how often parents are chosen anew.
        changed: the chance of each factor to change in a mutation, over 0 and at most 1.

    Example:
        >>> Budget(population=8, parents=4, mutations=4, crossovers=4, rounds=5).evaluations
        48
    """

    population: int = 16
    parents: int = 8
    mutations: int = 8
    crossovers: int = 8
    rounds: int = 10
    changed: float = 0.3

    def __post_init__(self) -> None:
        for name, least in (
            ("population", 3),
            ("parents", 2),
            ("mutations", 0),
            ("crossovers", 0),
            ("rounds", 0),
        ):
            if getattr(self, name) < least:
                raise self._refusal(name, f"{least} or more")
        if self.parents > self.population:
            raise self._refusal("parents", f"at most the population, which is {self.population}")
        if not 0 < self.changed <= 1:
            raise self._refusal("changed", "a chance over 0 and at most 1")

    @property
    def evaluations(self) -> int:
        """The most candidates that are tried; each reads every window once."""
        return self.population + self.rounds * (self.mutations + self.crossovers)

    def _refusal(self, name: str, wanted: str) -> InputError:
        return InputError(
            message(
                "A search cannot have this budget.",
                {"got": f"{name}={getattr(self, name)!r}"},
                fix=wanted,
            )
        )


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        frequency: the best factors, the same for short and long texts.
        loss: of the model with them, in nats per token.
        known: losses of the methods that the search began with, by name.
        evaluations: candidates tried.
    """

    frequency: LongRoPE
    loss: float
    known: dict[str, float]
    evaluations: int


def search(
    model: Any,
    windows: Sequence[Sequence[int]],
    *,
    original: int | None = None,
    scored: int = 256,
    budget: Budget | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Found:
    """Find how many times slower each pair of a model's heads should turn to read windows of this length.

    An evolutionary search over factors that never fall from a pair to the next slower one. It begins with linear, NTK
    and YaRN scaling and changes of them, and never ends with anything worse. Every candidate, those three too, has
    LongRoPE's own scale, which servers assume. The model is not trained, and left as it was.

    Args:
        model: a causal language model of transformers whose positions are not scaled yet.
        windows: token ids, all of the length that the model shall read, from text it was not trained on. Too few fit
            the factors to themselves: what is best on 4 windows of 256 scored tokens can lose to YaRN on others.
        original: the length it was trained at; None takes what its configuration says.
        scored: tokens at the end of each window whose loss is measured.
        budget: how much to try, `Budget()` by default.
        seed: of all random choices; the same seed finds the same factors.
        progress: called with the candidates tried so far and the most that will be tried.

    Returns:
        The factors and losses. `with_frequency` of `longspan.hf.config` puts them into a configuration.

    Raises:
        InputError: a model without RoPE or with scaled positions, or windows that are none, differ in length, or
            are no longer than the trained length or the tokens to be scored.

    Example:
        >>> from longspan.hf import load_model
        >>> model, tokenizer = load_model()  # doctest: +SKIP
        >>> found = search(model, windows)  # doctest: +SKIP

    References:
        Ding et al., LongRoPE (arXiv 2402.13753), section 3.2 and algorithm 1. Unlike there, the first tokens of a
        text are stretched too, and a candidate out of order is sorted, not thrown away.
    """
    plain = from_config(model.config)
    if not isinstance(plain, Plain):
        raise InputError(
            message(
                "Factors are searched for a model whose positions are not scaled yet.",
                {"model": f"turns by {type(plain).__name__}"},
                fix="the checkpoint before it was scaled",
            )
        )
    original = model.config.max_position_embeddings if original is None else original
    rows = _rows(windows, original, scored)
    budget = budget or Budget()
    stretch = rows.shape[1] / original
    rng = np.random.default_rng(seed)
    losses: dict[tuple[float, ...], float] = {}

    def said(candidate: tuple[float, ...]) -> LongRoPE:
        own = {"theta": plain.theta, "share": plain.share}
        return LongRoPE(candidate, candidate, original=original, factor=stretch, **own)

    with _evaluating(model, plain) as turn_by:

        def measure(candidates: Sequence[tuple[float, ...]]) -> None:
            for candidate in candidates:
                if candidate not in losses:
                    turn_by(said(candidate))
                    losses[candidate] = _loss(model, rows, scored)
                    if progress is not None:
                        progress(len(losses), budget.evaluations)

        known = _known(plain, head_width(model.config), original, stretch)
        starts = list(known.values())
        measure(starts)
        measure(
            [
                _mutated(starts[number % len(starts)], stretch, budget.changed, rng)
                for number in range(budget.population - len(starts))
            ]
        )
        for _ in range(budget.rounds):
            parents = sorted(losses, key=losses.__getitem__)[: budget.parents]
            choose = rng.integers(len(parents), size=(budget.mutations + budget.crossovers, 2))
            measure(
                [
                    _mutated(parents[one], stretch, budget.changed, rng)
                    for one, _ in choose[: budget.mutations]
                ]
                + [_crossed(parents[one], parents[two], rng) for one, two in choose[budget.mutations :]]
            )
    best = min(losses, key=losses.__getitem__)
    return Found(
        frequency=said(best),
        loss=losses[best],
        known={name: losses[candidate] for name, candidate in known.items()},
        evaluations=len(losses),
    )


def _known(plain: Plain, width: int, original: int, stretch: float) -> dict[str, tuple[float, ...]]:
    own = {"theta": plain.theta, "share": plain.share}
    methods: dict[str, Frequency] = {
        "linear": Linear(stretch, **own),
        "ntk": NTK(stretch, **own),
        "yarn": YaRN(stretch, original=original, **own),
    }
    return {name: tuple(factors(method, width)) for name, method in methods.items()}


def _mutated(
    parent: tuple[float, ...], stretch: float, changed: float, rng: np.random.Generator
) -> tuple[float, ...]:
    """Return a candidate with some factors of another changed at random."""
    most = _BEYOND * stretch
    chosen = rng.random(len(parent)) < changed
    chosen[rng.integers(len(parent))] = True
    steps = rng.normal(0.0, _SPREAD * math.log(most), len(parent))
    return _ordered(np.clip(np.asarray(parent) * np.exp(chosen * steps), 1.0, most))


def _crossed(one: tuple[float, ...], two: tuple[float, ...], rng: np.random.Generator) -> tuple[float, ...]:
    """Return a candidate with each factor from one parent or the other."""
    return _ordered(np.where(rng.random(len(one)) < 0.5, one, two))


def _ordered(stretches: np.ndarray) -> tuple[float, ...]:
    """Return factors on the grid, in rising order: a slower pair is never stretched less."""
    return tuple(np.sort(np.round(stretches, _DIGITS)).tolist())


@contextmanager
def _evaluating(model: Any, plain: Plain) -> Iterator[Callable[[Frequency], None]]:
    """Lend a model in evaluation mode, with a function that sets its frequencies, and give it back as it was."""
    width = head_width(model.config)
    pairs = len(plain.angles_per_token(width))
    places = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "inv_freq", None), torch.Tensor)
        and hasattr(module, "attention_scaling")
    ]
    if not places or any(len(place.inv_freq) != pairs for place in places):
        raise InputError(
            message(
                "The place where this model keeps its frequencies is not known.",
                {
                    "model": type(model).__name__,
                    "wanted": f"modules with inv_freq [{pairs}] and attention_scaling",
                },
                fix="a decoder of transformers, such as Llama, Mistral, Qwen or Gemma",
            )
        )
    before = [(place.inv_freq, place.attention_scaling) for place in places]
    training = model.training

    def turn_by(frequency: Frequency) -> None:
        angles = frequency.angles_per_token(width)
        for place in places:
            # In place of the buffer, so that its own numbers stay untouched.
            place.inv_freq = angles.to(place.inv_freq.device)
            place.attention_scaling = frequency.scale()

    model.eval()
    try:
        yield turn_by
    finally:
        model.train(training)
        for place, (angles, scale) in zip(places, before, strict=True):
            place.inv_freq, place.attention_scaling = angles, scale


@torch.no_grad()
def _loss(model: Any, rows: torch.Tensor, scored: int) -> float:
    """Return the mean loss of the last tokens of each row, in nats; infinity where it is no number."""
    total = 0.0
    for row in rows.to(model.device):
        logits = model(row[None], use_cache=False, logits_to_keep=scored + 1).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits.float(), row[-scored:]).item()
    return total / len(rows) if math.isfinite(total) else math.inf


def _rows(windows: Sequence[Sequence[int]], original: int, scored: int) -> torch.Tensor:
    lengths = sorted({len(window) for window in windows})
    shortest = max(original, scored)
    if len(lengths) != 1 or lengths[0] <= shortest or scored < 1:
        raise InputError(
            message(
                "These windows do not fit the search.",
                {
                    "windows": f"{len(windows)} of {' and '.join(map(str, lengths)) or 'no'} tokens",
                    "model": f"trained at {original} tokens",
                    "scored": f"the last {scored} tokens of each",
                },
                fix=f"windows of one length over {shortest}, with 1 or more tokens scored",
            )
        )
    return torch.stack([torch.as_tensor(window, dtype=torch.int64) for window in windows])
