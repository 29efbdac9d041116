"""Expressions: a pattern read from text, as on a command line. The text is parsed, never run."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass

from longspan.errors import PatternError, message
from longspan.pattern import atoms, bigbird, choice, headwise, listing, named, neighborhood, shifted, sparse
from longspan.pattern.base import Pattern, PerHead

_OPERATORS: dict[type, Callable[[Pattern, Pattern], Pattern]] = {
    ast.BitAnd: lambda a, b: a & b,
    ast.BitOr: lambda a, b: a | b,
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
}

_MODULES = (atoms, listing, choice, named, headwise, shifted, sparse, bigbird, neighborhood)

PATTERNS: Mapping[str, type[Pattern]] = {
    kind.__name__: kind
    for module in _MODULES
    for kind in vars(module).values()
    # Their bases have no fields of their own and are no patterns.
    if isinstance(kind, type) and issubclass(kind, Pattern) and kind.__module__ == module.__name__
    if is_dataclass(kind)
} | {"PerHead": PerHead}


def parse(text: str) -> Pattern:
    """Read a pattern from text.

    Law: `parse(str(pattern)) == pattern`.

    Args:
        text: calls of pattern names with literal arguments, joined by `& | + - ~`, `.T` and parentheses.

    Raises:
        PatternError: text that is no expression of patterns, with the nearest known name where a name is wrong.

    Example:
        >>> parse("Causal() & (Window(512) | Sink(4))")
        Causal() & (Window(512) | Sink(4))
        >>> parse("LongMixed(1024, dilation=4)")
        LongMixed(1024, dilation=4)
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return _Reader(text).pattern(tree.body)
    except (SyntaxError, ValueError) as error:
        raise _refusal(text, f"it is no expression: {getattr(error, 'msg', error)}") from None
    except (RecursionError, MemoryError):
        raise _refusal(f"{text[:60]}...", "it is nested too deeply") from None


class _Reader:
    """Turns the syntax tree of one text into a pattern."""

    def __init__(self, text: str) -> None:
        self.text = text

    def pattern(self, node: ast.expr) -> Pattern:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](self.pattern(node.left), self.pattern(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
            return ~self.pattern(node.operand)
        if isinstance(node, ast.Attribute) and node.attr == "T":
            return self.pattern(node.value).T
        if isinstance(node, ast.Name):
            self._known(node.id)
            raise _refusal(self.text, f"{node.id} needs parentheses", fix=f"{node.id}(...)")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self._call(node.func.id, node)
        raise _refusal(self.text, f"`{ast.unparse(node)}` is no pattern")

    def _call(self, name: str, node: ast.Call) -> Pattern:
        kind = self._known(name)
        accepted = list(inspect.signature(kind).parameters)
        for number, keyword in enumerate(node.keywords):
            if keyword.arg in [before.arg for before in node.keywords[:number]]:
                raise _refusal(self.text, f"{name} is given `{keyword.arg}` twice", fix="once")
            if keyword.arg not in accepted:
                close = difflib.get_close_matches(str(keyword.arg), accepted, n=1, cutoff=0.0)
                takes = ", ".join(accepted) or "nothing"
                raise _refusal(
                    self.text,
                    f"{name} has no argument `{keyword.arg}`; it takes {takes}",
                    fix=f"{name}({close[0]}=...)" if close else f"{name}()",
                )
        arguments = [self._argument(argument) for argument in node.args]
        options = {str(keyword.arg): self._argument(keyword.value) for keyword in node.keywords}
        try:
            inspect.signature(kind).bind(*arguments, **options)
        except TypeError as error:
            raise _refusal(
                self.text, f"{name}: {error}", fix=f"{name}{inspect.signature(kind)}".replace(" -> None", "")
            ) from None
        return kind(*arguments, **options)

    def _argument(self, node: ast.expr) -> object:
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError):
            if isinstance(node, ast.List):
                return [self.pattern(item) for item in node.elts]
            raise _refusal(self.text, f"`{ast.unparse(node)}` is no number, text or list of them") from None

    def _known(self, name: str) -> type[Pattern]:
        if name not in PATTERNS:
            close = difflib.get_close_matches(name, PATTERNS, n=1)
            raise PatternError(
                message(
                    f"There is no pattern called {name}.",
                    {"asked": self.text, "known": ", ".join(sorted(PATTERNS))},
                    fix=f"{close[0]}" if close else "one of the known names",
                )
            )
        return PATTERNS[name]


def _refusal(text: str, why: str, *, fix: str = '"Causal() & Window(512)", for example') -> PatternError:
    return PatternError(message("This text is no pattern.", {"asked": text, "wrong": why}, fix=fix))
