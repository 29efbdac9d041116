"""Training: transformers' Trainer over the windows of a recipe, interrupted without loss."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from longspan.extend.recipe import Recipe
from longspan.extend.windows import TrainingWindows


class Progress(Protocol):
    """Called after every step with the tokens done, the tokens in all, and the loss."""

    def __call__(self, done: int, total: int, *, loss: float) -> None: ...


def train(
    model: Any,
    windows: TrainingWindows,
    recipe: Recipe,
    *,
    folder: Path,
    state: str | None = None,
    progress: Progress | None = None,
) -> int:
    """Train a model on the windows of a recipe and return the number of steps done.

    The first Ctrl-C ends the training after the step that is running and saves its state; a second one ends it at
    once. A saved state goes on with the same windows, schedule and optimizer.

    Args:
        model: what to train, with its trainable weights marked.
        windows: what to train on.
        recipe: steps, batch, rate and seed.
        folder: where states are saved.
        state: the state to go on from, None to begin.
        progress: called after every step.

    Returns:
        `recipe.steps`, or fewer where the training was interrupted.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, min(20, recipe.steps // 10)),
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=_bfloat16_is_fast(on_cpu),
        use_cpu=on_cpu,
        seed=recipe.seed,
        logging_steps=1,
        save_strategy="steps",
        save_steps=max(10, recipe.steps // 10),
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
    )
    stop = _Stop()
    reporting = _Reporting(recipe.length * recipe.batch, progress)
    with warnings.catch_warnings(), _interrupts(stop):
        # peft and the loader of states still use names that torch and transformers have renamed.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        trainer = Trainer(model=model, args=arguments, train_dataset=windows, callbacks=[stop, reporting])
        # It prints every figure that the progress already shows.
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=state)
    # The Trainer leaves the model wrapped in autocast, which would change what it computes from now on.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    return trainer.state.global_step


def _bfloat16_is_fast(on_cpu: bool) -> bool:
    """Say whether this machine multiplies in bfloat16 by instructions of its own."""
    if on_cpu:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


class _Stop(TrainerCallback):
    """Ends the training after the step that is running, once asked."""

    asked = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True


class _Reporting(TrainerCallback):
    """Hands every logged loss on."""

    def __init__(self, tokens: int, progress: Progress | None) -> None:
        self.tokens, self.progress = tokens, progress

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **options: Any,
    ) -> None:
        if self.progress is not None and logs and "loss" in logs:
            self.progress(
                state.global_step * self.tokens, state.max_steps * self.tokens, loss=float(logs["loss"])
            )


@contextmanager
def _interrupts(stop: _Stop) -> Iterator[None]:
    """Let the first Ctrl-C ask for a stop, and the second one end the program as usual."""

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:
        # Only the main thread may listen to signals.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
