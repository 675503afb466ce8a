"""One forward pass over a graph: the first sweep, and all that later sweeps read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ibp_triton.graph import Graph, Node
from ibp_triton.rules import Layer


@dataclass(eq=False)
class Trace:
    """One forward pass: the value of each node and the layer that computed it."""

    graph: Graph
    values: list[Any]
    layers: list[Layer | None]
    trainable: frozenset[int]  # parameter nodes that need a gradient
    moves: list[bool]  # whether a node depends on a trainable parameter
    takes: list[bool]  # whether a node has a trainable operand, so that its sides enter a weight gradient
    frugal: bool = False  # whether sweeps let go of what only curvature would read again

    @property
    def logits(self) -> Tensor:
        """[N, M]."""
        return self.values[self.graph.output]  # type: ignore[no-any-return]

    @property
    def input(self) -> Tensor:
        """x, in the dtype of the computation."""
        return self.values[self.graph.input]  # type: ignore[no-any-return]

    def tangents_needed(self, to_output: bool) -> list[bool]:
        """Nodes whose tangent reaches a trainable operand's layer, or the output."""
        nodes = self.graph.nodes
        needed = [False] * len(nodes)
        needed[self.graph.output] = to_output
        for node in reversed(nodes):
            if node.kind == "active" and (self.takes[node.index] or needed[node.index]):
                for index in node.operands.values():
                    needed[index] = True
        return needed


def run(
    graph: Graph,
    model: nn.Module,
    x: Tensor,
    parameters: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    first: Trace | None = None,
    frugal: bool = False,
) -> Trace:
    """First pass at x with ``parameters`` (the model's own where absent), computed in ``dtype``.

    With ``first``, dropout masks and batch statistics' bookkeeping are those of that pass. ``frugal`` keeps of the
    values only what layers save for themselves; curvature sweeps are not possible then.
    """
    own = {name: attrgetter(name)(model) for name in graph.parameters.values()}
    trainable = frozenset(i for i, name in graph.parameters.items() if own[name].requires_grad)
    moves = _moving(graph, trainable)
    trace = Trace(graph, [], [], trainable, moves, _taking(graph, moves), frugal)
    for node in graph.nodes:
        layer = None
        if node.index == graph.input:
            value: Any = _cast(x, dtype)
        elif node.index in graph.parameters:
            name = graph.parameters[node.index]
            value = _cast(parameters.get(name, own[name]), dtype)
        elif isinstance(node.function, str):
            value = _cast(attrgetter(node.function)(model), dtype)
        else:
            value, layer = _evaluate(node, trace.values, first)
        trace.values.append(value)
        trace.layers.append(layer)
        for index in graph.last_uses[node.index] if frugal else ():
            if isinstance(trace.values[index], Tensor) and trace.values[index].is_floating_point():
                trace.values[index] = None
    return trace


def _evaluate(node: Node, values: list[Any], first: Trace | None) -> tuple[Any, Layer | None]:
    args, kwargs = node.arguments(values)
    if node.rule is None:
        return node.function(*args, **kwargs), None
    layer = node.rule(node)
    earlier = first.layers[node.index] if first is not None else None
    if earlier is not None:
        return layer.replay(earlier, *args, **kwargs), layer
    return layer.forward(*args, **kwargs), layer


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    is_tensor = isinstance(value, Tensor) and value.is_floating_point()
    value = value.detach() if isinstance(value, Tensor) else value
    return value.to(dtype) if is_tensor and dtype is not None else value


def _moving(graph: Graph, trainable: frozenset[int]) -> list[bool]:
    moves: list[bool] = []
    for node in graph.nodes:
        moves.append(node.index in trainable or any(moves[i] for i in node.operands.values()))
    return moves


def _taking(graph: Graph, moves: list[bool]) -> list[bool]:
    nodes = graph.nodes
    return [any(nodes[i].kind == "parametric" and moves[i] for i in node.operands.values()) for node in nodes]
