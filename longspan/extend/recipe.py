"""The recipe: everything that decides how a model is extended, as a value that can be saved and repeated."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from longspan.errors import InputError, message

FILE = "recipe.json"


@dataclass(frozen=True)
class Recipe:
    """How a model is extended.

    Attributes:
        model: folder or Hugging Face id; None is the model that comes with Longspan.
        text: file, folder or dataset id to train on; None is the standard library of this Python.
        column: column of a dataset that holds the text; None finds it.
        length: tokens the model shall read.
        rope: how positions are stretched: "linear", "ntk" or "yarn".
        pattern: what each query reads while training, an expression; the result reads densely. Left empty, the last
            five sixteenths and the first quarter of the length.
        margin: how much further positions are stretched than the lengths ask for, see
            `longspan.hf.config.rope_parameters`.
        steps: updates of the weights.
        batch: windows per step.
        rate: peak learning rate.
        rank: rank of the LoRA matrices.
        repeats: share of windows in which segments recur.
        passkeys: share of windows that hide a passkey in their text; the rest is text alone.
        seed: of all random choices.

    References:
        Chen et al., LongLoRA (arXiv 2309.12307), section 3.3: LoRA on the attention, embeddings and norms whole.
    """

    model: str | None = None
    text: str | None = None
    column: str | None = None
    length: int = 4096
    rope: str = "yarn"
    pattern: str = ""
    margin: float = 1.25
    steps: int = 175
    batch: int = 1
    rate: float = 1.5e-3
    rank: int = 16
    repeats: float = 0.0
    passkeys: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.pattern:
            recent, first = max(1, 5 * self.length // 16), max(1, self.length // 4)
            object.__setattr__(self, "pattern", f"Streaming({recent}, sinks={first})")
        for name, least in (("length", 2), ("steps", 1), ("batch", 1), ("rank", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise _out_of_range(name, getattr(self, name), f"{least} or more")
        if not 1 <= self.margin <= 4:
            raise _out_of_range("margin", self.margin, "a factor from 1 to 4")
        if not 0 < self.rate < 1:
            raise _out_of_range("rate", self.rate, "a number between 0 and 1")
        if min(self.repeats, self.passkeys) < 0 or self.repeats + self.passkeys > 1:
            shares = f"{self.repeats:g} and {self.passkeys:g}"
            raise _out_of_range("repeats and passkeys", shares, "shares that are at most 1 together")

    def save(self, folder: Path) -> None:
        """Write the recipe into a folder."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Recipe:
        """Read the recipe that `save` wrote.

        Raises:
            InputError: there is none, or it cannot be read.
        """
        path = folder / FILE
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            known = {field.name for field in fields(cls)}
            return cls(**{name: value for name, value in kept.items() if name in known})
        except FileNotFoundError:
            reason = f"it holds no {FILE}"
        except (ValueError, TypeError, AttributeError) as error:
            reason = f"its {FILE} cannot be read: {error}"
        raise InputError(
            message(
                "There is no run to resume in this folder.",
                {"asked": str(folder), "because": reason},
                fix="--output with the folder of an interrupted run, or leave out --resume",
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
