"""The output folder: what must be true of it before the work, and what is written into it after."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from longspan.errors import InputError, message
from longspan.extend.recipe import Recipe
from longspan.hf.config import write_config
from longspan.hf.quiet import quiet


class OutputFolder:
    """Where an extended model goes.

    While the model trains the folder holds the recipe and the state of the training; when it is done, the recipe
    and a plain checkpoint: configuration, weights and tokenizer.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def training(self) -> Path:
        """Where the state of an unfinished training lies."""
        return self.path / "training"

    def begin(self, recipe: Recipe) -> None:
        """Make the folder and write the recipe into it.

        Raises:
            InputError: the folder is not empty, or cannot be written.
        """
        asked = {"asked": f"--output {self.path}"}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            held = sorted(entry.name for entry in self.path.iterdir())
        except OSError as error:
            raise _unwritable(asked, error) from error
        if held:
            shown = ", ".join(held[:4]) + (f" and {len(held) - 4} more" if len(held) > 4 else "")
            unfinished = self.training.is_dir()
            raise InputError(
                message(
                    "The output folder is not empty.",
                    asked | {"found": shown},
                    fix="--resume to go on with the run in it"
                    if unfinished
                    else "another folder, or empty this one",
                )
            )
        try:
            recipe.save(self.path)
        except OSError as error:
            raise _unwritable(asked, error) from error

    def unfinished(self) -> tuple[Recipe, str | None]:
        """Return the recipe of an interrupted run, and where its last state lies, None before the first one.

        Raises:
            InputError: there is no run in this folder, or it is finished.
        """
        recipe = Recipe.load(self.path)
        if (self.path / "config.json").exists() and not self.training.exists():
            raise InputError(
                message(
                    "This run is finished, so there is nothing to resume.",
                    {"asked": f"--resume --output {self.path}"},
                    fix=f"longspan eval {self.path}",
                )
            )
        return recipe, get_last_checkpoint(str(self.training)) if self.training.is_dir() else None

    def finish(self, model: PreTrainedModel, tokenizer: Any) -> None:
        """Write the plain checkpoint, then drop the state of the training."""
        tokenizer.model_max_length = model.config.max_position_embeddings
        with quiet():
            model.save_pretrained(self.path)
            tokenizer.save_pretrained(self.path)
        write_config(model.config, self.path)
        shutil.rmtree(self.training, ignore_errors=True)


def _unwritable(asked: dict[str, str], error: OSError) -> InputError:
    return InputError(
        message(
            "The output folder cannot be written.",
            asked | {"because": error.strerror or str(error)},
            fix="another folder",
        )
    )
