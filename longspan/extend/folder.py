"""The output folder: what must be true of it before the work, and what is written into it after."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from longspan.errors import InputError, message
from longspan.extend import settings, state
from longspan.extend.recipe import Recipe
from longspan.hf.config import write_config
from longspan.hf.quiet import quiet
from longspan.size import size


class OutputFolder:
    """Where an extended model goes.

    While the model trains the folder holds the recipe and the states of the training; when it is done, the recipe
    and a plain checkpoint: configuration, weights and tokenizer. The folder `training` goes last, so as long as it
    is there a run can be resumed.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def training(self) -> Path:
        """Where the states of an unfinished training lie."""
        return self.path / "training"

    @property
    def _asked(self) -> dict[str, str]:
        return {"asked": f"--output {self.path}"}

    def check(self) -> None:
        """Check that a new run can begin here, and change nothing.

        Raises:
            InputError: the folder is not empty, or cannot be written.
        """
        try:
            held = sorted(entry.name for entry in self.path.iterdir()) if self.path.exists() else []
            with tempfile.TemporaryFile(dir=self._nearest()):
                pass
        except OSError as error:
            raise self._unwritable(error) from error
        if held:
            shown = ", ".join(held[:4]) + (f" and {len(held) - 4} more" if len(held) > 4 else "")
            unfinished = self.training.is_dir() or held == [settings.FILE]
            raise InputError(
                message(
                    "The output folder is not empty.",
                    self._asked | {"found": shown},
                    fix="--resume to go on with the run in it"
                    if unfinished
                    else "another folder, or empty this one",
                )
            )

    def require(self, needed: int) -> None:
        """Check that the disk has room for what a run writes.

        Args:
            needed: bytes.

        Raises:
            InputError: it has not.
        """
        free = shutil.disk_usage(self._nearest()).free
        if free < needed:
            raise InputError(
                message(
                    "The disk has too little room for this run.",
                    self._asked
                    | {
                        "needed": f"{size(needed)}, for the states of the training and the result",
                        "free": size(free),
                    },
                    fix="another folder; or --method lora, whose states are small",
                )
            )

    def begin(self, recipe: Recipe) -> None:
        """Make the folder and write the recipe into it.

        Raises:
            InputError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            settings.write(recipe, self.path / settings.FILE)
        except OSError as error:
            raise self._unwritable(error) from error

    def unfinished(self) -> tuple[Recipe, Path | None]:
        """Return the recipe of an interrupted run, and its last whole state, None before the first one.

        Raises:
            InputError: there is no run in this folder, or it is finished.
        """
        recipe = settings.load(self.path)
        if (self.path / "config.json").exists() and not self.training.exists():
            raise InputError(
                message(
                    "This run is finished, so there is nothing to resume.",
                    {"asked": f"--resume --output {self.path}"},
                    fix=f"longspan eval {self.path}",
                )
            )
        return recipe, state.last(self.training)

    def finish(self, model: PreTrainedModel, tokenizer: Any) -> None:
        """Write the plain checkpoint, then drop the states of the training.

        All is written aside, and moved to its place when it has reached the disk; `config.json` comes last.

        Raises:
            InputError: it cannot be written; the last state is kept.
        """
        tokenizer.model_max_length = model.config.max_position_embeddings
        aside, done = self.path / "writing", self.path / "training.done"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            with quiet():
                model.save_pretrained(aside)
                tokenizer.save_pretrained(aside)
            write_config(model.config, aside)
            files = sorted(aside.iterdir(), key=lambda path: path.name == "config.json")
            for path in files:
                state.flush(path)
            for path in files:
                path.replace(self.path / path.name)
            state.flush(self.path)
            aside.rmdir()
            if self.training.exists():
                self.training.replace(done)
        except (OSError, SafetensorError) as error:
            raise self._unwritable(error) from error
        shutil.rmtree(done, ignore_errors=True)

    def _nearest(self) -> Path:
        """Return the folder itself, or the nearest above it that is there."""
        path = self.path.absolute()
        while not os.path.lexists(path):
            path = path.parent
        return path

    def _unwritable(self, error: Exception) -> InputError:
        return InputError(
            message(
                "The output folder cannot be written.",
                self._asked | {"because": getattr(error, "strerror", None) or str(error)},
                fix="another folder, or make room in this one and go on with --resume"
                if self.training.exists()
                else "another folder",
            )
        )
