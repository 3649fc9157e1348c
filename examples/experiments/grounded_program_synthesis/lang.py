"""A small language of functions on lists, e.g. ``reverse(add_n([1, 2], 3))``: interpreter and source of programs.

Programs come from a language model, so they are parsed and interpreted here and never handed to Python.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable
from dataclasses import dataclass

Value = int | float | list

ON_LISTS: dict[str, Callable[[list], Value]] = {
    "reverse": lambda xs: xs[::-1],
    "sort_asc": sorted,
    "sort_des": lambda xs: sorted(xs, reverse=True),
    "expand_copy": lambda xs: xs + xs,
    "minimum": min,
    "maximum": max,
}
"""Functions of a list."""
WITH_NUMBER: dict[str, Callable[[list, int], list]] = {
    "take": lambda xs, n: xs[:n],
    "drop": lambda xs, n: xs[n:],
    "add_n": lambda xs, n: [x + n for x in xs],
    "sub_n": lambda xs, n: [x - n for x in xs],
    "mul_n": lambda xs, n: [x * n for x in xs],
    "div_n": lambda xs, n: [x / n for x in xs],
}
"""Functions of a list and a number."""
MAX_ITEMS = 1000
MAX_TEXT = 2000


class ProgramError(ValueError):
    """A text is no program of the language, or the program fails."""


def run(program: str) -> Value:
    """The value of a program.

    Raises:
        ProgramError: it does not parse, names what is not there, has arguments of the wrong kind, or grows too large.
    """
    if len(program) > MAX_TEXT:
        raise ProgramError(f"A program has at most {MAX_TEXT} characters")
    try:
        return _value(ast.parse(program.strip(), mode="eval").body)
    except ProgramError:
        raise
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ProgramError(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True, slots=True)
class Example:
    """A task and a program that solves it."""

    input: list
    output: Value
    program: str

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        return f"Input: {self.input} Output: {self.output} Function:"


def examples(count: int, seed: int = 0, max_depth: int = 5) -> list[Example]:
    """Random tasks whose output is a list with something in it."""
    draw = random.Random(seed)
    found: list[Example] = []
    while len(found) < count:
        start = [draw.randint(-5, 5) for _ in range(draw.randint(2, 6))]
        program = str(start)
        for _ in range(draw.randint(1, max_depth)):
            program = _wrapped(program, draw)
        output = run(program)
        if output:
            found.append(Example(start, output, program))
    return found


def _wrapped(program: str, draw: random.Random) -> str:
    """The program with one more function around it."""
    name = draw.choice(["take", "drop", "reverse", "sort_asc", "sort_des", "add_n", "sub_n", "mul_n", "expand_copy"])
    if name in ON_LISTS:
        return f"{name}({program})"
    number = draw.randint(1, 4) if name in ("take", "drop") else draw.choice([-5, -4, -3, -2, -1, 1, 2, 3, 4, 5])
    return f"{name}({program},{number})"


def _value(node: ast.expr) -> Value:
    if isinstance(node, ast.List):
        return [_number(item) for item in node.elts]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _bounded(_called(node.func.id, node.args))
    return _number(node)


def _called(name: str, arguments: list[ast.expr]) -> Value:
    if name in ON_LISTS and len(arguments) == 1:
        return ON_LISTS[name](_list(arguments[0]))
    if name in WITH_NUMBER and len(arguments) == 2:
        return WITH_NUMBER[name](_list(arguments[0]), _number(arguments[1]))
    raise ProgramError(f"There is no function {name} of {len(arguments)} arguments")


def _list(node: ast.expr) -> list:
    value = _value(node)
    if not isinstance(value, list):
        raise ProgramError(f"Not a list: {value}")
    return value


def _number(node: ast.expr) -> int:
    sign, inner = (-1, node.operand) if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else (1, node)
    if not isinstance(inner, ast.Constant) or type(inner.value) is not int:
        raise ProgramError(f"Not a whole number: {ast.unparse(node)}")
    return sign * inner.value


def _bounded(value: Value) -> Value:
    """Programs may double a list at every step; none may eat the machine."""
    if isinstance(value, list) and (len(value) > MAX_ITEMS or any(abs(x) > 1e100 for x in value)):
        raise ProgramError("The value is too large")
    return value
