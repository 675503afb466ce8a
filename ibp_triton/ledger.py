"""What a network costs: multiply-adds of each sweep, layer by layer, and the summary that shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

from torch import Tensor

from ibp_triton.backends.torch.generic import Generic
from ibp_triton.forward import Trace


@dataclass(frozen=True)
class MultiplyAdds:
    """Multiply-adds of one batch: forward; vjp to the input, and without the first layer's; jvp to the logits, and
    without the last layer's; weight gradients of the trainable layers."""

    forward: int
    vjp: int
    vjp_inner: int
    jvp: int
    jvp_inner: int
    weights: int


@dataclass(frozen=True)
class Row:
    """One node: where it is in the model, its rule, output shape and multiply-adds of each sweep."""

    where: str
    label: str
    rule: str
    shape: tuple[int, ...]
    work: MultiplyAdds
    unseen: bool = False  # a function of unknown work, counted as none


def rows(trace: Trace) -> list[Row]:
    """The nodes of one forward pass that depend on x."""
    plan, result = trace.plan, []
    for node, layer, value in zip(trace.graph.nodes, trace.layers, trace.values, strict=True):
        if layer is None or node.kind != "active":
            continue
        macs, index = layer.multiply_adds(), node.index
        moves, outer, inner = bool(plan.wants[False][index]), plan.needs[True][index], plan.needs[False][index]
        work = MultiplyAdds(macs, macs, macs * moves, macs * outer, macs * inner, macs * plan.takes[index])
        rule = "generic" if isinstance(layer, Generic) else type(layer).__name__
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        unseen = isinstance(layer, Generic) and layer.unseen and not layer.watched
        result.append(Row(node.where or "(root)", node.label, rule, shape, work, unseen))
    return result


def total(table: Iterable[Row]) -> MultiplyAdds:
    """The sums over a table."""
    work = [astuple(row.work) for row in table]
    return MultiplyAdds(*map(sum, zip(*work, strict=True))) if work else MultiplyAdds(0, 0, 0, 0, 0, 0)


def summary(table: Sequence[Row]) -> str:
    """Nodes, rules and multiply-adds (forward, vjp, jvp, weight gradient) as text."""
    sums = total(table)
    lines = [_line("module", "operation", "rule", "output", "forward", "vjp", "jvp", "weights")]
    for row in table:
        lines.append(_line(row.where, row.label, row.rule, "×".join(map(str, row.shape)), *_numbers(row.work)))
    lines.append(_line("multiply-adds", "", "", "", *_numbers(sums)))
    first, last = sums.vjp - sums.vjp_inner, sums.jvp - sums.jvp_inner
    lines.append(f"BP skips {first:,} of the vjp (first layer), Loss IBP {last:,} of the jvp (last layer)")
    unseen = dict.fromkeys(row.label for row in table if row.unseen)
    if unseen:
        lines.append(f"not counted, their work being unknown: {', '.join(unseen)}")
    whole = dict.fromkeys(row.label for row in table if row.rule == "generic")
    if whole:
        lines.append(f"without a rule of their own, by torch's autograd at its price: {', '.join(whole)}")
    return "\n".join(lines)


def _numbers(work: MultiplyAdds) -> list[str]:
    return [f"{n:,}" for n in (work.forward, work.vjp, work.jvp, work.weights)]


def _line(where: str, label: str, rule: str, shape: str, *numbers: str) -> str:
    return f"{where:24} {label:18} {rule:14} {shape:>18}" + "".join(f" {n:>14}" for n in numbers)
