"""Plans, kept: what follows from the layouts of a call's tensors is worked out once, and looked up afterwards.

A plan may hold whatever its maker derives from shapes, strides, dtypes, devices and settings: checks, tiles, grids,
constants, costs. It never holds a tensor. What else decides is part of the key (torch's settings of float32 products,
the chip that tiles are chosen for) or looked at again (tiles that were tuned).
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

from ibp_triton.kernels import tiles
from ibp_triton.kernels.launcher import LaunchPlan
from ibp_triton.kernels.tiles import Config, Key

LIMIT = 4096  # plans; the oldest goes first
P = TypeVar("P")


@dataclass(frozen=True)
class Layout:
    """Shape, strides and dtype of a result."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout":
        """That of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    @classmethod
    def dense(cls, shape: Sequence[int], dtype: torch.dtype) -> "Layout":
        """Without gaps, the last axis contiguous."""
        return cls.of(torch.empty(tuple(shape), dtype=dtype, device="meta"))

    @classmethod
    def channels_last(cls, shape: Sequence[int], dtype: torch.dtype) -> "Layout":
        """Of [T, N, C, H, W] with the channels contiguous."""
        return cls.of(channels_last(torch.empty((), dtype=dtype, device="meta"), shape))

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the elements."""
        return self.numel * self.dtype.itemsize

    def empty(self, like: Tensor) -> Tensor:
        """A new tensor of this layout on the device of another."""
        return like.new_empty_strided(self.shape, self.strides, dtype=self.dtype)


def channels_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty [T, N, C, H, W] tensor with the channels contiguous, of the dtype and on the device of `like`."""
    tangents, samples, channels, height, width = shape
    return like.new_empty((tangents, samples, height, width, channels)).permute(0, 1, 4, 2, 3)


@dataclass(frozen=True)
class Result:
    """A launch, and the layout of what it makes."""

    out: Layout
    plan: LaunchPlan


@dataclass(frozen=True)
class CodedResult(Result):
    """One that makes a byte a window besides."""

    code: Layout


@dataclass(frozen=True)
class _Kept:
    plan: Any
    chosen: dict[Key, Config | None]  # which tiles were asked for, and what was tuned for them
    tuned: bool  # whether anything was

    def stands(self) -> bool:
        """Whether the same tiles would be chosen now; whoever watches the choices is told of them."""
        for watcher in tiles.watchers:
            watcher.update(self.chosen)
        return all(tiles.tuned.get(key) is tile for key, tile in self.chosen.items())


_kept: dict[Hashable, _Kept] = {}
_making = Lock()  # one thread at a time watches what is chosen


def planned(make: Callable[..., P], settings: tuple[Hashable, ...], *tensors: Tensor | None) -> P:
    """make(*settings, *tensors), made once for these settings and for tensors of these layouts.

    What `make` raises is raised at every call.
    """
    key = (
        make,
        settings,
        tiles.surroundings(),
        *[None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors],
    )
    kept = _kept.get(key)
    if kept is None or ((kept.tuned or tiles.tuned or tiles.watchers) and not kept.stands()):
        with _making:
            kept = _made(make, settings, tensors)
            while len(_kept) >= LIMIT:
                del _kept[next(iter(_kept))]
            _kept[key] = kept
    plan: P = kept.plan
    return plan


def forget() -> None:
    """Keep no plan: what they were made for is gone."""
    _kept.clear()


def _made(make: Callable[..., Any], settings: tuple[Hashable, ...], tensors: tuple[Tensor | None, ...]) -> _Kept:
    asked: set[Key] = set()
    tiles.watchers.append(asked)
    try:
        plan = make(*settings, *tensors)
    finally:
        tiles.watchers[:] = [watcher for watcher in tiles.watchers if watcher is not asked]  # not one that is equal
    chosen = {key: tiles.tuned.get(key) for key in asked}
    return _Kept(plan, chosen, any(chosen.values()))
