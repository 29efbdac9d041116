"""The recipe: everything that decides how a model is extended, as a value that can be saved and repeated."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from longspan.errors import InputError, message

METHODS = ("full", "lora", "lora+", "qlora")
# LongLoRA's rate (arXiv 2309.12307, section 4.1) where every weight is trained, ours where few are.
RATES = {"full": 2e-5}
RATE = 1.5e-3

# The longest window that is whole unless told otherwise; the shortest one of a stage, and the most stages.
WHOLE = 4096
SHORTEST = 1024
STAGES = 3

# What is taken where nothing is said: for lengths that one window holds, and for longer ones, which are harder. Far more keys
# compete in reading those than in any window, so their windows are read densely.
NEAR = {
    "margin": 1.5,
    "pattern": "Streaming({1/4}, sinks={1/8})",
    "repeats": 0.0,
    "passkeys": 0.4,
    "steps": 450,
}
FAR = {"margin": 2.0, "pattern": "Causal()", "repeats": 0.2, "passkeys": 0.3, "steps": 700}

CHOICES = {
    "method": METHODS,
    "documents": ("joined", "packed"),
    "positions": ("skipping", "counted"),
    "activations": ("kept", "recomputed", "offloaded"),
    "loss": ("chunked", "whole"),
}
_LEAST = {
    "length": 2,
    "window": 2,
    "stages": 1,
    "steps": 1,
    "batch": 1,
    "accumulate": 1,
    "rank": 1,
    "seed": 0,
    "sequence_ranks": 0,
}
_SHARES = ("repeats", "passkeys")
_SHARE = re.compile(r"\{\s*(\d+)\s*/\s*([1-9]\d*)\s*\}")


@dataclass(frozen=True)
class Recipe:
    """How a model is extended.

    Attributes:
        model: folder or Hugging Face id; None is the model that comes with Longspan.
        text: file, folder or dataset id to train on; None is the standard library of this Python.
        column: column of a dataset or a file of rows that holds the text; None finds it.
        length: tokens the model shall read.
        rope: how positions are stretched: "linear", "ntk", "yarn" or "llama3", see `longspan.hf.config.extended`;
            "longrope", with factors searched on the text; a file of factors, see `longspan.extend.stretch.settled`; or
            any frequency of `longspan.frequency`, itself or as text, which says its stretch and needs no margin.
        margin: how much further positions are stretched than the lengths ask for, see
            `longspan.hf.config.rope_parameters`. None is 1.5, and 2 for more than 4,096 tokens.
        pattern: what each query reads while training, an expression; the result reads densely. `{1/4}` stands for a
            quarter of the window. Several, with ";" between them, are one for each layer. None is
            "Streaming({1/4}, sinks={1/8})", and "Causal()" for more than 4,096 tokens.
        method: which weights are trained. "full": all; "lora": small matrices beside the projections of attention;
            "lora+": those, and embeddings and norms whole (LongLoRA); "qlora": "lora" beside weights of 4 bits.
        window: tokens of a training window. None is `length` up to 4,096, and a quarter of a longer one but no fewer,
            where positions skip; it is `length` where they cannot, or where processes share each window.
        stages: parts of the training, of equally many steps; the last has windows of full size, and every one
            before half of the next. None is three, or fewer whose windows have 1,024 tokens, where positions skip
            in the short ones; else one.
        positions: what happens in windows shorter than `length`. "skipping": positions jump once, so that a window
            reaches over all of `length` and its margin (PoSE); "counted": they count on, as far as the window goes.
        documents: "joined": a window reads over the ends of documents; "packed": every document in it is read alone.
        steps: updates of the weights. None is 450, and 700 for more than 4,096 tokens.
        batch: windows at a time, on each device.
        accumulate: how many times that many windows make one step.
        rate: peak learning rate; None is 2e-5 for "full" and 1.5e-3 for the others.
        rank: rank of the LoRA matrices.
        repeats: share of steps in whose windows segments recur, so that each teaches to look back many times. None is
            0, and 0.2 for more than 4,096 tokens.
        passkeys: share of steps whose windows hide a passkey in their text, and teach to find it and nothing else. In
            all others windows are text, and teach that. None is 0.4, and 0.3 for more than 4,096 tokens. Where one
            of both shares is told, the other is no more than the rest.
        activations: "kept" for the way back; "recomputed" on it, layer by layer: a third more time, far less memory;
            or "offloaded" to the CPU's memory from a CUDA device.
        loss: "chunked": logits of few tokens at a time; "whole": of all, as the model does it.
        sequence_ranks: processes that read each window together, split along the sequence, which divide those that
            there are; 0 is all of them.
        seed: of all random choices.

    Raises:
        InputError: a value of the wrong type or out of range, or two that do not go together.

    Example:
        >>> Recipe(length=1024).patterns(1024)
        ('Streaming(256, sinks=128)',)
        >>> Recipe(length=1024, stages=3).windows
        (256, 512, 1024)
        >>> Recipe(length=32768).window, Recipe(length=32768, positions="counted").window
        (8192, 32768)

    References:
        Chen et al., LongLoRA (arXiv 2309.12307), section 3.3: LoRA on the attention, embeddings and norms whole (its
        "LoRA+", not the LoRA+ of arXiv 2402.12354). Zhu et al., PoSE (arXiv 2309.10400). Beltagy et al., Longformer
        (arXiv 2004.05150), section 4.2, for the stages.
    """

    model: str | None = None
    text: str | None = None
    column: str | None = None
    length: int = 4096
    rope: str = "yarn"
    margin: float | None = None
    pattern: str | None = None
    method: str = "lora+"
    window: int | None = None
    stages: int | None = None
    positions: str = "skipping"
    documents: str = "joined"
    steps: int | None = None
    batch: int = 1
    accumulate: int = 1
    rate: float | None = None
    rank: int = 32
    repeats: float | None = None
    passkeys: float | None = None
    activations: str = "kept"
    loss: str = "chunked"
    sequence_ranks: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.rope, str):
            # Loading torch takes seconds, which a recipe in plain words need not wait for.
            from longspan.frequency import Frequency

            if isinstance(self.rope, Frequency):
                object.__setattr__(self, "rope", str(self.rope))
        for field in fields(self):
            _check_type(field.name, str(field.type), getattr(self, field.name))
        if self.rate is None:
            object.__setattr__(self, "rate", RATES.get(self.method, RATE))
        # A share that is told leaves the other the rest at most.
        rest = max(0.0, 1 - (self.repeats or 0) - (self.passkeys or 0))
        for name, value in (NEAR if self.length <= WHOLE else FAR).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, min(value, rest) if name in _SHARES else value)
        if self.window is None:
            object.__setattr__(self, "window", self._usual_window())
        if self.stages is None:
            object.__setattr__(self, "stages", self._usual_stages())
        for name, known in CHOICES.items():
            _check_choice(name, getattr(self, name), known)
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise _out_of_range(name, getattr(self, name), f"{least} or more")
        if not 1 <= self.margin <= 4:
            raise _out_of_range("margin", self.margin, "a factor from 1 to 4")
        if not 0 < self.rate < 1:
            raise _out_of_range("rate", self.rate, "a number between 0 and 1")
        if not (self.repeats >= 0 and self.passkeys >= 0 and self.repeats + self.passkeys <= 1):
            shares = f"{self.repeats:g} and {self.passkeys:g}"
            raise _out_of_range("repeats and passkeys", shares, "shares that are at most 1 together")
        if self.window > self.length:
            raise _out_of_range("window", self.window, f"at most the length, {self.length}")
        if self.stages > min(self.steps, self.window.bit_length() - 1):
            raise _out_of_range(
                "stages",
                self.stages,
                f"at most one for each of {self.steps} steps, and windows of 2 tokens or more",
            )
        if self.skips and self.documents == "packed":
            raise InputError(
                message(
                    "Positions that skip and packed documents do not go together.",
                    {
                        "asked": f"windows of {self.windows[0]} in a length of {self.length}, documents packed",
                        "why": "where positions jump, a packed window begins another document",
                    },
                    fix="positions counted, or documents joined",
                )
            )

    def _usual_window(self) -> int:
        return max(WHOLE, self.length // 4) if self._may_skip() and self.length > WHOLE else self.length

    def _usual_stages(self) -> int:
        doublings = max(self.window // SHORTEST, 1).bit_length() if self._may_skip() else 1
        return max(1, min(STAGES, doublings, self.steps))

    def _may_skip(self) -> bool:
        return self.positions == "skipping" and self.documents == "joined" and self.sequence_ranks == 1

    @property
    def skips(self) -> bool:
        """Whether positions jump in some windows."""
        return self.positions == "skipping" and self.windows[0] < self.length

    @property
    def reach(self) -> int:
        """Positions over which windows that skip reach: without the margin, far distances would be the rarest."""
        return round(self.length * self.margin)

    @property
    def windows(self) -> tuple[int, ...]:
        """Tokens of a window in each stage."""
        return tuple(self.window >> (self.stages - 1 - stage) for stage in range(self.stages))

    def sharing(self, devices: int) -> int:
        """Return how many of so many devices read each window together."""
        return self.sequence_ranks or devices

    def divides(self, devices: int) -> bool:
        """Say whether so many devices can be divided so: in whole groups, with two tokens of a window for each."""
        return devices % self.sharing(devices) == 0 and self.windows[0] >= 2 * self.sharing(devices)

    def stage(self, step: int) -> int:
        """Return the stage that a step belongs to, steps counted from 0."""
        return min(step * self.stages // self.steps, self.stages - 1)

    def tokens(self, steps: int) -> int:
        """Return how many tokens one device has read after that many steps."""
        counts = [0] * self.stages
        for step in range(steps):
            counts[self.stage(step)] += 1
        read = sum(count * window for count, window in zip(counts, self.windows, strict=True))
        return read * self.batch * self.accumulate

    def patterns(self, window: int) -> tuple[str, ...]:
        """Return the expressions of the pattern in a window of so many tokens: one, or one for each layer."""

        def tokens(share: re.Match[str]) -> str:
            return str(max(1, window * int(share[1]) // int(share[2])))

        return tuple(part.strip() for part in _SHARE.sub(tokens, self.pattern).split(";"))


def _check_type(name: str, kind: str, value: Any) -> None:
    """Check a value against the annotation of its field: str, int or float, or None where that stands beside it."""
    wanted, _, optional = kind.partition(" | ")
    if value is None and optional:
        return
    fits = {
        "str": isinstance(value, str),
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, Real) and not isinstance(value, bool),
    }
    if not fits[wanted]:
        words = {"str": "text", "int": "a whole number", "float": "a number"}
        raise _out_of_range(name, repr(value), words[wanted])


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1, cutoff=0.0)
        raise InputError(
            message(
                "An option of the recipe has no such choice.",
                {"asked": f"{name} {value}", "known": ", ".join(known)},
                fix=near[0],
            )
        )


def _out_of_range(name: str, got: object, wanted: str) -> InputError:
    return InputError(
        message(
            "An option of the recipe is out of range.",
            {"asked": f"{name} {got}", "wanted": wanted},
            fix="the default, by leaving the option out",
        )
    )
