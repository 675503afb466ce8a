"""Rules on Triton kernels, and the lowering that puts them into a graph and fuses ReLUs into their neighbours.

A ReLU behind a max-pool costs nothing: the pool's byte says which windows it switched off. A ReLU behind a linear or
convolution layer is that layer's epilogue, forward and in the linear sweep; in the reverse sweep it is the epilogue of
the layer behind it, which masks by its own input, or one launch of its own where there is no such layer.
What has no kernel keeps torch's rule, on the same device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ibp_triton.backends.torch import dense, pointwise, pooling
from ibp_triton.backends.torch.structural import BatchedMap, Reshape
from ibp_triton.graph import Graph, Node
from ibp_triton.kernels.tiles import precision
from ibp_triton.kernels.wgrad import MAX_SEGMENTS
from ibp_triton.layer import Bilinear, Layer, Names, Product, Tangents, divides, over, wrapped
from ibp_triton.ops import straight as ops
from ibp_triton.ops.operators import apart
from ibp_triton.seeds import Seed

# entries of Node.fused: what the lowering decided about a node
RELU = "relu"  # clip the output at zero, as the ReLU behind would
ABSORBED = "absorbed"  # a ReLU that its producer applies
GATED = "gated"  # a ReLU whose reverse its consumer or its producer applies
MASKS = "masks"  # mask the reverse by the own input: the ReLU before it
CHANNELS_FIRST = "channels first"  # a flatten follows: leave it nothing to copy


class _Joint(Bilinear):
    """All terms of a weight gradient in one launch."""

    spared: str | None = None  # kernels read the input as it was packed
    geometry: tuple[list[int], list[int], list[int]] = ([1, 1], [0, 0], [1, 1])  # stride, padding, dilation

    @property
    def _mask(self) -> Tensor | None:
        return self.input if MASKS in self.node.fused else None

    def joint_gradient(self, products: Sequence[Product], wanted: Names, batch: int) -> dict[str, Tensor]:
        """Σ coefficient · g(left, right) / N; in exact float32 one a + βt is formed on the way in."""
        if "weight" not in wanted or not products or len(products) > MAX_SEGMENTS:
            products = [replace(p, left=p.left.tensor) if isinstance(p.left, Seed) else p for p in products]
            return super().joint_gradient(products, wanted, batch)
        rows = [(p, self._samples(_read(p.left)[0], self.input.dim()), self._dense(p.right)) for p in products]
        signs = [_read(p.left)[1] for p in products]
        push, beta = None, 1.0
        if rows[0][1].dtype == torch.float32 and precision(rows[0][1]) == "ieee":
            first = rows[0][0]
            for i, (p, left, _) in enumerate(rows[1:], 1):
                number = first.coefficient
                if p.right is first.right and not p.bias and divides(number):
                    push, beta, signs[0] = left, over(p.coefficient, number), signs[i]
                    del rows[i], signs[i]
                    break
        (*coefficients, beta), on_device = apart([*(p.coefficient for p, _, _ in rows), beta])
        gradient, bias = ops.weight_gradient(
            [left for _, left, _ in rows],
            [right for _, _, right in rows],
            coefficients,
            [p.bias and "bias" in wanted for p, _, _ in rows],
            signs,
            on_device,
            self.weight,
            *self.geometry,
            scale=1 / batch,
            wide=self.weight.dtype != torch.float32,
            push=push,
            beta=beta,
        )
        return {"weight": gradient, "bias": bias} if bias.numel() else {"weight": gradient}

    def _samples(self, left: Tensor, rank: int) -> Tensor:
        """[T·N, ...] with the strides that all left sides share."""
        raise NotImplementedError

    def _dense(self, right: Tensor) -> Tensor:
        """[T·N, ...], dense, channels last."""
        raise NotImplementedError


class TritonLinear(_Joint, dense.Dense):
    """The linear layer as one contraction over [T, rows, features]."""

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., in] → [..., out]."""
        self.input, self.weight = input, weight.contiguous()
        flat = input.reshape(1, -1, input.shape[-1]).contiguous()
        output = ops.linear(flat, self.weight, bias, None, RELU in self.node.fused)
        self.output: Tensor = output.view(*input.shape[:-1], weight.shape[0])
        return self.output  # type: ignore[no-any-return]

    def jvp(self, t: Tangents) -> Tensor:
        """t Wᵀ, masked by the ReLU that the layer applies."""
        tangent, signed = _read(t["input"])
        mask = self.output.reshape(-1, self.output.shape[-1]) if RELU in self.node.fused else None
        out = ops.linear(self._tangents(tangent), self.weight, None, mask, False, signed)
        return out.view(*tangent.shape[:-1], self.weight.shape[0])  # type: ignore[no-any-return]

    def input_vjp(self, d: Tensor) -> Tensor:
        """d W, masked by the ReLU before the layer."""
        mask = None if self._mask is None else self._mask.reshape(-1, self._mask.shape[-1])
        out = ops.linear_vjp(self._tangents(d), self.weight, mask)
        return out.view(*d.shape[:-1], self.weight.shape[1])  # type: ignore[no-any-return]

    def _tangents(self, t: Tensor) -> Tensor:
        lead = t.shape[0] if t.dim() > self.input.dim() else 1
        return t.reshape(lead, -1, t.shape[-1]).contiguous()

    def _samples(self, left: Tensor, rank: int) -> Tensor:
        return left.reshape(-1, left.shape[-1]).contiguous()

    def _dense(self, right: Tensor) -> Tensor:
        return right.reshape(-1, right.shape[-1]).contiguous()


class TritonConv2d(_Joint, dense.Conv2d):
    """The convolution as an implicit matrix product, channels last."""

    def _conv(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The forward pass, once: its input is kept channels last for all the passes that read it again."""
        self.input = _last(self.input)
        self.geometry = (self.stride, self.padding, self.dilation)
        self.output: Tensor = ops.conv2d(self.input[None], self.weight, *self.geometry, bias, None, self._relu)[0]
        return self.output  # type: ignore[no-any-return]

    @property
    def _relu(self) -> bool:
        return RELU in self.node.fused

    def jvp(self, t: Tangents) -> Tensor:
        """The convolution without bias, masked by the ReLU that the layer applies."""
        tangent, signed = _read(t["input"])
        mask = self.output if self._relu else None
        out = ops.conv2d(_tangents(tangent, 4), self.weight, *self.geometry, None, mask, False, signed)
        return _like(out, tangent, 4)

    def input_vjp(self, d: Tensor) -> Tensor:
        """The transposed convolution, masked by the ReLU before the layer."""
        out = ops.conv2d_vjp(_tangents(d, 4), self.weight, self.input.shape[2:], *self.geometry, self._mask)
        return _like(out, d, 4)

    def _samples(self, left: Tensor, rank: int) -> Tensor:
        return _last(left.flatten(0, 1) if left.dim() > rank else left)

    def _dense(self, right: Tensor) -> Tensor:
        return _last(right.flatten(0, 1) if right.dim() > 4 else right)


class TritonMaxPool2d(pooling.MaxPool2d):
    """Max-pooling with a byte per window, and the ReLU behind it in the same byte."""

    def forward(
        self,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Tensor:
        """[N, C, H, W] → [N, C, OH, OW]."""
        self.size = input.shape[2:]  # the image itself need not be kept
        margin = list(self.node.settings.get("margin", (0, 0)))
        self.sizes = (_pair(kernel_size), _pair(stride or kernel_size), _pair(padding), margin, ceil_mode)
        self.first = CHANNELS_FIRST in self.node.fused
        output, self.code = ops.max_pool2d(input, *self.sizes, RELU in self.node.fused, self.first)
        return output  # type: ignore[no-any-return]

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d summed at the stored offsets."""
        out = ops.max_pool2d_vjp(_tangents(d, 4), self.code, self.size, *self.sizes)
        return {"input": _like(out, d, 4)}

    def jvp(self, t: Tangents) -> Tensor:
        """t at the stored offsets."""
        return _like(ops.max_pool2d_jvp(_tangents(t["input"], 4), self.code, *self.sizes, self.first), t["input"], 4)


class TritonMargin(Layer):
    """Padding by -∞ below and to the right of a max-pool, which leaves it to the pool."""

    label = "pad"

    def forward(self, input: Tensor, *_: Any, **__: Any) -> Tensor:
        """The image as it is."""
        return input

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d as it is."""
        return {"input": d}

    def jvp(self, t: Tangents) -> Tensor:
        """t as it is."""
        return t["input"]


class TritonAvgPool2d(Layer):
    """Mean-pooling: linear, so that forward and linear sweep are one."""

    label = "avg_pool2d"

    def forward(
        self,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Tensor:
        """[N, C, H, W] → [N, C, OH, OW]."""
        self.size = input.shape[2:]  # the image itself need not be kept
        self.sizes = (_pair(kernel_size), _pair(stride or kernel_size), _pair(padding), ceil_mode, count_include_pad)
        return self.jvp({"input": input})

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d shared out over each window."""
        return {"input": _like(ops.avg_pool2d_vjp(_tangents(d, 4), self.size, *self.sizes), d, 4)}

    def jvp(self, t: Tangents) -> Tensor:
        """The mean of each window."""
        out = ops.avg_pool2d(_tangents(t["input"], 4), *self.sizes, CHANNELS_FIRST in self.node.fused)
        return _like(out, t["input"], 4)


class TritonReLU(pointwise.ReLU):
    """max(a, 0), as far as its neighbours have not taken it over."""

    def forward(self, input: Tensor, inplace: bool = False) -> Tensor:
        """Same shape."""
        self.input = self.output = input if ABSORBED in self.node.fused else ops.relu(_packed(input))
        return self.output

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d where the output is positive."""
        return {"input": d if GATED in self.node.fused else self._masked(d)}

    def jvp(self, t: Tangents) -> Tensor:
        """t where the output is positive."""
        return t["input"] if ABSORBED in self.node.fused else self._masked(t["input"])

    def _masked(self, t: Tensor) -> Tensor:
        strides = self.output.stride()
        order = sorted(range(len(strides)), key=lambda i: (-strides[i], i))
        extra = t.dim() - len(strides)
        axes = [*range(extra), *(i + extra for i in order)]
        back = sorted(range(t.dim()), key=lambda i: axes[i])
        return ops.relu(t.permute(axes).contiguous(), self.output.permute(order)).permute(back)  # type: ignore[no-any-return]


def _read(t: Any) -> tuple[Tensor, bool]:
    """The numbers of a tangent, and whether they stand for their signs."""
    return (t.numbers, t.signed) if isinstance(t, Seed) else (t, False)


def reads_signs(graph: Graph) -> bool:
    """Whether x goes into linear and convolution kernels alone, which take a sign on the way in."""
    return all(graph.nodes[i].rule in (TritonLinear, TritonConv2d) for i in graph.consumers[graph.input])


def _packed(x: Tensor) -> Tensor:
    """x without gaps."""
    last = x.dim() == 4 and not wrapped(x)  # vmap knows of one memory format alone
    dense = x.is_contiguous() or (last and x.is_contiguous(memory_format=torch.channels_last))
    return x if dense else x.contiguous()


def _last(x: Tensor) -> Tensor:
    if wrapped(x):
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous(memory_format=torch.channels_last)


def _tangents(t: Tensor, rank: int) -> Tensor:
    return t if t.dim() > rank else t[None]


def _like(out: Tensor, t: Tensor, rank: int) -> Tensor:
    return out if t.dim() > rank else out[0]


def _pair(value: Any) -> list[int]:
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return values * 2 if len(values) == 1 else values


# ------------------------------------------------------------------------------------------------------ lowering


def lower(plain: Graph) -> Graph:
    """A recorded graph with its nodes given their kernels, and each ReLU fused."""
    graph = Graph(
        [replace(node, fused=set(), settings={}) for node in plain.nodes], plain.input, plain.output, plain.parameters
    )
    for node in graph.nodes:
        if node.kind == "active":
            node.rule = _replacement(node) or node.rule
    for node in graph.nodes:
        if node.function is F.pad:
            _absorb_margin(graph, node)
        if node.rule is TritonReLU:
            _fuse(graph, node)
    for node in graph.nodes:
        follower = _only_consumer(graph, node)
        if follower is not None and follower.rule is TritonReLU and ABSORBED in follower.fused:
            follower = _only_consumer(graph, follower)
        if node.rule in (TritonMaxPool2d, TritonAvgPool2d) and follower is not None and follower.rule is Reshape:
            node.fused.add(CHANNELS_FIRST)
    return graph


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
        plain = _pair(static.get("dilation", 1)) == [1, 1] and not static.get("return_indices", False)
        window = _pair(static.get("kernel_size", 1))
        return TritonMaxPool2d if plain and window[0] * window[1] <= 255 else None
    if node.rule is BatchedMap and node.function is F.avg_pool2d and static.get("divisor_override") is None:
        return TritonAvgPool2d
    return None


_POOL = ("input", "kernel_size", "stride", "padding")
_NAMES: Mapping[type[Layer], tuple[str, ...]] = {
    TritonMaxPool2d: (*_POOL, "dilation", "ceil_mode", "return_indices"),
    dense.Conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    pooling.MaxPool2d: (*_POOL, "dilation", "ceil_mode", "return_indices"),
    BatchedMap: (*_POOL, "ceil_mode", "count_include_pad", "divisor_override"),
}


def _arguments(node: Node) -> dict[str, Any]:
    """The call's arguments by name."""
    return dict(zip(_NAMES.get(node.rule or Layer, ()), node.args, strict=False)) | node.kwargs


def _fuse(graph: Graph, relu: Node) -> None:
    """Into the producer, if it produces for this ReLU alone; its reverse into the only consumer, if that can mask."""
    producer, consumer = graph.nodes[relu.operands["input"]], _only_consumer(graph, relu)
    if producer.rule in (TritonLinear, TritonConv2d, TritonMaxPool2d) and _only_consumer(graph, producer) is relu:
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
    pool, sides = _only_consumer(graph, pad), list(call.get("pad", ()))
    if (
        pool is None
        or pool.rule is not TritonMaxPool2d
        or call.get("value") != -math.inf
        or call.get("mode") != "constant"
    ):
        return
    plain = len(sides) == 4 and sides[0] == sides[2] == 0 and min(sides) >= 0
    if plain and _pair(_arguments(pool).get("padding", 0)) == [0, 0]:
        pool.settings["margin"] = (sides[3], sides[1])
        pad.rule, pad.operands, pad.slots = TritonMargin, {"input": next(iter(pad.operands.values()))}, []


def _only_consumer(graph: Graph, node: Node) -> Node | None:
    readers = graph.consumers[node.index]
    if len(readers) != 1 or node.index == graph.output or node.observed:
        return None
    return graph.nodes[readers[0]]
