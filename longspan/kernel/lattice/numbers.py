"""Numbers in words: heads and lists, as a plan shows them."""

from __future__ import annotations


def listed(numbers: list[int]) -> str:
    """Write numbers as in a sentence."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} and {last}" if others else last


def named(numbers: range) -> str:
    """Name some heads.

    Example:
        >>> named(range(3, 4)), named(range(8)), named(range(1, 8, 2)), named(range(0, 2))
        ('head 3', 'heads 0 to 7', 'heads 1, 3 ... 7', 'heads 0 and 1')
    """
    if len(numbers) < 3:
        return f"head{'s' * (len(numbers) > 1)} {listed(list(numbers))}"
    if numbers.step == 1:
        return f"heads {numbers[0]} to {numbers[-1]}"
    return f"heads {numbers[0]}, {numbers[1]} ... {numbers[-1]}"
