"""The loader: which ranks are given the same batches."""

from __future__ import annotations

from typing import Any

from accelerate.data_loader import BatchSamplerShard

from longspan.errors import InputError, message


def share_batches(loader: Any, ranks: int) -> Any:
    """Let every `ranks` neighbouring processes draw the same batches from a loader that accelerate has prepared.

    Accelerate and the Trainer give every process batches of its own. Processes that share each text
    (`sequence_parallel`) need the same ones: those of a row of `init_device_mesh(kind, (-1, ranks))`.

    Args:
        loader: what `accelerator.prepare(loader)` or `Trainer.get_train_dataloader()` returned; changed in place.
        ranks: processes that share each text, 1 or more.

    Returns:
        The loader.

    Raises:
        InputError: processes that cannot be divided so, or a loader whose batches are not drawn by their number.

    Example:
        >>> class Longer(Trainer):  # doctest: +SKIP
        ...     def get_train_dataloader(self):
        ...         return share_batches(super().get_train_dataloader(), ranks=8)
    """
    sampler = getattr(loader, "batch_sampler", None)
    if ranks == 1:
        return loader
    if not isinstance(sampler, BatchSamplerShard) or sampler.split_batches:
        raise _refused(
            ranks,
            f"{type(sampler).__name__} does not deal out whole batches to processes",
            "a map-style dataset",
        )
    if ranks < 1 or sampler.num_processes % ranks:
        raise _refused(
            ranks,
            f"there are {sampler.num_processes} processes",
            "a number that divides that of the processes",
        )
    sampler.num_processes //= ranks
    sampler.process_index //= ranks
    return loader


def _refused(ranks: int, why: str, fix: str) -> InputError:
    return InputError(
        message(
            "These processes cannot be given the same batches.",
            {"asked": f"share_batches(loader, {ranks})", "why": why},
            fix=fix,
        )
    )
