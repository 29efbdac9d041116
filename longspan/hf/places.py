"""Places: a model's positions counted from a base that moves along with a text, as long as they are asked for."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.errors import PlanError, message
from longspan.frequency import Frequency
from longspan.rope import displacement

# Distances that turns are found for at a time.
_AT_ONCE = 64


class Places:
    """How a model turns keys, and hooks that let it count positions as a cache says.

    Caches that go their own ways from one text share this, and so do copies.

    Args:
        frequency: which the model turns with.
        rotaries: its modules that turn.
        owners: the modules that these belong to, which are told of the cache.
    """

    def __init__(
        self, frequency: Frequency, rotaries: Iterable[nn.Module], owners: Iterable[nn.Module]
    ) -> None:
        self.frequency = frequency
        # Weak, as a cache that outlives its model shall not hold its weights.
        self._rotaries, self._owners = weakref.WeakSet(rotaries), weakref.WeakSet(owners)
        self._hooks: list[Any] = []
        self._entered, self._first = 0, 0
        self._turns: tuple[Any, list[tuple[Tensor, Tensor]]] | None = None

    def __deepcopy__(self, memory: dict[int, Any]) -> Self:
        return self

    @property
    def open(self) -> bool:
        """Whether the model counts so now."""
        return self._entered > 0

    def enter(self) -> None:
        """Let the model count so, as often as this is called."""
        if not self._entered:
            self._hooks = [
                rotary.register_forward_pre_hook(self._count, with_kwargs=True) for rotary in self._rotaries
            ]
            self._hooks += [
                owner.register_forward_pre_hook(self._begin, with_kwargs=True) for owner in self._owners
            ]
        self._entered += 1

    def leave(self) -> None:
        """Let it count as before, once this was called as often."""
        self._entered -= 1
        if not self._entered:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def turn(self, distance: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine `[width]` of a turn by so many tokens; found for many distances at a time."""
        block, place = divmod(distance, _AT_ONCE)
        asked = (block, like.shape[3], like.dtype, like.device)
        if self._turns is None or self._turns[0] != asked:
            distances = torch.arange(block * _AT_ONCE, (block + 1) * _AT_ONCE, device=like.device)
            found = displacement(distances, self.frequency, width=like.shape[3])
            exact = torch.promote_types(like.dtype, torch.float32)
            rest = like.shape[3] - 2 * found.cos.shape[-1]
            cos, sin = (F.pad(side.to(exact).repeat(1, 2), (0, rest)) for side in (found.cos, found.sin))
            cos[:, like.shape[3] - rest :] = 1
            self._turns = asked, list(zip(cos, sin, strict=True))
        return self._turns[1][place]

    def _begin(self, module: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        cache = options.get("past_key_values")
        if getattr(cache, "places", None) is not self:
            raise PlanError(
                message(
                    "Inside `with`, this model reads through its StreamCache alone.",
                    {"why": "its positions are counted from a base that no other cache knows of"},
                    fix="past_key_values=cache, or leave the `with` first",
                )
            )
        self._first = cache.begin()

    def _count(
        self, module: nn.Module, given: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Count from the base: integer tensors are the positions that a rotary module is asked for."""

        def counted(item: Any) -> Any:
            if not isinstance(item, Tensor) or item.is_floating_point():
                return item
            end = self._first + item.shape[-1]
            return torch.arange(self._first, end, dtype=item.dtype, device=item.device).expand(item.shape)

        return tuple(map(counted, given)), {name: counted(item) for name, item in options.items()}
