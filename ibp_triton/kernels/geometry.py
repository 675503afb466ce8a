"""Sizes of a convolution or a pooling: the constants of a kernel, and the counts that its cost follows from."""

import math
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from torch import Tensor

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """A window that slides over an image: input H×W, output OH×OW, all as (height, width)."""

    size: Pair
    out: Pair
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    @classmethod
    def conv(cls, size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> "Geometry":
        """The geometry of a convolution; raises ValueError when the kernel is larger than the padded image."""
        out = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
        )
        if min(out) < 1:
            raise ValueError(
                f"a {kernel} kernel with dilation {dilation} does not fit a {size} image, padding {padding}"
            )
        return cls(size, (out[0], out[1]), kernel, stride, padding, dilation)

    @classmethod
    def pool(
        cls, size: Pair, kernel: Pair, stride: Pair, padding: Pair, ceil: bool, margin: Pair = (0, 0)
    ) -> "Geometry":
        """The geometry of a pooling, with torch's rule that no window starts beyond the image and its left padding.

        `margin` is further padding at the far ends only (rows below, columns to the right).
        """
        out = []
        for far, k, s, p, m in zip(size, kernel, stride, padding, margin, strict=True):
            n = far + m
            if 2 * p > k:
                raise ValueError(f"padding {p} is over half of the window {k}")
            windows = (n + 2 * p - k + (s - 1 if ceil else 0)) // s + 1
            out.append(windows - 1 if ceil and (windows - 1) * s >= n + p else windows)
        if min(out) < 1:
            raise ValueError(f"a {kernel} window does not fit a {size} image, padding {padding}")
        return cls(size, (out[0], out[1]), kernel, stride, padding)

    @property
    def constants(self) -> tuple[int, ...]:
        """What the kernels call GEOMETRY: H, W, OH, OW, KH, KW, stride, padding, dilation."""
        return (*self.size, *self.out, *self.kernel, *self.stride, *self.padding, *self.dilation)

    @property
    def reversed(self) -> tuple[int, ...]:
        """GEOMETRY of the transposed convolution: from OH×OW to H×W."""
        return (*self.out, *self.size, *self.kernel, *self.stride, *self.padding, *self.dilation)

    @property
    def positions(self) -> int:
        """OH · OW."""
        return self.out[0] * self.out[1]

    @property
    def pixels(self) -> int:
        """H · W."""
        return self.size[0] * self.size[1]

    @property
    def taps(self) -> int:
        """KH · KW."""
        return self.kernel[0] * self.kernel[1]

    @property
    def inside(self) -> int:
        """Pairs of a position and a tap that meet a pixel, not the padding."""
        return self._along(0) * self._along(1)

    def _along(self, axis: int) -> int:
        sizes = (self.size, self.out, self.kernel, self.stride, self.padding, self.dilation)
        return _meeting(*(pair[axis] for pair in sizes))


@lru_cache(256)
def _meeting(n: int, m: int, k: int, s: int, p: int, d: int) -> int:
    """Pairs of a position and a tap along one axis that meet a pixel; asked for at each launch."""
    return sum(0 <= o * s - p + i * d < n for o, i in product(range(m), range(k)))


def sample_stride(x: Tensor, axis: int) -> int:
    """The stride from one sample to the next; that of dense samples where there is one, whose own may be anything."""
    return x.stride(axis) if x.shape[axis] > 1 else math.prod(x.shape[axis + 1 :])


ONE = Geometry((1, 1), (1, 1), (1, 1))  # a linear layer: one position, one tap
