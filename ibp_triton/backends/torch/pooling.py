"""Pooling. Of a maximum, the linear and the reverse sweep follow the positions that the first pass chose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ibp_triton.backends.torch.structural import BatchedMap
from ibp_triton.layer import Layer, Names, Tangents, fold, memory_format, product, unfold, wrapped


class _MaxPool(Layer):
    """The maximum of each window; ties go to the first maximum, as in torch. Positions are never derived anew."""

    spatial: int
    pool: Any

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """One tensor operand."""
        return list(kinds) == ["input"]

    def forward(
        self,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        """[N, C, ...] → [N, C, ...]."""
        self.shape, self.layout = input.shape, _layout(input)  # the values themselves are not read again
        self.window = (kernel_size, stride or kernel_size, padding, dilation, ceil_mode)
        output, self.index = self.pool(input, *self.window, True)
        return (output, self.index) if return_indices else output

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d added at the chosen positions."""
        if d.dim() == self.index.dim():
            return {"input": self._scatter(d)}
        back = torch.cat([self._scatter(one) for one in d.unbind(0)])  # keeps the memory format, and one index
        return {"input": unfold(back, d, self.index)}

    def jvp(self, t: Tangents) -> Tensor:
        """t gathered at the chosen positions."""
        tangent = t["input"]
        extra = tangent.shape[: tangent.dim() - len(self.shape)]
        flat, index = _rows(tangent, len(extra)), _rows(self.index, 0)
        channels_last = flat.stride(-1) != 1 and flat.stride(-2) == 1
        if channels_last:  # gather rows of channels as they lie in memory
            flat, index = flat.transpose(-1, -2), index.transpose(-1, -2)
        out = flat.gather(len(extra) + (1 if channels_last else 2), index.expand((*extra, *index.shape)))
        out = out.transpose(-1, -2) if channels_last else out
        return out.unflatten(-1, self.index.shape[2:])  # type: ignore[no-any-return]

    def _scatter(self, d: Tensor) -> Tensor:
        flat = d.new_zeros((*d.shape[:2], product(self.shape[2:])))
        return flat.scatter_add(2, self.index.flatten(2), d.flatten(2)).unflatten(2, self.shape[2:])  # type: ignore[no-any-return]


class MaxPool1d(_MaxPool):
    """Over [N, C, L]."""

    label, spatial, pool = "max_pool1d", 1, staticmethod(F.max_pool1d)


class MaxPool2d(_MaxPool):
    """Over [N, C, H, W]."""

    label, spatial, pool = "max_pool2d", 2, staticmethod(F.max_pool2d)

    def _scatter(self, d: Tensor) -> Tensor:
        kernel, stride, padding, dilation, ceil = self.window
        pair = [list(v) if isinstance(v, (tuple, list)) else [v, v] for v in (kernel, stride, padding, dilation)]
        # of the input torch reads but shape and layout: the pages of this stay untouched
        like = torch.empty(self.shape, dtype=d.dtype, device=d.device, memory_format=self.layout)
        return torch.ops.aten.max_pool2d_with_indices_backward(  # type: ignore[no-any-return]
            d, like, *pair, ceil, self.index
        )


class MaxPool3d(_MaxPool):
    """Over [N, C, D, H, W]."""

    label, spatial, pool = "max_pool3d", 3, staticmethod(F.max_pool3d)


class AdaptiveAvgPool2d(BatchedMap):
    """Means over as many windows as wanted of [N, C, H, W]."""

    label = "adaptive_avg_pool2d"

    def forward(self, input: Tensor, output_size: Any) -> Tensor:
        """[N, C, ...] → [N, C, *output_size]."""
        return super().forward(input, output_size)  # type: ignore[no-any-return]

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d shared out over each window."""
        height, width = self.input.shape[-2:]
        if self.output.shape[-2:] == (1, 1):
            return {"input": (d / (height * width)).expand((*d.shape[:-2], height, width))}
        if wrapped(d, self.input):
            return super().vjp(d, wanted)
        folded = fold(d, self.output)
        back = torch.ops.aten._adaptive_avg_pool2d_backward(folded, _like(folded, self.input))
        return {"input": unfold(back, d, self.output)}


def _like(folded: Tensor, value: Tensor) -> Tensor:
    """A tensor for as many samples, of which torch reads but shape and layout."""
    shape, layout = (folded.shape[0], *value.shape[1:]), memory_format(value)
    return torch.empty(shape, dtype=folded.dtype, device=folded.device, memory_format=layout)


def _layout(x: Tensor) -> torch.memory_format:
    """In which the derivative shall lie."""
    last = x.dim() == 4 and x.stride(1) == 1 and x.shape[1] > 1
    return torch.channels_last if last else torch.contiguous_format


def _rows(x: Tensor, extra: int) -> Tensor:
    """[..., N, C, positions], a view where x is contiguous or channels-last."""
    if x.dim() == 4 + extra and x.stride(1 + extra) == 1 and x.shape[1 + extra] > 1:
        order = [*range(extra), extra, extra + 2, extra + 3, extra + 1]
        return x.permute(order).flatten(extra + 1, extra + 2).transpose(-1, -2)
    return x.flatten(extra + 2)
