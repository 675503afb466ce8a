"""How a pass runs: reverse, linear and curvature sweeps over a trace, and the weight gradients.

Sweeps are pure functions of tensors. What a sweep saves belongs to its Trace and is never overwritten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ibp_triton.graph import Node
from ibp_triton.rules import Bilinear, Layer, Pieces, Product
from ibp_triton.trace import Trace

Sweep = list[Any]  # a derivative or tangent for each node, None where there is none


def reverse(trace: Trace, d: Tensor | None, *, to_input: bool, bends: Sequence[tuple[Sweep, Sweep]] = ()) -> Sweep:
    """Second pass: δ_{i−1} = f~_i(δ_i) from δ_K = ``d`` [N, M] or [T, N, M].

    Args:
        trace: the forward pass whose masks and values are used.
        d: the derivative of the output.
        to_input: whether the input's own derivative is wanted; without it the first layer's vjp is skipped.
        bends: pairs (reverse sweep r, linear sweep t); each adds curvature_i(r_i, t_{i−1}) to δ_{i−1}.

    Returns:
        A derivative for each active node, None where none is needed.
    """
    graph = trace.graph
    sweep: Sweep = [None] * len(graph.nodes)
    sweep[graph.output] = d
    for node in reversed(graph.nodes):
        layer = trace.layers[node.index]
        if layer is None or node.kind != "active":
            continue
        wanted = [n for n, i in node.operands.items() if _wants(trace, i, to_input)]
        if wanted and sweep[node.index] is not None:
            _receive(trace, node, sweep, layer.vjp(sweep[node.index], wanted))
        for r, t in bends if wanted else ():
            tangents = _tangents_of(node, t)
            if r[node.index] is not None and tangents:
                _receive(trace, node, sweep, layer.curvature(r[node.index], tangents, wanted))
    return sweep


def _wants(trace: Trace, index: int, to_input: bool) -> bool:
    if trace.graph.nodes[index].kind != "active" or not _differentiable(trace.values[index]):
        return False
    return to_input or trace.moves[index]


def _differentiable(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.is_floating_point()


def _receive(trace: Trace, node: Node, sweep: Sweep, parts: Mapping[str, Any]) -> None:
    for name, part in parts.items():
        index = node.operands[name]
        sweep[index] = _sum(sweep[index], part)


def _sum(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, Pieces):
        return Pieces({k: _sum(a.get(k), b.get(k)) for k in {**a, **b}})
    return a + b


def linear_sweep(trace: Trace, t: Tensor, *, to_output: bool) -> Sweep:
    """Third pass: t_i = f~~_i(t_{i−1}) from t_0 = ``t`` [N, ...] or [T, N, ...], no biases, the first pass's masks.

    Without ``to_output`` layers after the last trainable one are skipped, and the last one's own jvp is.
    """
    graph = trace.graph
    needed = trace.tangents_needed(to_output)
    sweep: Sweep = [None] * len(graph.nodes)
    sweep[graph.input] = t
    for node in graph.nodes:
        layer = trace.layers[node.index]
        if layer is None or node.kind != "active" or not needed[node.index]:
            continue
        tangents = _tangents_of(node, sweep)
        if tangents and _differentiable(trace.values[node.index]):
            sweep[node.index] = layer.jvp(tangents)
    return sweep


def _tangents_of(node: Node, sweep: Sweep) -> dict[str, Any]:
    return {name: sweep[i] for name, i in node.operands.items() if sweep[i] is not None}


@dataclass(eq=False)
class Term:
    """coefficient · g(left, right): the weight gradient of a sweep.

    Without ``tangents`` the left side is the trace's activations (biases included); with them it is the linear sweep,
    and the term is ∇_w ⟨right_i, Df_i(a; w)[t]⟩ for every layer.
    """

    coefficient: Any
    trace: Trace
    right: Sweep
    tangents: Sweep | None = None


def weight_gradients(terms: Sequence[Term], batch: int, exact: bool = False) -> dict[str, Tensor]:
    """Sum of the terms divided by ``batch``: {parameter name: gradient}, of each trainable parameter in the graph.

    An ordinary and a tangent term of one trace that share their right side merge into g(a + βt, d) where a layer is
    bilinear and computes in float32 or float64; in lower precision a + βt would round the penalty away, and the two
    products are added in float32.
    """
    trace = terms[0].trace
    sums: dict[int, Tensor] = {}
    means: dict[int, Tensor] = {}  # of layers that add up and divide by themselves
    for node in reversed(trace.graph.nodes):
        layer = trace.layers[node.index]
        wanted = [n for n, i in node.operands.items() if trace.graph.nodes[i].kind == "parametric" and trace.moves[i]]
        if layer is None or not wanted:
            continue
        if node.kind == "parametric":
            if node.index in sums:
                _collect(sums, node, layer.vjp(_like(sums.pop(node.index), trace.values[node.index]), wanted), 1)
            continue
        if isinstance(layer, Bilinear) and layer.joint:
            for name, part in layer.joint_gradient(_products(terms, node), wanted, batch).items():
                index = node.operands[name]
                target, part = (means, part) if index in trace.graph.parameters else (sums, part * batch)
                target[index] = _sum(target.get(index), part)
            continue
        for term, partner in _pairs(terms, node, layer):
            _contribute(sums, node, wanted, term, partner, exact)
    means |= {i: _sum(means.get(i), sum_ / batch) for i, sum_ in sums.items()}
    means |= {i: torch.zeros_like(trace.values[i]) for i in trace.trainable if i not in means}
    return {trace.graph.parameters[i]: mean for i, mean in sorted(means.items())}


def _products(terms: Sequence[Term], node: Node) -> list[Product]:
    """What the terms ask of one bilinear layer."""
    products = []
    for term in terms:
        layer, right, t = term.trace.layers[node.index], term.right[node.index], term.tangents
        assert isinstance(layer, Bilinear)
        left = layer.input if t is None else t[node.operands["input"]]
        if left is not None and right is not None:
            products.append(Product(term.coefficient, left, right, t is None))
    return products


def _like(d: Any, value: Any) -> Any:
    """A derivative in the dtype of the value it belongs to."""
    if isinstance(d, Pieces):
        return Pieces({k: _like(v, value[k]) for k, v in d.items()})
    return d.to(value.dtype)


def _pairs(terms: Sequence[Term], node: Node, layer: Layer) -> list[tuple[Term, Term | None]]:
    """The terms, each ordinary one with the tangent term that merges with it."""
    pairs: list[tuple[Term, Term | None]] = []
    free = list(terms)
    for term in terms:
        if term not in free:
            continue
        free.remove(term)
        partner = next((other for other in free if _merges(term, other, node, layer)), None)
        if partner is not None:
            free.remove(partner)
        pairs.append((term, partner))
    return pairs


def _merges(term: Term, other: Term, node: Node, layer: Layer) -> bool:
    if not isinstance(layer, Bilinear) or term.tangents is not None or other.tangents is None:
        return False
    left = other.tangents[node.operands["input"]]
    same = term.trace is other.trace and term.right is other.right and left is not None
    return same and layer.input.dtype in (torch.float32, torch.float64) and left.dim() == layer.input.dim()


def _contribute(
    sums: dict[int, Tensor], node: Node, wanted: list[str], term: Term, partner: Term | None, exact: bool
) -> None:
    layer, right = term.trace.layers[node.index], term.right[node.index]
    assert layer is not None
    if right is None:
        return
    if term.tangents is not None:
        tangents = _tangents_of(node, term.tangents)
        if tangents:
            _collect(sums, node, layer.tangent_param_vjp(tangents, right, wanted, exact), term.coefficient)
    elif partner is not None:
        assert isinstance(layer, Bilinear)
        assert partner.tangents is not None
        ratio = partner.coefficient if _is(term.coefficient, 1) else partner.coefficient / term.coefficient
        left = layer.input + ratio * partner.tangents[node.operands["input"]]
        _collect(sums, node, layer.param_vjp(left, right, wanted), term.coefficient)
    else:
        _collect(sums, node, layer.vjp(right, wanted), term.coefficient)


def _collect(sums: dict[int, Tensor], node: Node, parts: Mapping[str, Tensor], coefficient: Any) -> None:
    """Add coefficient · part to each operand's sum; half precision is added up in float32."""
    for name, part in parts.items():
        index = node.operands[name]
        sums[index] = _sum(sums.get(index), _scaled(part, coefficient))


def _scaled(part: Any, coefficient: Any) -> Any:
    if isinstance(part, Pieces):
        return Pieces({k: _scaled(v, coefficient) for k, v in part.items()})
    wide = part.float() if part.dtype in (torch.bfloat16, torch.float16) else part
    return wide if _is(coefficient, 1) else coefficient * wide


def _is(value: Any, number: float) -> bool:
    return not isinstance(value, Tensor) and value == number
