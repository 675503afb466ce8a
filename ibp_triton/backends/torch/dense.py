"""Linear and convolution: the layers that hold almost all the arithmetic."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ibp_triton import image_conv
from ibp_triton.layer import HALF, Bilinear, Names, Tangents, fold, memory_format, product, unfold, wide


class Dense(Bilinear):
    """y = a Wᵀ + b over any leading dimensions; g(a, d) = dᵀ a."""

    label = "linear"
    spared: str | None = "input"

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., in] → [..., out]."""
        self.input, self.weight = input, weight
        return F.linear(input, weight, bias)

    def input_vjp(self, d: Tensor) -> Tensor:
        """d W."""
        return d @ self.weight

    def jvp(self, t: Tangents) -> Tensor:
        """t Wᵀ: the forward pass without the bias."""
        return F.linear(t["input"], self.weight)

    @property
    def widens(self) -> bool:
        """On a CPU: its half-precision products come in half precision, which is too coarse for the penalty."""
        return not self.input.is_cuda

    def param_vjp(self, left: Tensor, d: Tensor, wanted: Names, scale: Any = 1) -> dict[str, Tensor]:
        """[out, in] and [out]. 1/N scales the smaller of d and the result."""
        left, d = left.reshape(-1, left.shape[-1]), d.reshape(-1, d.shape[-1])
        out = {}
        if "weight" in wanted and d.dtype in HALF and d.is_cuda:
            out["weight"] = scale * torch.mm(d.t(), left, out_dtype=torch.float32)
        elif "weight" in wanted and d.shape[0] <= left.shape[1]:
            out["weight"] = torch.mm((scale * wide(d)).t(), wide(left))
        elif "weight" in wanted:
            out["weight"] = scale * torch.mm(wide(d).t(), wide(left))
        if "bias" in wanted:
            out["bias"] = scale * wide(d).sum(0)
        return out

    def multiply_adds(self) -> int:
        """in · out for each row."""
        return self.input.numel() * self.weight.shape[0]


class _Conv(Bilinear):
    """Cross-correlation with stride, padding, dilation and groups; g is the correlation of a with d."""

    spatial: int
    spared: str | None = "input"

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        """[N, C, ...] → [N, out, ...]; an input without batch axis is refused."""
        if input.dim() != self.spatial + 2:
            raise ValueError(
                f"{self.node.where}: a {self.spatial}-d convolution needs input [N, C, ...] with "
                f"{self.spatial + 2} axes, got {list(input.shape)}; add the batch axis with x[None]"
            )
        self.input, self.weight, self.groups = input, weight, groups
        self.stride, self.dilation = _sizes(stride, self.spatial), _sizes(dilation, self.spatial)
        self.padding, self.extra = self._paddings(padding)
        return self._conv(input, bias)

    def _paddings(self, padding: Any) -> tuple[list[int], list[int]]:
        """Symmetric padding, and F.pad's list for what padding='same' adds at the far end of an even kernel."""
        if padding == "valid":
            return [0] * self.spatial, []
        if padding != "same":
            return _sizes(padding, self.spatial), []
        total = [d * (k - 1) for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]
        extra = [side for n in reversed(total) for side in (0, n % 2)]
        return [n // 2 for n in total], extra if any(extra) else []

    def _conv(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        function = (F.conv1d, F.conv2d, F.conv3d)[self.spatial - 1]
        return function(self._pad(x), self.weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(x, self.extra) if self.extra else x

    def _backward(self, d: Tensor, left: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        zeros, bias = [0] * self.spatial, [self.weight.shape[0]] if mask[2] else None
        return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
            d, left, self.weight, bias, self.stride, self.padding, self.dilation, False, zeros, self.groups, mask
        )

    def input_vjp(self, d: Tensor) -> Tensor:
        """The transposed convolution."""
        folded = fold(d, self.input)
        size = [n + e for n, e in zip(self.input.shape[2:], self.extra[::-2] or [0] * self.spatial, strict=True)]
        if image_conv.applies(self.input, self.groups):
            back = image_conv.data_gradient(folded, self.weight, size, self.stride, self.padding, self.dilation)
        else:
            layout = torch.channels_last if folded.dim() == 4 and folded.stride(1) == 1 else memory_format(folded)
            shape = (folded.shape[0], self.input.shape[1], *size)
            like = torch.empty(shape, dtype=d.dtype, device=d.device, memory_format=layout)  # only its shape is read
            back = self._backward(folded, like, [True, False, False])[0]
        return unfold(F.pad(back, [-e for e in self.extra]) if self.extra else back, d, self.input)

    def jvp(self, t: Tangents) -> Tensor:
        """The convolution without bias."""
        return unfold(self._conv(fold(t["input"], self.input)), t["input"], self.input)

    def param_vjp(self, left: Tensor, d: Tensor, wanted: Names, scale: Any = 1) -> dict[str, Tensor]:
        """[out, in / groups, ...] and [out]. In float32 oneDNN's bias gradient takes longer than a sum of its own."""
        left, d = fold(left, self.input), fold(d, self.input)
        joint = "bias" in wanted and "weight" in wanted and d.dtype in HALF
        out = {}
        if "weight" in wanted:
            found = self._backward(d, self._pad(left), [False, True, joint])
            out["weight"] = wide(found[1]) * scale
        if "bias" in wanted:
            out["bias"] = scale * wide(found[2] if joint else d.sum([0, *range(2, d.dim())]))
        return out

    def multiply_adds(self) -> int:
        """Kernel volume times in / groups for each output."""
        extra = self.extra[::-2] or [0] * self.spatial
        outputs = product(
            [
                (n + e + 2 * p - d * (k - 1) - 1) // s + 1
                for n, e, p, d, k, s in zip(
                    self.input.shape[2:],
                    extra,
                    self.padding,
                    self.dilation,
                    self.weight.shape[2:],
                    self.stride,
                    strict=True,
                )
            ]
        )
        return self.input.shape[0] * outputs * product(self.weight.shape)


class Conv1d(_Conv):
    """1-d convolution, [N, C, L]."""

    label, spatial = "conv1d", 1


class Conv2d(_Conv):
    """2-d convolution, [N, C, H, W]."""

    label, spatial = "conv2d", 2


class Conv3d(_Conv):
    """3-d convolution, [N, C, D, H, W]."""

    label, spatial = "conv3d", 3


class _ConvTranspose(_Conv):
    """The transpose of a convolution; g is the correlation of d with a."""

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        """[N, C, ...] → [N, out, ...], weight [C, out / groups, ...]; an input without batch axis is refused."""
        self.output_padding = _sizes(output_padding, self.spatial)
        return super().forward(input, weight, bias, stride, padding, dilation, groups)

    def _conv(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.spatial - 1]
        settings = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return function(x, self.weight, bias, *settings)

    def _backward(self, d: Tensor, left: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        bias = [self.weight.shape[1] * self.groups] if mask[2] else None
        settings = (self.stride, self.padding, self.dilation, True, self.output_padding, self.groups)
        return torch.ops.aten.convolution_backward(d, left, self.weight, bias, *settings, mask)  # type: ignore[no-any-return]

    def input_vjp(self, d: Tensor) -> Tensor:
        """The convolution."""
        function = (F.conv1d, F.conv2d, F.conv3d)[self.spatial - 1]
        settings = (self.stride, self.padding, self.dilation, self.groups)
        back = function(fold(d, self.input), self.weight, None, *settings)
        return unfold(_cut(back, self.input.shape[2:]), d, self.input)

    def multiply_adds(self) -> int:
        """Kernel volume times out / groups for each input."""
        return self.input.numel() * product(self.weight.shape[1:])


class ConvTranspose1d(_ConvTranspose):
    """1-d transposed convolution, [N, C, L]."""

    label, spatial = "conv_transpose1d", 1


class ConvTranspose2d(_ConvTranspose):
    """2-d transposed convolution, [N, C, H, W]."""

    label, spatial = "conv_transpose2d", 2


class ConvTranspose3d(_ConvTranspose):
    """3-d transposed convolution, [N, C, D, H, W]."""

    label, spatial = "conv_transpose3d", 3


def _cut(x: Tensor, size: Any) -> Tensor:
    """The first positions along each axis of space: output padding may make room for one more."""
    for axis, n in enumerate(size, 2):
        x = x.narrow(axis, 0, n)
    return x


def _sizes(value: Any, n: int) -> list[int]:
    """A size per axis: 3 → [3, 3], (3,) → [3, 3], (1, 2) → [1, 2]."""
    values = list(value) if isinstance(value, (tuple, list, torch.Size)) else [value]
    return values * n if len(values) == 1 else values
