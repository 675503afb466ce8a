"""How a pass runs: forward, reverse, linear and curvature sweeps over a network, and the weight gradients.

Sweeps are pure functions of tensors. What a sweep saves belongs to its Trace and is never overwritten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ibp_triton.graph import Graph, Node, Ref
from ibp_triton.network import Network
from ibp_triton.rules import Bilinear, Layer, Pieces

Sweep = list[Any]  # a derivative or tangent for each node, None where there is none


@dataclass(eq=False)
class Trace:
    """One forward pass: the value of each node and the layer that computed it."""

    graph: Graph
    values: list[Any]
    layers: list[Layer | None]
    trainable: frozenset[int]  # parameter nodes that need a gradient
    moves: list[bool]  # whether a node depends on a trainable parameter

    @property
    def logits(self) -> Tensor:
        """[N, M]."""
        return self.values[self.graph.output]  # type: ignore[no-any-return]

    @property
    def input(self) -> Tensor:
        """x, in the dtype of the computation."""
        return self.values[self.graph.input]  # type: ignore[no-any-return]


def forward(network: Network, x: Tensor, parameters: Mapping[str, Tensor], first: Trace | None = None) -> Trace:
    """First pass. With ``first``, dropout masks and batch statistics' bookkeeping are those of that pass."""
    graph = network.graph()
    own = dict(network.model.named_parameters())
    trainable = frozenset(i for i, name in graph.parameters.items() if own[name].requires_grad)
    trace = Trace(graph, [], [], trainable, _moving(graph, trainable))
    for node in graph.nodes:
        layer = None
        if node.index == graph.input:
            value: Any = x if network.dtype is None else x.to(network.dtype)
        elif node.index in graph.parameters:
            name = graph.parameters[node.index]
            value = _cast(parameters.get(name, own[name]), network.dtype)
        elif isinstance(node.function, str):
            value = _cast(_attribute(network, node.function), network.dtype)
        else:
            value, layer = _evaluate(node, trace.values, first)
        trace.values.append(value)
        trace.layers.append(layer)
    return trace


def _evaluate(node: Node, values: list[Any], first: Trace | None) -> tuple[Any, Layer | None]:
    args = _resolve(node.args, values)
    kwargs = _resolve(node.kwargs, values)
    if node.rule is None:
        return node.function(*args, **kwargs), None
    layer = node.rule(node)
    earlier = first.layers[node.index] if first is not None else None
    if earlier is not None:
        return layer.replay(earlier, *args, **kwargs), layer
    return layer.forward(*args, **kwargs), layer


def _resolve(arguments: Any, values: list[Any]) -> Any:
    if isinstance(arguments, Ref):
        return values[arguments.index]
    if isinstance(arguments, slice):
        return slice(*(_resolve(part, values) for part in (arguments.start, arguments.stop, arguments.step)))
    if isinstance(arguments, dict):
        return {key: _resolve(value, values) for key, value in arguments.items()}
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(_resolve(part, values) for part in arguments)
    return arguments


def _attribute(network: Network, path: str) -> Any:
    value: Any = network.model
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    is_tensor = isinstance(value, Tensor) and value.is_floating_point()
    value = value.detach() if isinstance(value, Tensor) else value
    return value.to(dtype) if is_tensor and dtype is not None else value


def _moving(graph: Graph, trainable: frozenset[int]) -> list[bool]:
    moves: list[bool] = []
    for node in graph.nodes:
        moves.append(node.index in trainable or any(moves[i] for i in node.operands.values()))
    return moves


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
    needed = _needed(trace, to_output)
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


def _needed(trace: Trace, to_output: bool) -> list[bool]:
    """Nodes whose tangent reaches a trainable operand's layer, or the output."""
    nodes = trace.graph.nodes
    needed = [False] * len(nodes)
    needed[trace.graph.output] = to_output
    for node in reversed(nodes):
        takes = any(nodes[i].kind == "parametric" and trace.moves[i] for i in node.operands.values())
        if node.kind == "active" and (takes or needed[node.index]):
            for index in node.operands.values():
                needed[index] = True
    return needed


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
    for node in reversed(trace.graph.nodes):
        layer = trace.layers[node.index]
        wanted = [n for n, i in node.operands.items() if trace.graph.nodes[i].kind == "parametric" and trace.moves[i]]
        if layer is None or not wanted:
            continue
        if node.kind == "parametric":
            if node.index in sums:
                _collect(sums, node, layer.vjp(sums.pop(node.index).to(trace.values[node.index].dtype), wanted), 1)
            continue
        for term, partner in _pairs(terms, node, layer):
            _contribute(sums, node, wanted, term, partner, exact)
    zero = {i: torch.zeros_like(trace.values[i]) for i in trace.trainable if i not in sums}
    return {trace.graph.parameters[i]: sum_ / batch for i, sum_ in sorted((sums | zero).items())}


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
        wide = part.float() if part.dtype in (torch.bfloat16, torch.float16) else part
        wide = wide if _is(coefficient, 1) else coefficient * wide
        sums[index] = sums[index] + wide if index in sums else wide


def _is(value: Any, number: float) -> bool:
    return not isinstance(value, Tensor) and value == number


def detached(tensors: Any) -> Any:
    """A structure of tensors without autograd history."""
    return tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, tensors)
