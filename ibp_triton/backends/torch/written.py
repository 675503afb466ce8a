"""What in-place writes do to the other tensors that share their memory."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from ibp_triton.layer import Layer, Names, Tangents

Geometry = tuple[tuple[int, ...], tuple[int, ...], int]  # size, stride and offset in elements


def geometry(x: Tensor) -> Geometry:
    """Which elements of its storage a tensor shows."""
    return tuple(x.shape), tuple(x.stride()), int(x.storage_offset())


def seen(reader: Geometry, writer: Geometry) -> np.ndarray[Any, Any]:
    """For each element of a tensor, in order, its position in what was written, −1 where the write passed it by."""
    ends = [
        offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        for size, stride, offset in (reader, writer)
    ]
    written = np.full(max(ends) + 1, -1, dtype=np.int64)
    _elements(written, writer)[...] = np.arange(_count(writer)).reshape(writer[0])
    return _elements(written, reader).reshape(-1)


def _last(place: Geometry) -> int:
    size, stride, offset = place
    return offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))


def _count(place: Geometry) -> int:
    return math.prod(place[0])


def _elements(storage: np.ndarray[Any, Any], place: Geometry) -> np.ndarray[Any, Any]:
    size, stride, offset = place
    return as_strided(storage[offset:], size, tuple(8 * s for s in stride))


class Written(Layer):
    """A tensor after a write to memory it shares: ``new`` where the write went, ``old`` elsewhere. Linear in both."""

    label = "view of a write"

    def forward(self, now: Tensor, positions: Tensor, new: tuple[int, ...]) -> Tensor:
        """The numbers are there; ``positions`` says which are whose (see ``seen``), ``new`` the shape of the write."""
        self.shape, self.source, self.positions = now.shape, new, positions
        return now

    @cached_property
    def _mask(self) -> Tensor:
        return (self.positions >= 0).view(self.shape)

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d where the old numbers still are; d at the written ones, added up where they show more than once."""
        out, lead = {}, d.shape[: d.dim() - len(self.shape)]
        if "old" in wanted:
            out["old"] = d.masked_fill(self._mask, 0)
        if "new" in wanted:
            hit = self.positions >= 0
            flat = d.new_zeros((*lead, math.prod(self.source)))
            index, rows = self.positions[hit], d.reshape((*lead, -1))[..., hit]
            out["new"] = flat.index_add(len(lead), index, rows).view((*lead, *self.source))
        return out

    def jvp(self, t: Tangents) -> Tensor:
        """The same selection of the tangents."""
        name, some = next(iter(t.items()))
        lead = some.shape[: some.dim() - len(self.source if name == "new" else self.shape)]
        old = t["old"] if "old" in t else some.new_zeros((*lead, *self.shape))
        if "new" not in t:
            return old.masked_fill(self._mask, 0)
        new = t["new"].reshape((*lead, -1))[..., self.positions.clamp(min=0)].view((*lead, *self.shape))
        return torch.where(self._mask, new, old)
