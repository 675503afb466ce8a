"""The axis of replicas: networks side by side in one launch, each on weights of its own.

A kernel finds its replica by its place in the grid and moves its pointers there, by 64-bit offsets; all that follows is
as for one. Of one replica nothing is compiled that was not there before: `REPLICATED` is a constant.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ibp_triton.kernels.plans import Layout


@dataclass(frozen=True)
class Replicas:
    """How many calls are one launch, and where the tensors of each lie."""

    count: int  # R
    axis: bool  # whether tensors are [R, ...]; without it R = 1
    strides: tuple[int, ...]  # of each tensor from one replica to the next; 0 where they share it or there is none

    @property
    def several(self) -> bool:
        """REPLICATED of the kernels."""
        return self.count > 1

    def owned(self, *names: str) -> dict[str, int]:
        """Of tensors `side_by_side`, NAME_r: 1 for one of which each replica has its own, 0 for one that all share."""
        return {f"{name}_r": int(step > 0) for name, step in zip(names, self.strides, strict=True)}

    def layout(self, one: Layout) -> Layout:
        """Of all replicas' results, each laid out like `one`, one behind the other."""
        return Layout((self.count, *one.shape), (one.numel, *one.strides), one.dtype) if self.axis else one

    def only(self, *kept: int) -> "Replicas":
        """With these strides in place of all."""
        return Replicas(self.count, self.axis, kept)


def side_by_side(tensor: Tensor) -> Tensor:
    """[R, ...] that is shared or whose replicas lie one behind the other without a gap; a copy of any other."""
    if len(tensor) == 1 or tensor.stride(0) in (0, tensor.numel() // len(tensor)):
        return tensor
    one = Layout.of(torch.empty_like(tensor[0], device="meta"))
    return Replicas(len(tensor), True, ()).layout(one).empty(tensor).copy_(tensor)


def beside(axis: bool, *tensors: Tensor | None) -> list[Any]:
    """Each of several `side_by_side`, if there is an axis of replicas."""
    return [side_by_side(t) if axis and t is not None else t for t in tensors]


def in_place(number: float | Tensor) -> float | Tensor:
    """A number for all replicas, or [R] of them one behind the other."""
    return side_by_side(number) if isinstance(number, Tensor) else number


def taken_apart(axis: bool, *tensors: Tensor | None) -> tuple[Replicas, list[Any]]:
    """The replicas of a call, and the tensors of the first of them; `axis`: whether [R, ...] lies in front of each.

    Raises ValueError for tensors of different R.
    """
    if not axis:
        return Replicas(1, False, (0,) * len(tensors)), list(tensors)
    count = {len(t) for t in tensors if t is not None}
    if len(count) != 1:
        raise ValueError(f"the axes of replicas in front of tensors must have one length, not {sorted(count)}")
    strides = tuple(0 if t is None or len(t) == 1 else t.stride(0) for t in tensors)
    return Replicas(count.pop(), True, strides), [None if t is None else t[0] for t in tensors]
