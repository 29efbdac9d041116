"""Formula: the formula of a pattern read as a list of operations, with its sizes taken out.

A compiled kernel holds operations, and is handed sizes, positions and tables as tensors. So a window of 512 and one
of 4,096 are one kernel: patterns of equal operations are a family.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.pattern import Pattern

# One operation: its name, and where each argument is, by kind and number.
Operation = tuple[str, tuple[tuple[str, int], ...]]

_OPERATIONS: dict[str, Callable[..., Any]] = {
    "abs": torch.abs,
    "add": operator.add,
    "and": operator.and_,
    "bitwise_xor": operator.xor,
    "clamp": torch.minimum,
    "eq": operator.eq,
    "floordiv": operator.floordiv,
    "ge": operator.ge,
    "getitem": operator.getitem,
    "gt": operator.gt,
    "invert": operator.invert,
    "le": operator.le,
    "lt": operator.lt,
    "mul": operator.mul,
    "ne": operator.ne,
    "or": operator.or_,
    "remainder": operator.mod,
    "rshift": operator.rshift,
    "rsub": lambda number, taken: taken - number,
    "sub": operator.sub,
    "xor": operator.xor,
}
# Sums of two numbers below this stay within 32 bits, in which the kernels are fastest.
_SMALL = 1 << 30


class Unknown(Exception):
    """A formula does what is not in the list of operations; the message names it."""


@dataclass(frozen=True, eq=False)
class Formula:
    """What `contains(q, k)` of a pattern does.

    Attributes:
        operations: in order; the last one gives the answer.
        numbers: the sizes and other constants, in the order of their use.
        tables: the tensors that positions are looked up in.
    """

    operations: tuple[Operation, ...]
    numbers: tuple[int, ...]
    tables: tuple[Tensor, ...]

    @property
    def small(self) -> bool:
        """Whether integers of 32 bits hold everything that positions below 2 ** 30 give."""
        return all(abs(number) < _SMALL for number in self.numbers)


def formula(pattern: Pattern, device: torch.device) -> Formula:
    """Return the formula of a relation, with its tables on a device, or raise Unknown.

    Example:
        >>> from longspan.pattern import Window
        >>> read = formula(Window(512), torch.device("cpu"))
        >>> [name for name, _ in read.operations], read.numbers
        (['sub', 'abs', 'lt'], (512,))
    """
    tracer = _Tracer()
    start = torch.zeros((), dtype=torch.int64, device=device)
    q, k = (tracer.symbol(start) for _ in range(2))
    pattern.contains(q, k)
    return Formula(tuple(tracer.operations), tuple(tracer.numbers), tuple(tracer.tables))


def answer(
    operations: Sequence[Operation],
    q: Tensor,
    k: Tensor,
    number: Callable[[int], Tensor],
    tables: Sequence[Tensor],
) -> Tensor:
    """Do the operations at positions `q` and `k`, with constants as `number` gives them."""
    values = [q, k]
    for name, places in operations:
        arguments = [
            values[place] if kind == "value" else number(place) if kind == "number" else tables[place]
            for kind, place in places
        ]
        values.append(_OPERATIONS[name](*arguments))
    return values[-1]


class _Tracer:
    """Writes down what is done to symbols."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.numbers: list[int] = []
        self.tables: list[Tensor] = []
        self.symbols = 0

    def symbol(self, like: Tensor) -> _Symbol:
        made = like.detach().as_subclass(_Symbol)
        made.tracer, made.place = self, self.symbols
        self.symbols += 1
        return made

    def place(self, argument: Any) -> tuple[str, int]:
        if isinstance(argument, _Symbol):
            return "value", argument.place
        if isinstance(argument, Tensor):
            self.tables.append(argument)
            return "table", len(self.tables) - 1
        if isinstance(argument, int):
            self.numbers.append(argument)
            return "number", len(self.numbers) - 1
        raise Unknown(f"an argument of type {type(argument).__name__}")


class _Symbol(Tensor):
    """A position, or what was made of positions; its value means nothing."""

    tracer: _Tracer
    place: int

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, given: Any = (), options: dict[str, Any] | None = None
    ) -> Any:
        name = function.__name__.strip("_")
        with torch._C.DisableTorchFunctionSubclass():
            if name == "get":
                # An attribute, such as the device that a table is wanted on.
                return function(*given)
            symbol = next(argument for argument in given if isinstance(argument, _Symbol))
            arguments = [*given, *(options or {}).values()]
            if name not in _OPERATIONS or (name == "clamp" and list(options or {}) != ["max"]):
                raise Unknown(name)
            tracer = symbol.tracer
            tracer.operations.append((name, tuple(map(tracer.place, arguments))))
            return tracer.symbol(torch.zeros((), dtype=torch.int64, device=symbol.device))
