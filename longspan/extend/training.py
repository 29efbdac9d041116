"""Training: transformers' Trainer over the windows of a recipe, interrupted without loss."""

from __future__ import annotations

import math
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from longspan.errors import InputError, message
from longspan.extend import state as states
from longspan.extend.activations import kept
from longspan.extend.adapter import causal_model
from longspan.extend.loss import chunked
from longspan.extend.recipe import Recipe
from longspan.extend.windows import TrainingWindows
from longspan.hf import precision
from longspan.hf.attention import set_pattern
from longspan.hf.loader import share_batches
from longspan.hf.quiet import quiet
from longspan.hf.sequence import sequence_parallel
from longspan.pattern import parse
from longspan.ring.watch import TIMEOUT, Watch, join
from longspan.size import size

# States that are kept, the last ones; while the next one is written there is one more.
KEPT = 2
# What the losses of the kinds of windows are called.
_LOSSES = {"text": "loss", "segments": "loss of segments", "passkey": "loss of passkeys"}


class Progress(Protocol):
    """Called after every step with the tokens done, the tokens in all, and the loss by a name that says of what: `loss` of
    text, and by other names that of windows which teach retrieval."""

    def __call__(self, done: int, total: int, **loss: float) -> None: ...


def train(
    model: Any,
    windows: TrainingWindows,
    recipe: Recipe,
    *,
    folder: Path,
    state: Path | None = None,
    together: int = 1,
    timeout: timedelta = TIMEOUT,
    progress: Progress | None = None,
) -> int:
    """Train a model on the windows of a recipe and return the number of steps done.

    The first Ctrl-C ends the training after the step that is running and saves its state; a second one ends it at
    once. A saved state goes on with the same windows, schedule and optimizer, to the same weights.

    Args:
        model: what to train, with its trainable weights marked.
        windows: what to train on.
        recipe: what is read, steps, batch, rate and seed.
        folder: where states are saved.
        state: the state to go on from, None to begin.
        together: processes that read each window together; a state may go on with another number of them.
        timeout: how long processes wait for one another.
        progress: called after every step.

    Returns:
        `recipe.steps`, or fewer where the training was interrupted.

    Raises:
        InputError: the loss or a gradient is not a finite number, before it has changed a weight; or a state
            cannot be written. The last state that was saved is whole, and is kept.
        RankError: a process is gone or did not answer within the timeout; the same holds of the last state.
    """
    kind = next(model.parameters()).device.type
    # The Trainer would let processes on CPU wait half an hour, whatever it is told.
    join(kind, timeout)
    arguments = _arguments(recipe, folder, kind == "cpu")
    causal = causal_model(model)
    stop = _Stop()
    reporting = _Reporting(windows, progress)
    keeping = _Keeping(folder, trained_bytes(model))
    with (
        warnings.catch_warnings(),
        quiet(),
        _interrupts(stop),
        Watch("the training", kept=keeping.kept, fix=keeping.fix) as watch,
        kept(causal, recipe.activations),
        chunked(causal) if recipe.loss == "chunked" else nullcontext(),
        _split(causal, together, timeout) if together > 1 else nullcontext(),
    ):
        # peft and the loader of states still use names that torch and transformers have renamed.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        trainer = _Trainer(model=model, args=arguments, train_dataset=windows, callbacks=[stop, reporting])
        trainer.together, trainer.watch = together, watch
        trainer.add_callback(keeping)
        # It prints every figure that the progress already shows.
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=state and str(state))
        except (OSError, SafetensorError) as error:
            raise keeping.failed(str(error)) from error
        # The Trainer leaves the model wrapped in autocast, which would change what it computes from now on.
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    return trainer.state.global_step


def _arguments(recipe: Recipe, folder: Path, on_cpu: bool) -> TrainingArguments:
    """Return what the Trainer is told."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, recipe.steps // 10),
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=precision.bfloat16_is_fast(on_cpu),
        use_cpu=on_cpu,
        seed=recipe.seed,
        logging_steps=1,
        # It would put the average of earlier losses in the place of one that is not a number.
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=max(10, recipe.steps // 10),
        save_total_limit=KEPT,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        # Experts may be left out of a step; what LoRA trains never is.
        ddp_find_unused_parameters=recipe.method == "full" and recipe.activations != "recomputed",
    )


def _split(model: PreTrainedModel, together: int, timeout: timedelta) -> AbstractContextManager[Any]:
    """Let neighbouring processes read each window together."""
    ranks = range(torch.distributed.get_world_size())
    # Not a mesh, whose groups would wait half an hour.
    group, _ = torch.distributed.new_subgroups_by_enumeration(
        [list(ranks[first : first + together]) for first in ranks[::together]], timeout=timeout
    )
    return sequence_parallel(model, group=group)


def trained_bytes(model: nn.Module) -> int:
    """Return the bytes of one state: everything trained, and Adam's two moments of it."""
    return sum(
        3 * weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad
    )


class _Trainer(Trainer):
    """transformers' Trainer, which sets the pattern of each stage and stops at a loss that is no number."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.recipe: Recipe = self.train_dataset.recipe
        self._window = 0
        self._batch: dict[int, list[int]] = {}
        self.together, self.watch = 1, Watch("the training", fix="")

    def get_train_dataloader(self) -> Any:
        return share_batches(super().get_train_dataloader(), self.together)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], *rest: Any, **options: Any
    ) -> Tensor:
        step = self.state.global_step
        self.watch.step = f"step {step + 1} of {self.state.max_steps}"
        self._batch = {step: self._batch.get(step, []) + inputs.pop("window").tolist()}
        window = inputs["input_ids"].shape[1]
        if window != self._window:
            parts = [parse(text) for text in self.recipe.patterns(window)]
            set_pattern(causal_model(self.model), parts if len(parts) > 1 else parts[0])
            self._window = window
        loss = super().training_step(model, inputs, *rest, **options)
        if not torch.isfinite(loss):
            raise self._diverged(f"the loss is {float(loss)}")
        if self.accelerator.sync_gradients:
            gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            if not math.isfinite(norm):
                raise self._diverged(f"the norm of the gradient is {norm}")
        return loss

    def _get_train_sampler(self, *given: Any) -> Sampler | None:
        # The windows are drawn at random, and stand in their order.
        return SequentialSampler(self.train_dataset)

    def _diverged(self, found: str) -> InputError:
        last = states.last(Path(self.args.output_dir))
        [(step, windows)] = self._batch.items()
        return InputError(
            message(
                "The training has diverged, and was stopped before this step changed a weight.",
                {
                    "found": found,
                    "step": f"{step + 1} of {self.state.max_steps}",
                    "batch": f"windows {', '.join(map(str, windows))} of the text",
                    "kept": f"the state after step {states.step(last)}, {last}" if last else "no state yet",
                },
                fix=f"a rate below {self.recipe.rate:g}, in a new output folder",
            )
        )


class _Stop(TrainerCallback):
    """Ends the training after the step that is running, once asked."""

    asked = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        asked = self.asked
        if torch.distributed.is_initialized():
            # All ranks stop after the same step, whichever heard of it first.
            flag = torch.tensor(float(asked), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            asked = bool(flag)
        if asked:
            control.should_save = control.should_training_stop = True


class _Reporting(TrainerCallback):
    """Hands every logged loss on."""

    def __init__(self, windows: TrainingWindows, progress: Progress | None) -> None:
        self.windows, self.progress = windows, progress

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **options: Any,
    ) -> None:
        if self.progress is not None and logs and "loss" in logs:
            done, total = (
                self.windows.recipe.tokens(steps) for steps in (state.global_step, state.max_steps)
            )
            name = _LOSSES[self.windows.kind(state.global_step - 1)]
            self.progress(done, total, **{name: float(logs["loss"])})


class _Keeping(TrainerCallback):
    """Sees that there is room for a state before it is written, and marks it as whole after."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        if control.should_save and args.should_save:
            free = shutil.disk_usage(self.folder if self.folder.exists() else self.folder.parent).free
            if free < self.size:
                raise self.failed(f"it takes {size(self.size)}, and {size(free)} are free")

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        if torch.distributed.is_initialized():
            # What every process writes of its own belongs to the state.
            torch.distributed.barrier()
        if args.should_save:
            states.seal(self.folder / f"checkpoint-{state.global_step}")

    @property
    def fix(self) -> str:
        """What to do where a process is lost."""
        return f"longspan extend --resume --output {self.folder.parent}, under torchrun with as many processes or others"

    def kept(self) -> dict[str, str]:
        """Return what there is to go on from."""
        last = states.last(self.folder)
        return {"kept": f"the state after step {states.step(last)}" if last else "no state yet"}

    def failed(self, reason: str) -> InputError:
        """Return the error for a state that cannot be written."""
        return InputError(
            message(
                "The state of the training cannot be saved.",
                {"asked": str(self.folder), "because": reason} | self.kept(),
                fix=f"make room, then longspan extend --resume --output {self.folder.parent}",
            )
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
