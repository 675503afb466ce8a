"""One launch of each kind for every row of the table: what ahead-of-time checks and the kernel report go through.

The shapes are the paper's networks' at batch 32, channels last: the ones the table was made for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ibp_triton.kernels.attentions import attention, attention_jvp, attention_vjp
from ibp_triton.kernels.bends import activation_curvature
from ibp_triton.kernels.columns import batch_norm_cross, batch_norm_project
from ibp_triton.kernels.combine import PartSums
from ibp_triton.kernels.contract import LARGE, TALL
from ibp_triton.kernels.conv import conv2d, conv2d_vjp
from ibp_triton.kernels.gates import relu
from ibp_triton.kernels.gemm import linear, linear_activation, linear_vjp
from ibp_triton.kernels.geometry import ONE, Geometry
from ibp_triton.kernels.launcher import Launch, recording
from ibp_triton.kernels.loss import cross_entropy, hessian_product, objective
from ibp_triton.kernels.norm_seeds import fast_tbp_seed, fgsm_step, norm_seed
from ibp_triton.kernels.norms import (
    group_norm,
    group_norm_cross,
    group_norm_curvature,
    group_norm_jvp,
    group_norm_vjp,
    whole,
)
from ibp_triton.kernels.pool import max_pool2d, pool2d_jvp, pool2d_vjp
from ibp_triton.kernels.pooled_conv import conv_max_pool, conv_max_pool_jvp
from ibp_triton.kernels.smooth import Activation
from ibp_triton.kernels.tiles import on_chip
from ibp_triton.kernels.wgrad import Segment, weight_gradient

FIRST = Geometry.conv((28, 28), (4, 4), (1, 1), (0, 0), (1, 1))
SECOND = Geometry.conv((13, 13), (5, 5), (1, 1), (2, 2), (1, 1))
POOL = Geometry.pool((25, 25), (3, 3), (2, 2), (0, 0), True, (1, 1))
BATCH = 32

Make = Callable[..., torch.Tensor]


def matrix_cases(make: Make) -> None:
    """Everything with a matrix product in it; `make` gives a tensor of a shape, the channels of an image last."""
    x, w, b, d = make(1, BATCH, 3136), make(256, 3136), make(256), make(1, BATCH, 256)
    linear(x, w, b, relu=True)  # split
    linear_vjp(d, w, make(BATCH, 3136))
    linear(make(5, BATCH, 3136), w, mask=make(BATCH, 256))
    linear_vjp(make(5, BATCH, 256), w)
    image, kernel = make(1, BATCH, 1, 28, 28), make(32, 1, 4, 4)
    conv2d(image, kernel, FIRST, make(32))
    conv2d(image, kernel, FIRST, sign=True)
    for tangents in (1, 3):
        conv2d_vjp(make(tangents, BATCH // tangents, 32, 25, 25), kernel, FIRST)
    conv2d_vjp(make(1, 4 * BATCH, 32, 25, 25), kernel, FIRST)  # by taps
    weight_gradient([Segment(1.0, image[0], make(BATCH, 32, 25, 25), bias=True)], kernel, FIRST)
    for tangents in (1, 5):
        conv2d(make(tangents, BATCH, 32, 13, 13), make(64, 32, 5, 5), SECOND)
        conv2d_vjp(make(tangents, BATCH, 64, 13, 13), make(64, 32, 5, 5), SECOND, make(BATCH, 32, 13, 13))
    conv2d_vjp(make(1, BATCH, 64, 13, 13), make(64, 64, 5, 5), SECOND)
    many, rows = 1 + TALL // 169, 2 * LARGE // (3136 * 256)
    conv2d(make(1, many, 32, 13, 13), make(64, 32, 5, 5), SECOND, make(64), relu=True)
    for inputs in (32, 64):
        conv2d_vjp(make(1, many, 64, 13, 13), make(64, inputs, 5, 5), SECOND, make(many, inputs, 13, 13))
    linear(make(1, rows, 3136), w, b, relu=True)
    linear_vjp(make(1, rows, 256), w, make(rows, 3136))
    a, t, right = make(BATCH, 32, 13, 13), make(BATCH, 32, 13, 13), make(BATCH, 64, 13, 13)
    both = [Segment(1.0, a, right, bias=True), Segment(0.1, t, right)]
    weight_gradient(both, make(64, 32, 5, 5), SECOND)
    weight_gradient([Segment(1.0, x[0], d[0], bias=True), Segment(0.1, x[0], d[0])], w, ONE)


def merged_cases(make: Make) -> None:
    """The weight gradient that forms a + βt on the way in: exact float32 alone."""
    a, right = make(BATCH, 32, 13, 13), make(BATCH, 64, 13, 13)
    weight_gradient([Segment(1.0, a, right, bias=True, push=a)], make(64, 32, 5, 5), SECOND)
    x, d = make(BATCH, 3136), make(BATCH, 256)
    weight_gradient([Segment(1.0, x, d, bias=True, push=x, sign=True)], make(256, 3136), ONE)


def other_cases(make: Make) -> None:
    """Everything without a matrix product."""
    x = make(BATCH, 32, 25, 25)
    _, code = max_pool2d(x, POOL, relu=True)
    for tangents in (1, 5):
        for codes in (code, None):
            pool2d_jvp(make(tangents, BATCH, 32, 25, 25), codes, POOL)
            pool2d_vjp(make(tangents, BATCH, 32, 13, 13), codes, POOL)
    relu(x)
    relu(x, x)
    z, pixels = make(BATCH, 10), make(BATCH, 1, 28, 28)
    cross_entropy(z, torch.zeros(BATCH, dtype=torch.int64))
    hessian_product(z, z)
    objective(make(BATCH), make(BATCH), 1.0, 0.1)
    sums = PartSums()
    for parts, size in ((156, 512), (37, 51200)):
        sums.add(torch.zeros(parts, 1, size + 64), torch.zeros(size), torch.zeros(64), 1.0)
    sums.now()
    kernel = make(32, 1, 4, 4)
    _, code = conv_max_pool(pixels, kernel, FIRST, POOL, make(32), relu=True)
    conv_max_pool_jvp(pixels[None], kernel, code, FIRST, POOL, sign=True)
    conv_max_pool_jvp(make(5, BATCH, 1, 28, 28), kernel, code, FIRST, POOL)
    norm_seed(pixels)
    norm_seed(pixels, 1.5)
    fgsm_step(pixels, pixels, 0.1)
    fast_tbp_seed(pixels, make(5, BATCH, 1, 28, 28))


def replicated_cases(make: Make) -> None:
    """Three replicas of what has weights: split products, T tangents, an image that all share, the sum by taps."""
    three, rows, w = 3, make(3, BATCH, 3136), make(3, 256, 3136)
    linear(rows[:, None], w, make(three, 256), relu=True)
    linear_vjp(make(three, 5 * BATCH, 256).unflatten(1, (5, BATCH)), w, make(three, BATCH, 3136))
    image, kernel = make(1, BATCH, 1, 28, 28).expand(three, -1, -1, -1, -1, -1), make(three, 32, 1, 4, 4)
    conv2d(image, kernel, FIRST, make(three, 32))
    conv2d_vjp(make(three, 1, 8, 32, 25, 25), kernel, FIRST)
    conv2d_vjp(make(three, 1, 4 * BATCH, 32, 25, 25), kernel, FIRST)
    for tangents in (1, 5):
        right, wide = make(three, tangents, BATCH, 64, 13, 13), make(three, 64, 32, 5, 5)
        conv2d(make(three, tangents, BATCH, 32, 13, 13), wide, SECOND)
        conv2d_vjp(right, wide, SECOND, make(three, BATCH, 32, 13, 13))
    right = make(three, BATCH, 32, 25, 25)
    weight_gradient([Segment(torch.ones(three), image[:, 0], right, bias=True)], kernel, FIRST)
    both = [Segment(1.0, rows, make(three, BATCH, 256), bias=True), Segment(0.1, rows, make(three, BATCH, 256))]
    weight_gradient(both, w, ONE)
    pixels = image[:, 0]
    _, code = conv_max_pool(pixels, kernel, FIRST, POOL, make(three, 32), relu=True)
    conv_max_pool_jvp(image, kernel, code, FIRST, POOL, sign=True)


def replicated_norm_cases(make: Make) -> None:
    """Three replicas of norms, with parameters of their own: rows of tokens, groups of channels, long ones, columns."""
    three = 3

    def swept(x: torch.Tensor, tangents: int) -> torch.Tensor:
        return make(three, tangents * x.shape[1], *x.shape[2:]).view(three, tangents, *x.shape[1:])

    layers = [(make(three, BATCH * 64, n), 1) for n in (96, 768)]
    images = [(make(three, BATCH, 64, 16, 16), 8), (make(three, BATCH, 128, 64, 64), 8)]
    for x, groups in layers + images:
        weight = make(three, x.shape[2])
        _, statistics = group_norm(x, groups, weight, weight, replicated=True)
        for tangents in (1, 5):
            v, right = swept(x, tangents), swept(x, tangents)
            group_norm_vjp(v, x, statistics, groups, weight, sums=tangents == 1, replicated=True)
            group_norm_jvp(v, x, statistics, groups, weight, right=right if tangents == 1 else None, replicated=True)
            group_norm_cross(v, right, x, statistics, groups, replicated=True)
            if whole(x[0], groups):
                group_norm_curvature(v, right, x, statistics, groups, weight, replicated=True)
    for x in (make(three, BATCH, 64, 32, 32), make(three, BATCH * 64, 256)):
        mean, rstd = torch.zeros(three, x.shape[2]), torch.zeros(three, x.shape[2])
        for tangents in (1, 5):
            v, right = swept(x, tangents), swept(x, tangents)
            _, sums = batch_norm_project(v, x, mean, rstd, make(three, x.shape[2]), replicated=True)
            batch_norm_cross(v, right, sums, x, mean, rstd, replicated=True)


def norm_cases(make: Make) -> None:
    """Layer norms of short, middle and long rows, group norms, the last with rows over a tile, batch norms."""
    layers = [(make(BATCH * rows, n), 1) for rows, n in ((64, 96), (64, 768), (8, 4096), (8, 8192))]
    images = [(make(BATCH, 64, 16, 16), 8), (make(BATCH, 128, 64, 64), 8)]
    for x, groups in layers + images:
        weight = make(x.shape[1])
        _, statistics = group_norm(x, groups, weight, weight)
        for tangents in (1, 5):
            v, right = make(tangents, *x.shape), make(tangents, *x.shape)
            group_norm_vjp(v, x, statistics, groups, weight, sums=tangents == 1)
            group_norm_jvp(v, x, statistics, groups, weight, right=right if tangents == 1 else None)
            group_norm_cross(v, right, x, statistics, groups)
            if whole(x, groups):
                group_norm_curvature(v, right, x, statistics, groups, weight)
    for x in (make(BATCH, 64, 32, 32), make(BATCH * 64, 256)):
        mean, rstd = torch.zeros(x.shape[1]), torch.zeros(x.shape[1])
        for tangents in (1, 5):
            v, right = make(tangents, *x.shape), make(tangents, *x.shape)
            _, sums = batch_norm_project(v, x, mean, rstd, make(x.shape[1]))
            batch_norm_cross(v, right, sums, x, mean, rstd)
    x = make(BATCH * 64, 768)
    _, statistics = group_norm(x, 1, x[0], centred=False)
    group_norm_jvp(x[None], x, statistics, 1, x[0])


def activation_cases(make: Make) -> None:
    """Linear layers with smooth activations: a ViT-tiny's block at 197 tokens, an MLP, and one that is split."""
    smooth = [activation for activation in Activation if activation != Activation.NONE]
    for rows, inputs, hidden, outputs in ((BATCH * 197, 192, 768, 192), (BATCH, 784, 512, 512), (BATCH, 3136, 256, 10)):
        x, w, b, slope = make(1, rows, inputs), make(hidden, inputs), make(hidden), make(rows, hidden)
        for activation in smooth:
            linear_activation(x, w, b, activation)
        for tangents in (1, 5):
            linear(make(tangents, rows, inputs), w, slope=slope)
            linear_vjp(make(tangents, rows, outputs), make(outputs, hidden), slope=slope)
        linear(x, w, slope=slope, sign=True)
    for activation in smooth:
        for tangents in (1, 5):
            v, right = make(tangents, BATCH * 197, 768), make(tangents, BATCH * 197, 768)
            activation_curvature(v, right, make(BATCH * 197, 768), activation)


def attention_cases(make: Make) -> None:
    """Layers of a small vision transformer: up to 64 tokens, more of them, wide heads; two tangents."""
    for tokens, width in ((64, 64), (197, 64), (197, 128)):
        q, k, v = (side.transpose(1, 2) for side in make(2, tokens, 9 * width).view(2, tokens, 3, 3, width).unbind(2))
        t = [make(4, tokens, 3 * width).view(2, 2, tokens, 3, width).transpose(2, 3) for _ in range(3)]
        out, lse = attention(q, k, v, scale=0.125)
        attention_jvp(t, q, k, v, out, lse, scale=0.125)
        attention_vjp(t[0], q, k, v, out, lse, scale=0.125)


def zeros(dtype: torch.dtype) -> Make:
    """Tensors of zeros in a dtype, images with their channels last."""

    def make(*shape: int) -> torch.Tensor:
        if len(shape) < 4:
            return torch.zeros(shape, dtype=dtype)
        *lead, channels, height, width = shape
        return torch.zeros((*lead, height, width, channels), dtype=dtype).movedim(-1, -3)

    return make


def collected(family: str, dtype: torch.dtype, tf32: bool, *cases: Callable[[Make], None]) -> list[Launch]:
    """The launches of cases on a chip family in a dtype, none of them run; float32 with or without tf32."""
    with on_chip(family), allowing_tf32(tf32), recording(execute=False) as record:
        for some in cases:
            some(zeros(dtype))
    return record


def launches(family: str, dtype: torch.dtype, tf32: bool = False) -> list[Launch]:
    """Those of the table's cases."""
    chosen = [matrix_cases]
    if dtype == torch.float32 and not tf32:
        chosen.append(merged_cases)
    if not tf32 and dtype != torch.float16:  # as in bfloat16: they widen what they load
        chosen += [other_cases, norm_cases]
    return collected(family, dtype, tf32, *chosen)


@contextmanager
def allowing_tf32(allowed: bool) -> Iterator[None]:
    """torch's settings for float32 matrix products and convolutions, for a block."""
    cudnn: Any = torch.backends.cudnn  # its settings are made at run time
    settings = (torch.backends.cuda.matmul, cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32" if allowed else "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
