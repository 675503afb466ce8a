"""Max-pooling: the linear sweep and the reverse sweep follow the positions that the first pass chose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ibp_triton.rules.base import Layer, Names, Tangents, fold, product, unfold


class _MaxPool(Layer):
    """The maximum of each window; ties go to the first maximum, as in torch. Positions are never derived anew."""

    spatial: int
    pool: Any

    @classmethod
    def accepts(cls, kinds: Mapping[str, str]) -> bool:
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
        self.input = input
        self.window = (kernel_size, stride or kernel_size, padding, dilation, ceil_mode)
        output, self.index = self.pool(input, *self.window, True)
        return (output, self.index) if return_indices else output

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """D added at the chosen positions."""
        folded = fold(d, self.index)
        return {"input": unfold(self._scatter(folded, self._index_for(folded)), d, self.index)}

    def jvp(self, t: Tangents) -> Tensor:
        """T gathered at the chosen positions."""
        folded = fold(t["input"], self.input)
        index = self._index_for(folded)
        if (
            folded.dim() == 4 and folded.stride(1) == 1 and folded.shape[1] > 1
        ):  # channels last: gather rows as they lie
            rows = folded.permute(0, 2, 3, 1).flatten(1, 2).gather(1, index.permute(0, 2, 3, 1).flatten(1, 2))
            out = rows.unflatten(1, index.shape[2:]).permute(0, 3, 1, 2)
        else:
            out = folded.flatten(2).gather(2, index.flatten(2)).view(*folded.shape[:2], *index.shape[2:])
        return unfold(out, t["input"], self.input)

    def _index_for(self, folded: Tensor) -> Tensor:
        """The positions, repeated for each of T folded tangents."""
        index = self.index
        if folded.shape[0] == index.shape[0]:
            return index  # type: ignore[no-any-return]
        times = folded.shape[0] // max(index.shape[0], 1)
        return index.expand(times, *index.shape).flatten(0, 1)  # type: ignore[no-any-return]

    def _scatter(self, d: Tensor, index: Tensor) -> Tensor:
        flat = d.new_zeros(*d.shape[:2], product(self.input.shape[2:]))
        return flat.scatter_add(2, index.flatten(2), d.flatten(2)).unflatten(2, self.input.shape[2:])  # type: ignore[no-any-return]


class MaxPool1d(_MaxPool):
    """Over [N, C, L]."""

    label, spatial, pool = "max_pool1d", 1, staticmethod(F.max_pool1d)


class MaxPool2d(_MaxPool):
    """Over [N, C, H, W]."""

    label, spatial, pool = "max_pool2d", 2, staticmethod(F.max_pool2d)

    def _scatter(self, d: Tensor, index: Tensor) -> Tensor:
        like = self.input if d.shape[0] == self.input.shape[0] else self._empty(d)
        kernel, stride, padding, dilation, ceil = self.window
        pair = [list(v) if isinstance(v, (tuple, list)) else [v, v] for v in (kernel, stride, padding, dilation)]
        return torch.ops.aten.max_pool2d_with_indices_backward(d, like, *pair, ceil, index)  # type: ignore[no-any-return]

    def _empty(self, d: Tensor) -> Tensor:
        """An input for the folded batch, of which torch reads only shape and memory format."""
        like = self.input.new_empty(d.shape[0], *self.input.shape[1:])
        return like.contiguous(memory_format=torch.channels_last) if self.input.stride(1) == 1 else like
