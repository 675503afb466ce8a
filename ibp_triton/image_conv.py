"""The data gradient of a convolution over an image: shifted sums, where the usual kernel fills vectors with channels.

An image has 1 or 3 channels. Measured on AVX-512 cores at batch 32, oneDNN takes 4.0 ms where shifted sums take
0.6 ms (1 → 32 channels, 4×4) and 12.2 ms against 4 ms (3 → 64, 5×5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ibp_triton.layer import HALF, memory_format, wide

Sizes = Sequence[int]


def applies(input: Tensor, groups: int) -> bool:
    """Whether a 2-d convolution's input [N, C, H, W] has so few channels that shifted sums are quicker."""
    return input.dim() == 4 and groups == 1 and input.shape[1] <= 3 and not input.is_cuda


def data_gradient(d: Tensor, weight: Tensor, size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> Tensor:
    """d [N, out, H_out, W_out] and weight [out, C, k, k'] → [N, C, *size], channels last where d is."""
    found = [_of_samples(few, weight, size, stride, padding, dilation) for few in d.split(_samples(d, weight))]
    return torch.cat(found) if len(found) > 1 else found[0]


def _samples(d: Tensor, weight: Tensor) -> int:
    """So many that what is shifted stays in a core's cache: on 224×224 images (3 → 32 channels, 3×3) 38 ms, not 56."""
    return max(1, (1 << 20) // max(1, weight[0].numel() * d.shape[2] * d.shape[3]))


def _of_samples(d: Tensor, weight: Tensor, size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> Tensor:
    if _row_fills_vectors(weight, stride, padding, dilation):
        return _by_rows(d, weight, size, padding)
    return _by_columns(d, weight, size, stride, padding, dilation)


def _by_columns(d: Tensor, weight: Tensor, size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> Tensor:
    """Wᵀ d for every kernel position at once, [k, k', C, N, H_out, W_out], then one shifted sum each."""
    n, channels, (height, width) = d.shape[0], weight.shape[1], d.shape[2:]
    kernel = weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])
    columns = kernel @ d.permute(1, 0, 2, 3).reshape(d.shape[1], -1)
    columns = columns.view((*weight.shape[2:], channels, n, height, width))
    padded = [s + 2 * p for s, p in zip(size, padding, strict=True)]
    total = d.new_zeros(channels, n, *padded, dtype=torch.float32 if d.dtype in HALF else d.dtype)
    across = [_strided(j * dilation[1], width, stride[1]) for j in range(columns.shape[1])]
    for i, parts in enumerate(columns.unbind()):
        rows = total[:, :, _strided(i * dilation[0], height, stride[0])]
        for where, part in zip(across, parts.unbind(), strict=True):
            rows[..., where].add_(part)
    total = total[:, :, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]
    layout = memory_format(d) if channels > 1 else torch.contiguous_format
    return total.transpose(0, 1).to(d.dtype).contiguous(memory_format=layout)


def _row_fills_vectors(weight: Tensor, stride: Sizes, padding: Sizes, dilation: Sizes) -> bool:
    """Whether a kernel row of all channels is at least three quarters of whole vectors of 16 numbers.

    Then sums over the kernel's height are quicker as a convolution: 3.4 ms instead of 4.7, in bfloat16 2.2 instead
    of 3.2 (3 → 64 channels, 5×5, batch 32).
    """
    row, (height, width) = weight.shape[1] * weight.shape[3], weight.shape[2:]
    plain = [*stride] == [*dilation] == [1, 1] and padding[0] < height and padding[1] < width
    return plain and row >= 0.75 * 16 * math.ceil(row / 16)


def _by_rows(d: Tensor, weight: Tensor, size: Sizes, padding: Sizes) -> Tensor:
    """Sums over the kernel's height for each of its columns, [N, H, W_out, k', C], then one shifted sum each."""
    height, width = weight.shape[2:]
    kernel = weight.flip(2).permute(3, 1, 0, 2).reshape(-1, weight.shape[0], height, 1)
    rows = F.conv2d(d, kernel, padding=(height - 1 - padding[0], 0))
    rows = wide(rows.permute(0, 2, 3, 1)).unflatten(3, (width, -1))
    total = rows.new_zeros(d.shape[0], size[0], size[1] + 2 * padding[1], weight.shape[1])
    for j in range(width):
        total[:, :, j : j + d.shape[3]].add_(rows[:, :, :, j])
    total = total[:, :, padding[1] : padding[1] + size[1]]
    return total.permute(0, 3, 1, 2).to(d.dtype).contiguous(memory_format=memory_format(d))  # type: ignore[no-any-return]


def _strided(start: int, count: int, step: int) -> slice:
    """``count`` positions from ``start``."""
    return slice(start, start + (count - 1) * step + 1, step)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv2d`` with that data gradient in autograd's reverse sweep, where an image has a derivative."""
    if isinstance(padding, str) or not (input.requires_grad and torch.is_grad_enabled() and applies(input, groups)):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    both = [
        [value, value] if isinstance(value, int) else [*value] * (2 // len(value))
        for value in (stride, padding, dilation)
    ]
    return _Conv2d.apply(input, weight, bias, *both)  # type: ignore[no-any-return, no-untyped-call]


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Any:
        ctx.save_for_backward(input, weight)
        ctx.settings = settings
        return F.conv2d(input, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        (input, weight), (stride, padding, dilation) = ctx.saved_tensors, ctx.settings
        to_input, to_weight, to_bias = ctx.needs_input_grad[:3]
        again = torch.is_grad_enabled()  # derivatives of this derivative are wanted
        by_input, by_weight, by_bias = torch.ops.aten.convolution_backward(
            d, input, weight, None, stride, padding, dilation, False, [0, 0], 1, [to_input and again, to_weight, False]
        )
        if to_input and not again:
            by_input = data_gradient(d, weight, input.shape[2:], stride, padding, dilation)
        if to_bias:
            by_bias = d.sum([0, 2, 3])  # quicker than oneDNN's own
        return by_input, by_weight, by_bias, None, None, None
