"""What a network costs: multiply-adds of each sweep, layer by layer, and the summary that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ibp_triton.network import Network
from ibp_triton.rules import Generic
from ibp_triton.sweeps import Trace, _needed, forward


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


def rows(network: Network, input_shape: Sequence[int]) -> list[Row]:
    """The nodes of a network on inputs [N, ...] of this shape."""
    trace = _trial(network, input_shape)
    inner, outer = _needed(trace, False), _needed(trace, True)
    result = []
    for node, layer, value in zip(trace.graph.nodes, trace.layers, trace.values, strict=True):
        if layer is None or node.kind != "active":
            continue
        macs = layer.multiply_adds()
        moves = any(trace.moves[i] for i in node.operands.values() if trace.graph.nodes[i].kind == "active")
        trains = any(trace.moves[i] for i in node.operands.values() if trace.graph.nodes[i].kind == "parametric")
        index = node.index
        work = MultiplyAdds(macs, macs, macs * moves, macs * outer[index], macs * inner[index], macs * trains)
        rule = "generic" if isinstance(layer, Generic) else type(layer).__name__
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
        result.append(Row(node.where or "(root)", node.label, rule, shape, work))
    return result


def multiply_adds(network: Network, input_shape: Sequence[int]) -> MultiplyAdds:
    """The sums over the network."""
    table = rows(network, input_shape)
    names = MultiplyAdds.__dataclass_fields__
    return MultiplyAdds(*(sum(getattr(row.work, name) for row in table) for name in names))


def summary(network: Network, input_shape: Sequence[int]) -> str:
    """A table of nodes, rules and multiply-adds (forward, vjp, jvp, weight gradient), for printing."""
    lines = [
        f"{'module':24} {'operation':18} {'rule':14} {'output':>20} {'forward':>12} {'vjp':>12} {'jvp':>12} {'weights':>12}"
    ]
    for row in rows(network, input_shape):
        work, shape = row.work, "×".join(map(str, row.shape))
        numbers = "".join(f" {n:>12,}" for n in (work.forward, work.vjp, work.jvp, work.weights))
        lines.append(f"{row.where:24} {row.label:18} {row.rule:14} {shape:>20}{numbers}")
    total = multiply_adds(network, input_shape)
    numbers = "".join(f" {n:>12,}" for n in (total.forward, total.vjp, total.jvp, total.weights))
    lines.append(f"{'multiply-adds':24} {'':18} {'':14} {'':>20}{numbers}")
    skipped = total.vjp - total.vjp_inner
    lines.append(
        f"BP skips {skipped:,} of the vjp (first layer); Loss IBP {total.jvp - total.jvp_inner:,} of the jvp (last)"
    )
    return "\n".join(lines)


def _trial(network: Network, input_shape: Sequence[int]) -> Trace:
    """A forward pass on zeros that leaves running statistics and random numbers as they were."""
    first = next(network.model.parameters())
    x = torch.zeros(tuple(input_shape), dtype=network.dtype or first.dtype, device=first.device)
    buffers = {name: buffer.clone() for name, buffer in network.model.named_buffers()}
    devices = [first.device] if first.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        trace = forward(network, x, {})
    for name, buffer in network.model.named_buffers():
        buffer.copy_(buffers[name])
    return trace
