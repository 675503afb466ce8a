"""One forward pass over a graph: the first sweep, and all that later sweeps read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ibp_triton.graph import Graph, Node, Plan
from ibp_triton.rules import Layer


@dataclass(eq=False)
class Trace:
    """One forward pass: the value of each node and the layer that computed it."""

    graph: Graph
    values: list[Any]
    layers: list[Layer | None]
    plan: Plan
    frugal: bool = False  # whether sweeps let go of what only curvature would read again

    @property
    def logits(self) -> Tensor:
        """[N, M]."""
        return self.values[self.graph.output]  # type: ignore[no-any-return]

    @property
    def input(self) -> Tensor:
        """x, in the dtype of the computation."""
        return self.values[self.graph.input]  # type: ignore[no-any-return]


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
    trace = Trace(graph, [], [], graph.plan(trainable), frugal)
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
