"""Rules on Triton kernels: what each layer launches in each sweep, and what it does for its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ibp_triton.backends.torch import dense, pointwise, pooling
from ibp_triton.graph import Node
from ibp_triton.kernels.tiles import precision
from ibp_triton.kernels.wgrad import MAX_SEGMENTS
from ibp_triton.layer import Bilinear, Layer, Names, Product, Share, Tangents, divides, over, wrapped
from ibp_triton.ops import straight as ops
from ibp_triton.ops.operators import apart, conv_geometry
from ibp_triton.seeds import Seed

# entries of Node.fused: what the lowering decided about a node
POOLED = "pooled"  # a convolution that does the max-pool behind it as well; how, say the node's settings
RELU = "relu"  # clip the output at zero, as the ReLU behind would
ABSORBED = "absorbed"  # a ReLU or a max-pool that its producer applies
GATED = "gated"  # a ReLU whose reverse its consumer or its producer applies
MASKS = "masks"  # mask the reverse by the own input: the ReLU before it
ACTIVATION = "activation"  # of Node.settings: a smooth activation that a linear layer applies
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
        rows = [(p, self._samples(read(p.left)[0], self.input.dim()), self._dense(p.right)) for p in products]
        signs = [read(p.left)[1] for p in products]
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
        flat, shape = input.reshape(1, -1, input.shape[-1]).contiguous(), (*input.shape[:-1], weight.shape[0])
        if ACTIVATION in self.node.settings:
            output, slope = ops.linear_activation(flat, self.weight, bias, self.node.settings[ACTIVATION])
            self.slope: Tensor = slope.view(shape)
            return output.view(shape)  # type: ignore[no-any-return]
        output = ops.linear(flat, self.weight, bias, None, RELU in self.node.fused)
        self.output: Tensor = output.view(shape)
        return self.output  # type: ignore[no-any-return]

    def jvp(self, t: Tangents) -> Tensor:
        """t Wᵀ, masked by the ReLU or multiplied by the slope of the activation that the layer applies."""
        tangent, signed = read(t["input"])
        mask = _flat(self.output) if RELU in self.node.fused else None
        slope = _flat(self.slope) if ACTIVATION in self.node.settings else None
        out = ops.linear(self._tangents(tangent), self.weight, None, mask, False, signed, slope)
        return out.view(*tangent.shape[:-1], self.weight.shape[0])  # type: ignore[no-any-return]

    def input_vjp(self, d: Tensor) -> Tensor:
        """d W, masked by the ReLU or multiplied by the slope of the activation before the layer."""
        mask = None if self._mask is None else _flat(self._mask)
        slope = None if self.sloped_by is None else _flat(steep(self.sloped_by))
        out = ops.linear_vjp(self._tangents(d), self.weight, mask, slope)
        return out.view(*d.shape[:-1], self.weight.shape[1])  # type: ignore[no-any-return]

    def _tangents(self, t: Tensor) -> Tensor:
        lead = t.shape[0] if t.dim() > self.input.dim() else 1
        return t.reshape(lead, -1, t.shape[-1]).contiguous()

    def _samples(self, left: Tensor, rank: int) -> Tensor:
        return left.reshape(-1, left.shape[-1]).contiguous()

    def _dense(self, right: Tensor) -> Tensor:
        return right.reshape(-1, right.shape[-1]).contiguous()


class TritonConv2d(_Joint, dense.Conv2d):
    """The convolution as an implicit matrix product, channels last, with the max-pool behind it where it is POOLED.

    Its output, derivatives and tangents are then those behind the pool.
    """

    def _conv(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The forward pass, once: its input is kept channels last for all the passes that read it again."""
        self.input = _last(self.input)
        self.geometry = (self.stride, self.padding, self.dilation)
        if POOLED in self.node.fused:
            self.sizes, self.first = self.node.settings["pool"], CHANNELS_FIRST in self.node.fused
            self.unpooled = WeakTensorKeyDictionary()  # by derivative behind the pool: that before it, asked for again
            output, self.code = ops.conv2d_max_pool2d(
                self.input, self.weight, *self.geometry, bias, *self.sizes, self._relu, self.first
            )
            return output  # type: ignore[no-any-return]
        self.output: Tensor = ops.conv2d(self.input[None], self.weight, *self.geometry, bias, None, self._relu)[0]
        return self.output  # type: ignore[no-any-return]

    @property
    def _relu(self) -> bool:
        return RELU in self.node.fused

    def jvp(self, t: Tangents) -> Tensor:
        """The convolution without bias, masked by the ReLU that the layer applies."""
        tangent, signed = read(t["input"])
        lead = _tangents(tangent, 4)
        if POOLED in self.node.fused:
            out = ops.conv2d_max_pool2d_jvp(
                lead, self.weight, self.code, *self.geometry, *self.sizes, signed, self.first
            )
        else:
            mask = self.output if self._relu else None
            out = ops.conv2d(lead, self.weight, *self.geometry, None, mask, False, signed)
        return _like(out, tangent, 4)

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """As of any layer, from d behind the pool."""
        return super().vjp(self._before_pool(d), wanted)

    def tangent_param_vjp(self, t: Tangents, r: Tensor, wanted: Names) -> dict[str, Tensor]:
        """g(t, r), from r behind the pool."""
        return super().tangent_param_vjp(t, self._before_pool(r), wanted)

    def weight_gradient(self, shares: Sequence[Share], wanted: Names, batch: int) -> dict[str, Tensor]:
        """All terms in one launch, each from a right side behind the pool of its own pass."""
        found: dict[tuple[int, int], Tensor] = {}  # terms that share a right side go on sharing it
        own = []
        for share in shares:
            key = (id(share.layer), id(share.right))
            if key not in found:
                layer = share.layer
                found[key] = layer._before_pool(share.right) if isinstance(layer, TritonConv2d) else share.right
            own.append(replace(share, right=found[key]))
        return super().weight_gradient(own, wanted, batch)

    def input_vjp(self, d: Tensor) -> Tensor:
        """The transposed convolution, masked by the ReLU before the layer."""
        out = ops.conv2d_vjp(_tangents(d, 4), self.weight, self.input.shape[2:], *self.geometry, self._mask)
        return _like(out, d, 4)

    def _before_pool(self, d: Tensor) -> Tensor:
        """d at the convolution's own result, once for the input's derivative and the weight gradient."""
        if POOLED not in self.node.fused:
            return d
        known: Tensor | None = self.unpooled.pop(d, None)  # nothing asks a third time
        if known is not None:
            return known
        size = conv_geometry(self.input.shape[2:], self.weight.shape[2:], *self.geometry).out
        before = _like(ops.max_pool2d_vjp(_tangents(d, 4), self.code, list(size), *self.sizes), d, 4)
        self.unpooled[d] = before
        return before

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
        if ABSORBED in self.node.fused:
            return input
        self.size = input.shape[2:]  # the image itself need not be kept
        self.sizes = windows(self.node, kernel_size, stride, padding, ceil_mode)
        self.first = CHANNELS_FIRST in self.node.fused
        output, self.code = ops.max_pool2d(input, *self.sizes, RELU in self.node.fused, self.first)
        return output  # type: ignore[no-any-return]

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d summed at the stored offsets."""
        if ABSORBED in self.node.fused:
            return {"input": d}
        out = ops.max_pool2d_vjp(_tangents(d, 4), self.code, self.size, *self.sizes)
        return {"input": _like(out, d, 4)}

    def jvp(self, t: Tangents) -> Tensor:
        """t at the stored offsets."""
        if ABSORBED in self.node.fused:
            return t["input"]
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
        self.sizes = (pair(kernel_size), pair(stride or kernel_size), pair(padding), ceil_mode, count_include_pad)
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

    follows = False

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


def steep(layer: Layer) -> Tensor:
    """The slope that a linear layer keeps, [N, ..., O]."""
    assert isinstance(layer, TritonLinear)
    return layer.slope


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def windows(node: Node, kernel: Any, stride: Any, padding: Any, ceil: bool) -> tuple[Any, ...]:
    """A max-pool's kernel, stride, padding, margin and rounding as the operators take them."""
    margin = list(node.settings.get("margin", (0, 0)))
    return pair(kernel), pair(stride or kernel), pair(padding), margin, ceil


def read(t: Any) -> tuple[Tensor, bool]:
    """The numbers of a tangent, and whether they stand for their signs."""
    return (t.numbers, t.signed) if isinstance(t, Seed) else (t, False)


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


def pair(value: Any) -> list[int]:
    """A size along both axes: 3 → [3, 3], (1, 2) → [1, 2]."""
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return values * 2 if len(values) == 1 else values
