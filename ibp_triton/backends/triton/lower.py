"""The lowering that puts rules on Triton kernels into a graph, and fuses layers into their neighbours.

A ReLU behind a max-pool costs nothing: the pool's byte says which windows it switched off. A ReLU behind a linear or
convolution layer is that layer's epilogue, forward and in the linear sweep; in the reverse sweep it is the epilogue of
the layer behind it, which masks by its own input, or one launch of its own where there is no such layer. A max-pool
behind a convolution, with what is fused into the pool, is the convolution's: where an image of few channels makes that
cheap, both are one launch. GELU and SiLU behind a linear layer are its epilogue, see ``activation_rules``.
What has no kernel keeps torch's rule, on the same device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch.nn.functional as F

from ibp_triton.backends.torch import attention, batch_norm, dense, multihead, normalisation, pointwise, pooling
from ibp_triton.backends.torch.structural import BatchedMap, Reshape
from ibp_triton.backends.triton.activation_rules import BENT, fuse_activation
from ibp_triton.backends.triton.attention_rules import TritonAttention, TritonMultiHeadAttention
from ibp_triton.backends.triton.kernel_rules import (
    ABSORBED,
    CHANNELS_FIRST,
    GATED,
    MASKS,
    POOLED,
    RELU,
    TritonAvgPool2d,
    TritonConv2d,
    TritonLinear,
    TritonMargin,
    TritonMaxPool2d,
    TritonReLU,
    pair,
    windows,
)
from ibp_triton.backends.triton.norm_rules import (
    TritonBatchNorm,
    TritonGroupNorm,
    TritonInstanceNorm,
    TritonLayerNorm,
    TritonRMSNorm,
)
from ibp_triton.graph import Graph, Node
from ibp_triton.kernels.norms import LARGEST as LONGEST
from ibp_triton.layer import Layer


def lower(plain: Graph, curved: bool) -> Graph:
    """A recorded graph with its nodes given their kernels, and each ReLU fused; GELU and SiLU unless ``curved``."""
    nodes = [replace(node, fused=set(), settings={}) for node in plain.nodes]
    graph = Graph(nodes, plain.input, plain.output, plain.parameters, plain.passed)
    for node in graph.nodes:
        if node.kind == "active":
            node.rule = _replacement(node) or node.rule
    for node in graph.nodes:
        if node.function is F.pad:
            _absorb_margin(graph, node)
        if node.rule is TritonReLU:
            _fuse(graph, node)
        if node.rule in BENT and curved:
            node.rule = BENT[node.rule]
        elif node.rule in BENT:
            fuse_activation(graph, node)
    for node in graph.nodes:
        follower = graph.only_consumer(node)
        if follower is not None and follower.rule is TritonReLU and ABSORBED in follower.fused:
            follower = graph.only_consumer(follower)
        if node.rule in (TritonMaxPool2d, TritonAvgPool2d) and follower is not None and follower.rule is Reshape:
            node.fused.add(CHANNELS_FIRST)
        if node.rule is TritonMaxPool2d:
            _join(graph, node)
    return graph


def reads_signs(graph: Graph) -> bool:
    """Whether x goes into linear and convolution kernels alone, which take a sign on the way in."""
    return all(graph.nodes[i].rule in (TritonLinear, TritonConv2d) for i in graph.consumers[graph.input])


def _replacement(node: Node) -> type[Layer] | None:
    """The kernel rule for a node, None where there is none or it does not cover the call."""
    static = _arguments(node)
    if node.rule is dense.Dense:
        return TritonLinear
    if node.rule is pointwise.ReLU:
        return TritonReLU
    if node.rule is dense.Conv2d:
        plain = static.get("groups", 1) == 1 and not isinstance(static.get("padding", 0), str)
        return TritonConv2d if plain else None
    if node.rule is pooling.MaxPool2d:
        plain = pair(static.get("dilation", 1)) == [1, 1] and not static.get("return_indices", False)
        window = pair(static.get("kernel_size", 1))
        return TritonMaxPool2d if plain and window[0] * window[1] <= 255 else None
    if node.rule is BatchedMap and node.function is F.avg_pool2d and static.get("divisor_override") is None:
        return TritonAvgPool2d
    if node.rule in (normalisation.LayerNorm, normalisation.RMSNorm):
        whole = math.prod(static.get("normalized_shape", ())) <= LONGEST
        return _ALWAYS[node.rule] if whole else None
    if node.rule is normalisation.InstanceNorm and static.get("running_mean") is not None:
        return None
    return _ALWAYS.get(node.rule or Layer)


_ALWAYS: Mapping[type[Layer], type[Layer]] = {  # rules that look at a call's tensors themselves
    attention.ScaledDotProductAttention: TritonAttention,
    multihead.MultiHeadAttention: TritonMultiHeadAttention,
    batch_norm.BatchNorm: TritonBatchNorm,
    normalisation.LayerNorm: TritonLayerNorm,
    normalisation.RMSNorm: TritonRMSNorm,
    normalisation.GroupNorm: TritonGroupNorm,
    normalisation.InstanceNorm: TritonInstanceNorm,
}
LARGEST = 16  # pixels of a max-pool's window that a convolution does as well
_WINDOW = (("kernel_size", 1), ("stride", None), ("padding", 0), ("ceil_mode", False))
_POOL = ("input", "kernel_size", "stride", "padding")
_NAMES: Mapping[type[Layer], tuple[str, ...]] = {
    TritonMaxPool2d: (*_POOL, "dilation", "ceil_mode", "return_indices"),
    dense.Conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    pooling.MaxPool2d: (*_POOL, "dilation", "ceil_mode", "return_indices"),
    normalisation.LayerNorm: ("input", "normalized_shape"),
    normalisation.RMSNorm: ("input", "normalized_shape"),
    normalisation.InstanceNorm: ("input", "running_mean"),
    BatchedMap: (*_POOL, "ceil_mode", "count_include_pad", "divisor_override"),
}


def _arguments(node: Node) -> dict[str, Any]:
    """The call's arguments by name."""
    return dict(zip(_NAMES.get(node.rule or Layer, ()), node.args, strict=False)) | node.kwargs


def _fuse(graph: Graph, relu: Node) -> None:
    """Into the producer, if it produces for this ReLU alone; its reverse into the only consumer, if that can mask."""
    producer, consumer = graph.nodes[relu.operands["input"]], graph.only_consumer(relu)
    if producer.rule in (TritonLinear, TritonConv2d, TritonMaxPool2d) and graph.only_consumer(producer) is relu:
        producer.fused.add(RELU)
        relu.fused.add(ABSORBED)
        if producer.rule is TritonMaxPool2d:
            relu.fused.add(GATED)
    if GATED not in relu.fused and consumer is not None and consumer.rule in (TritonLinear, TritonConv2d):
        consumer.fused.add(MASKS)
        relu.fused.add(GATED)


def _absorb_margin(graph: Graph, pad: Node) -> None:
    """Let a max-pool do the padding before it, where that is by -∞ and at the far ends alone."""
    call = dict(zip(("input", "pad", "mode", "value"), pad.args, strict=False)) | pad.kwargs
    pool, sides = graph.only_consumer(pad), list(call.get("pad", ()))
    if (
        pool is None
        or pool.rule is not TritonMaxPool2d
        or call.get("value") != -math.inf
        or call.get("mode") != "constant"
    ):
        return
    plain = len(sides) == 4 and sides[0] == sides[2] == 0 and min(sides) >= 0
    if plain and pair(_arguments(pool).get("padding", 0)) == [0, 0]:
        pool.settings["margin"] = (sides[3], sides[1])
        pad.rule, pad.operands, pad.slots = TritonMargin, {"input": next(iter(pad.operands.values()))}, []


def _join(graph: Graph, pool: Node) -> None:
    """Let the convolution before a max-pool, and before the pool's margin, do both."""
    conv = graph.nodes[pool.operands["input"]]
    inner = pool
    if conv.rule is TritonMargin:
        conv, inner = graph.nodes[conv.operands["input"]], conv
    call = _arguments(pool)
    kernel, stride, padding, ceil = (call.get(name, default) for name, default in _WINDOW)
    sizes = windows(pool, kernel, stride, padding, bool(ceil))
    # larger windows leave nothing to gain, and the model may take their size from the convolution's result
    if conv.rule is not TritonConv2d or math.prod(sizes[0]) > LARGEST or graph.only_consumer(conv) is not inner:
        return
    if inner is not pool and graph.only_consumer(inner) is not pool:
        return
    conv.settings["pool"] = sizes
    conv.fused |= {POOLED, *pool.fused}
    pool.fused.add(ABSORBED)
