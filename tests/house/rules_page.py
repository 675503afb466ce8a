"""docs/rules.md from the table of rules and their docstrings: ``python -m tests.house.rules_page`` writes it."""

from __future__ import annotations

import ast
import inspect
import operator
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ibp_triton.backends.torch import rules
from ibp_triton.backends.torch.pointwise import Pointwise
from ibp_triton.layer import Layer

PLACE = Path(__file__).parents[2] / "docs" / "rules.md"
PLACES = (
    ("F.", F),
    ("torch.", torch),
    ("torch.linalg.", torch.linalg),
    ("Tensor.", torch.Tensor),
    ("operator.", operator),
)
HEAD = """# Rules of the torch backend

    python -m tests.house.rules_page      # writes this page from ibp_triton/backends/torch/rules.py and the docstrings

Every torch function that a model calls is one layer. The functions below have a rule of their own; any other
differentiable function goes through the generic rule, by torch's own autograd: right, and dearer. Where several rules
have a function, the first whose conditions hold takes the call. a is the input, d a derivative, t a tangent, u and v
are sides, σ is a function of single numbers; *vjp* is the reverse sweep, *jvp* the linear one, *curvature* what exact
semantics need besides (– where it is zero). *Keeps* are the attributes that the first sweep leaves for the others:
tensors, sizes and settings. A rule costs, per sweep, the multiply-adds of the last column; – stands for a pass over the
numbers without any product of matrices.

| rule | functions | vjp | jvp | curvature | keeps | multiply-adds |
|---|---|---|---|---|---|---|
{rows}
"""


def page() -> str:
    """The page as it should be."""
    return HEAD.format(rows="\n".join(_row(rule, functions) for rule, functions in rules._FUNCTIONS.items()))


def _row(rule: type[Layer], functions: tuple[Any, ...]) -> str:
    cells = [
        f"**{rule.__name__}**: {_doc(rule)}",
        ", ".join(f"`{name}`" for name in dict.fromkeys(map(_name, functions))),
        _method(rule, ("pull", "input_vjp", "vjp")),
        _method(rule, ("push", "jvp")),
        "–" if getattr(rule, "bend", None) is Pointwise.bend else _method(rule, ("curvature",)),
        ", ".join(f"`{name}`" for name in sorted(set(_kept(rule, "forward", set())))) or "–",
        _method(rule, ("multiply_adds",)),
    ]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _doc(of: Any) -> str:
    """The first paragraph and what else of mathematics stands there, on one line."""
    return " ".join((inspect.getdoc(of) or "").split())


def _name(function: Any) -> str:
    for prefix, place in PLACES:
        for name, value in vars(place).items() if inspect.ismodule(place) else ():
            if value is function:
                return f"{prefix}{name}"
    for name in dir(torch.Tensor):
        attribute = getattr(torch.Tensor, name)
        if attribute == function or getattr(attribute, "__get__", None) == function:
            return f"Tensor.{name}"
    return str(getattr(function, "__name__", function))


def _method(rule: type[Layer], names: tuple[str, ...]) -> str:
    """The docstring of the first of these that the rule has and says something of its own."""
    for name in names:
        method = getattr(rule, name, None)
        if method is not None and method is not getattr(Layer, name, None) and not _abstract(method):
            return _doc(method)
    return "–"


def _abstract(method: Any) -> bool:
    return "raise NotImplementedError" in inspect.getsource(method)


def _kept(rule: type[Layer], name: str, done: set[Any]) -> Iterator[str]:
    """The attributes that a method sets, or the methods that it calls."""
    method = getattr(rule, name, None)
    if not inspect.isfunction(method) or method in done:
        return
    done.add(method)
    for owner in (cls for cls in rule.__mro__ if name in vars(cls)):
        yield from _set_in(rule, vars(owner)[name], done)
        if f"super().{name}" not in inspect.getsource(vars(owner)[name]):
            return


def _set_in(rule: type[Layer], method: Any, done: set[Any]) -> Iterator[str]:
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method)))):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name) or node.value.id != "self":
            continue
        if isinstance(node.ctx, ast.Store):
            yield node.attr
        else:
            yield from _kept(rule, node.attr, done)


if __name__ == "__main__":
    PLACE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PLACE} written\n")
