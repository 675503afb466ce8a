"""Recorded tensor operations compiled by inductor, which is spared what it does badly on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx


def compiled(graph: fx.GraphModule) -> Callable[..., Any]:
    """The graph as one compiled function of the same arguments."""
    run: Callable[..., Any] = torch.compile(
        spared(graph), fullgraph=True, dynamic=False, options={"compile_threads": 1}
    )
    return run


def distance(found: Tensor, expected: Tensor, least: float = 1e-30) -> float:
    """The largest difference relative to the largest entry, or to ``least``; infinite where a number is not finite."""
    if expected.numel() == 0:
        return 0.0
    off = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(least)
    return float(off.nan_to_num(nan=math.inf))


def spared(graph: fx.GraphModule) -> fx.GraphModule:
    """Max-pools and sums added in place to slices stay operations of torch's.

    Inductor's own max-pools take 4.2 ms of a float32 step where torch's take 1.3 (MNIST network, batch 32), and it
    nests one select for each in-place sum: the sixteen of an image layer's data gradient become 29 MB of C++.
    """
    for node in list(graph.graph.nodes):
        if node.target in _kept():
            node.target = _kept()[node.target]
        elif node.target is torch.ops.aten.add_.Tensor and _is_slice(node.args[0]) and not node.kwargs:
            with graph.graph.inserting_before(node):
                graph.graph.call_function(torch.ops.ibp_triton.add_to.default, node.args)
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default  # maps may lie otherwise than in the recording
        elif node.target is torch.ops.aten.copy_.default and _same(*node.args[:2]):
            node.replace_all_uses_with(node.args[0])  # what `a[rows] += b` ends with, of a slice to itself
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _is_slice(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is torch.ops.aten.slice.Tensor


def _same(a: Any, b: Any) -> bool:
    """Whether two views are equal slices of one tensor."""
    if a is b or not (_is_slice(a) and _is_slice(b)):
        return a is b
    return _same(a.args[0], b.args[0]) and a.args[1:] == b.args[1:]


_library = torch.library.Library("ibp_triton", "FRAGMENT")


@cache
def _kept() -> dict[Any, Any]:
    """Max-pools of torch's under names that inductor has no lowering for; their strides are those of the recording."""
    kept = {}
    for name in ("max_pool2d_with_indices", "max_pool2d_with_indices_backward"):
        operation = getattr(torch.ops.aten, name).default
        schema = str(operation._schema).removeprefix("aten::")
        _library.define(schema, tags=(torch.Tag.needs_exact_strides,))
        for key in ("CPU", "CUDA", "Meta"):
            _library.impl(name, operation, key)
        kept[operation] = getattr(torch.ops.ibp_triton, name).default
    _library.define("add_to(Tensor(a!) x, Tensor y) -> ()", tags=(torch.Tag.needs_exact_strides,))
    for key in ("CPU", "CUDA", "Meta"):
        _library.impl("add_to", _add_to, key)
    return kept


def _add_to(x: Tensor, y: Tensor) -> None:
    x.add_(y)
