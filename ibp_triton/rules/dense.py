"""Linear and convolution: the layers that hold almost all the arithmetic."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ibp_triton.rules.base import Bilinear, Tangents, fold, product, unfold


class Linear(Bilinear):
    """y = a Wᵀ + b over any leading dimensions; g(a, d) = dᵀ a."""

    label = "linear"

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., in] → [..., out]."""
        self.input, self.weight = input, weight
        return F.linear(input, weight, bias)

    def input_vjp(self, d: Tensor) -> Tensor:
        """D W."""
        return d @ self.weight

    def jvp(self, t: Tangents) -> Tensor:
        """T Wᵀ: the forward pass without the bias."""
        return F.linear(t["input"], self.weight)

    def weight_gradient(self, left: Tensor, right: Tensor) -> Tensor:
        """[out, in]."""
        return right.reshape(-1, right.shape[-1]).t() @ left.reshape(-1, left.shape[-1])

    def bias_gradient(self, d: Tensor) -> Tensor:
        """[out]."""
        return d.reshape(-1, d.shape[-1]).sum(0)

    def multiply_adds(self) -> int:
        """In · out for each row."""
        return self.input.numel() * self.weight.shape[0]


class _Conv(Bilinear):
    """Cross-correlation with stride, padding, dilation and groups; g is the correlation of a with d."""

    spatial: int

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
        function = F.conv2d if self.spatial == 2 else F.conv1d
        return function(self._pad(x), self.weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(x, self.extra) if self.extra else x

    def _backward(self, d: Tensor, left: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        zeros = [0] * self.spatial
        return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
            d, left, self.weight, None, self.stride, self.padding, self.dilation, False, zeros, self.groups, mask
        )

    def input_vjp(self, d: Tensor) -> Tensor:
        """The transposed convolution."""
        folded = fold(d, self.input)
        size = [n + e for n, e in zip(self.input.shape[2:], self.extra[::-2] or [0] * self.spatial, strict=True)]
        like = d.new_empty(1).expand(folded.shape[0], self.input.shape[1], *size)  # only its shape is read
        back = self._backward(folded, like, [True, False, False])[0]
        return unfold(F.pad(back, [-e for e in self.extra]) if self.extra else back, d, self.input)

    def jvp(self, t: Tangents) -> Tensor:
        """The convolution without bias."""
        return unfold(self._conv(fold(t["input"], self.input)), t["input"], self.input)

    def weight_gradient(self, left: Tensor, right: Tensor) -> Tensor:
        """[out, in / groups, ...]."""
        left, right = fold(left, self.input), fold(right, self.input)
        return self._backward(right, self._pad(left), [False, True, False])[1]

    def bias_gradient(self, d: Tensor) -> Tensor:
        """[out]."""
        return d.sum([0, *range(2, d.dim())])

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


def _sizes(value: Any, n: int) -> list[int]:
    """A size per axis: 3 → [3, 3], (3,) → [3, 3], (1, 2) → [1, 2]."""
    values = list(value) if isinstance(value, (tuple, list, torch.Size)) else [value]
    return values * n if len(values) == 1 else values
