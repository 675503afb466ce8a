"""docs/models.md from the table of models: ``python -m tests.zoo.table`` writes it, a test compares it."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.zoo.models import CASES, Case
from tests.zoo.refused import REFUSALS

PLACE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# Models that were tried

    make zoo                          # models and torch's functions, seven minutes on two cores; nothing is downloaded
    python -m tests.zoo.table         # writes this page from the tables of tests/zoo

Each model is made of a small configuration with random weights, in train mode and float64, three samples. BP, Loss
IBP (norm 1 in the paper's semantics, norm 2 in exact ones), Tangent BP (norm 2, two tangents, both semantics) and
Fast AT agree with the autograd oracle `ibp_triton.reference` to 1e-9 of the largest entry of the gradient; the
oracle's exact Loss IBP agrees with `create_graph=True` as closely, and with finite differences of the objective along
a random direction of all parameters to 1e-5, at the best of the steps 1e-4 … 1e-7. After a step, buffers and random
numbers are what a plain forward pass leaves. No function with a rule of its own went through the generic rule. The
oracle computes `F.hardsigmoid` as `relu6(a + 3) / 6`: torch has no second derivative of it.

**Functions of torch's.** Around each function of torch's own table of operators, on the table's samples in float64,
exact Loss IBP (norm 2) agrees with `create_graph=True` to 1e-7, and Tangent BP along two tangents with its two
parts, where the function's other tensors are constants, parameters or activations, and wherever torch has a second
derivative. `as_strided_scatter` is left out, whose reverse mode is wrong in torch. A function of which forward mode
is not reverse mode's adjoint (zero for `torch.library.custom_op`, wrong for `scatter_reduce` of products, other for
one triangle of a matrix) is found out at its first step, and reverse mode is taken twice instead.

{counts}

| model | x | called with | remarks |
|---|---|---|---|
{rows}

# What is refused

A message says what to do instead. The tests provoke each of these.

| what | message |
|---|---|
{refusals}
"""


def page() -> str:
    """The page as it should be."""
    families = list(dict.fromkeys(case.family for case in CASES))
    numbers = ", ".join(f"{sum(case.family == f for case in CASES)} {_whose(f)}" for f in families)
    return HEAD.format(
        counts=f"{len(CASES)} models: {numbers}.",
        rows="\n".join(map(_row, CASES)),
        refusals="\n".join(f"| {r.what} | {_cell(r.message())} |" for r in REFUSALS),
    )


def _whose(family: str) -> str:
    return {"own": "of our own writing", "einops": "in the idiom of einops"}.get(family, f"of {family}")


def _row(case: Case) -> str:
    extra = ", ".join([*(f"x={v!r}" for v in case.network.values()), *(f"extra {name}" for name in case.extra())])
    remarks = [f"{case.single}: compared to {case.tolerance:g}, no finite differences"] if case.single else []
    remarks += [f"{case.sloped}: no finite differences"] if case.sloped else []
    return f"| {case.title} | {'×'.join(map(str, case.shape))} | {extra or '–'} | {'; '.join(remarks) or '–'} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PLACE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PLACE} written\n")
