"""The device that a model runs on."""

from __future__ import annotations

import torch

from longspan.errors import InputError, message


def device(asked: str | None) -> torch.device:
    """Return the device asked for, by default the first CUDA device where there is one, else the CPU.

    Raises:
        InputError: there is no such device here.

    Example:
        >>> device("cpu")
        device(type='cpu')
    """
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(asked)
        torch.zeros(1, device=found)
    # What an unknown name, a missing driver and a number too high raise differs by build and device.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            message(
                "There is no such device.",
                {"asked": f"the device {asked!r}", "because": str(error).splitlines()[0]},
                fix="cpu"
                + (
                    f", or cuda:0 to cuda:{torch.cuda.device_count() - 1}"
                    if torch.cuda.is_available()
                    else ""
                ),
            )
        ) from error
    return found
