"""Expressions: a frequency read from text, as on a command line. The text is parsed, never run."""

from __future__ import annotations

import ast
import difflib
import inspect

from longspan.errors import InputError, message
from longspan.frequency.base import Frequency, Plain
from longspan.frequency.factors import LongRoPE
from longspan.frequency.interpolation import NTK, DynamicNTK, Linear
from longspan.frequency.parts import Llama3, NTKByParts, YaRN

FREQUENCIES: dict[str, type[Frequency]] = {
    kind.__name__: kind for kind in (Plain, Linear, NTK, DynamicNTK, NTKByParts, YaRN, LongRoPE, Llama3)
}


def parse(text: str, *, theta: float = 10000.0, share: float = 1.0) -> Frequency:
    """Read a frequency from text.

    Law: `parse(str(frequency)) == frequency`.

    Args:
        text: the name of a frequency, called with literal arguments.
        theta, share: those of the model, where the text does not say others.

    Raises:
        InputError: text that is no such call, or whose arguments are out of range.

    Example:
        >>> parse("Linear(4)", theta=500.0)
        Linear(theta=500.0, share=1.0, factor=4)
        >>> parse("LongRoPE([1, 2], [1, 4], original=512, factor=8)").long
        (1, 4)
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _refusal(text, f"it is no expression: {getattr(error, 'msg', error)}") from None
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise _refusal(text, "it is no call of a frequency's name")
    name = node.func.id
    if name not in FREQUENCIES:
        close = difflib.get_close_matches(name, FREQUENCIES, n=1, cutoff=0.0)[0]
        known = ", ".join(sorted(FREQUENCIES))
        raise _refusal(text, f"there is no frequency called {name}, but {known}", fix=f"{close}(...)")
    kind = FREQUENCIES[name]
    try:
        arguments = [ast.literal_eval(argument) for argument in node.args]
        given = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    except (ValueError, TypeError):
        raise _refusal(text, "its arguments are no numbers, texts or lists of them") from None
    signature = inspect.signature(kind)
    try:
        signature.bind(*arguments, **given)
    except TypeError as error:
        takes = ", ".join(signature.parameters)
        raise _refusal(text, f"{name}: {error}; it takes {takes}", fix=f"{name}(...)") from None
    return kind(*arguments, **{"theta": theta, "share": share} | given)


def _refusal(text: str, why: str, *, fix: str = '"YaRN(8, original=4096)", for example') -> InputError:
    return InputError(message("This text is no frequency.", {"asked": text, "wrong": why}, fix=fix))
