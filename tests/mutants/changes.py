"""The mutants of a file: one expression or statement changed.

Operators, numbers, conditions and calls for their effect; no strings, annotations, decorators, assertions or errors,
nor the ``strict`` of a zip, which is an assertion.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAIRS = "Add Sub, Mult Div, And Or, Lt LtE, Gt GtE, Eq NotEq, Is IsNot, In NotIn"
SWAPS = {a: b for pair in PAIRS.split(", ") for a, b in (pair.split(), pair.split()[::-1])}
SWAPS |= {"FloorDiv": "Div", "Mod": "Mult", "Pow": "Mult"}
NOT_COMPUTED = ("annotation", "returns", "decorator_list", "bases")
KEPT = (ast.Assert, ast.Raise, ast.JoinedStr)


@dataclass(frozen=True)
class Mutant:
    """A file of the package with the bytes from `start` to `end` replaced by `new`."""

    path: str
    start: int
    end: int
    new: str

    @property
    def text(self) -> str:
        """The changed file."""
        old = (ROOT / self.path).read_bytes()
        return (old[: self.start] + self.new.encode() + old[self.end :]).decode()

    @property
    def key(self) -> str:
        """What its outcome is known by."""
        return f"{self.path}:{hashlib.sha256(self.text.encode()).hexdigest()[:16]}"

    def rank(self, seed: int) -> str:
        """Where it stands in a random order that an edit elsewhere in the file, or of another file, leaves alone."""
        return hashlib.sha256(f"{seed} {self.path} {self.diff.partition(chr(10))[2]}".encode()).hexdigest()

    @property
    def diff(self) -> str:
        """The changed lines."""
        old = (ROOT / self.path).read_text(encoding="utf-8").splitlines()
        return "\n".join(list(difflib.unified_diff(old, self.text.splitlines(), n=0, lineterm=""))[2:])

    @property
    def change(self) -> str:
        """The changed lines without where they are."""
        return "\n".join(line for line in self.diff.splitlines() if not line.startswith("@@"))


def mutants(path: str) -> Iterator[Mutant]:
    """Every mutant of a file."""
    source = (ROOT / path).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in _inside(ast.parse(source)):
        for new in _changes(node):
            start = starts[node.lineno - 1] + node.col_offset
            yield Mutant(path, start, starts[node.end_lineno - 1] + node.end_col_offset, new)


def _inside(node: ast.AST) -> Iterator[Any]:
    """The nodes under this one that compute something."""
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            kept = isinstance(child, KEPT) or (isinstance(child, ast.keyword) and child.arg == "strict")
            if isinstance(child, ast.AST) and name not in NOT_COMPUTED and not kept:
                yield child
                yield from _inside(child)


def _changes(node: ast.AST) -> Iterator[str]:
    """What may stand in the place of a node instead."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and (other := _swapped(node.op)):
        yield _written(node, op=other)
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield _written(node, ops=[*node.ops[:i], _swapped(op), *node.ops[i + 1 :]])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield repr(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield repr(node.value + 1)
    elif isinstance(node, ast.IfExp):
        yield _written(node, body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "pass"


def _swapped(op: ast.AST) -> Any:
    other = SWAPS.get(type(op).__name__)
    return getattr(ast, other)() if other else None


def _written(node: ast.AST, **changed: Any) -> str:
    text = ast.unparse(type(node)(**{**dict(ast.iter_fields(node)), **changed}))
    return text if isinstance(node, ast.stmt) else f"({text})"
