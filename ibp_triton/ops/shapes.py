"""Fake implementations of the operators: shapes, dtypes and strides without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ibp_triton.kernels.geometry import Geometry
from ibp_triton.kernels.plans import channels_last
from ibp_triton.ops import operators as ops
from ibp_triton.ops.operators import conv_geometry, pool_geometry


def _conv_shape(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, *_: Any, **__: Any) -> Tensor:
    geometry = conv_geometry(x.shape[3:], weight.shape[2:], stride, padding, dilation)
    return channels_last(x, (x.shape[0], x.shape[1], weight.shape[0], *geometry.out))


def _conv_back(d: Tensor, weight: Tensor, size: Any, *_: Any, **__: Any) -> Tensor:
    return channels_last(d, (d.shape[0], d.shape[1], weight.shape[1], *size))


def _gradient(
    lefts: Any,
    rights: Any,
    coefficients: Any,
    biased: Any,
    signs: Any,
    _: Any,
    weight: Tensor,
    *more: Any,
    **named: Any,
) -> tuple[Tensor, Tensor]:
    wide = more[4] if len(more) > 4 else named.get("wide", False)  # behind stride, padding, dilation, scale
    dtype = torch.float32 if wide else weight.dtype
    bias = weight.shape[0] if any(biased) else 0
    return torch.empty_like(weight, dtype=dtype), weight.new_empty((bias,), dtype=dtype)


def _pooled(t: Tensor, geometry: Geometry, channels_first: bool) -> Tensor:
    shape = (t.shape[0], t.shape[1], t.shape[2], *geometry.out)
    return t.new_empty(shape) if channels_first else channels_last(t, shape)


def _max_shape(x: Tensor, kernel: Any, stride: Any, padding: Any, margin: Any, ceil: bool = False,
              relu: bool = False, channels_first: bool = False) -> Any:  # fmt: skip
    y = _pooled(x[None], pool_geometry(x.shape[2:], kernel, stride, padding, ceil, margin), channels_first)[0]
    return y, y.new_empty((y.shape[0], y.shape[2], y.shape[3], y.shape[1]), dtype=torch.uint8)


def _joined(x: Tensor, weight: Tensor, conv: Any, pool: Any, channels_first: bool) -> Tensor:
    geometry = conv_geometry(x.shape[3:], weight.shape[2:], *conv)
    return _pooled(
        x.new_empty((*x.shape[:2], weight.shape[0], *geometry.out)), pool_geometry(geometry.out, *pool), channels_first
    )


def _joined_max(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, bias: Any, kernel: Any,
               pool_stride: Any, pool_padding: Any, margin: Any, ceil: bool = False, relu: bool = False,
               channels_first: bool = False) -> Any:  # fmt: skip
    pool = (kernel, pool_stride, pool_padding, ceil, margin)
    y = _joined(x[None], weight, (stride, padding, dilation), pool, channels_first)[0]
    return y, y.new_empty((y.shape[0], y.shape[2], y.shape[3], y.shape[1]), dtype=torch.uint8)


def _joined_jvp(t: Tensor, weight: Tensor, code: Tensor, stride: Any, padding: Any, dilation: Any, kernel: Any,
               pool_stride: Any, pool_padding: Any, margin: Any, ceil: bool = False, sign: bool = False,
               channels_first: bool = False) -> Tensor:  # fmt: skip
    pool = (kernel, pool_stride, pool_padding, ceil, margin)
    return _joined(t, weight, (stride, padding, dilation), pool, channels_first)


def _back(d: Tensor, size: Any) -> Tensor:
    return channels_last(d, (d.shape[0], d.shape[1], d.shape[2], *size))


ops.linear.register_fake(lambda x, weight, *_, **__: x.new_empty((*x.shape[:2], weight.shape[0])))
ops.linear_vjp.register_fake(lambda d, weight, *_, **__: d.new_empty((*d.shape[:2], weight.shape[1])))
ops.conv2d.register_fake(_conv_shape)
ops.conv2d_vjp.register_fake(_conv_back)
ops.weight_gradient.register_fake(_gradient)
ops.max_pool2d.register_fake(_max_shape)
ops.conv2d_max_pool2d.register_fake(_joined_max)
ops.conv2d_max_pool2d_jvp.register_fake(_joined_jvp)
ops.max_pool2d_jvp.register_fake(
    lambda t, code, kernel, stride, padding, margin, ceil=False, channels_first=False: _pooled(
        t, pool_geometry(t.shape[3:], kernel, stride, padding, ceil, margin), channels_first
    )
)
ops.avg_pool2d.register_fake(
    lambda t, kernel, stride, padding, ceil=False, count_padding=True, channels_first=False: _pooled(
        t, pool_geometry(t.shape[3:], kernel, stride, padding, ceil), channels_first
    )
)
ops.max_pool2d_vjp.register_fake(lambda d, code, size, *_, **__: _back(d, size))
ops.avg_pool2d_vjp.register_fake(lambda d, size, *_, **__: _back(d, size))
for like_the_first in (ops.relu, ops.fgsm_step):
    like_the_first.register_fake(lambda x, *_, **__: torch.empty_like(x))
ops.hessian_product.register_fake(lambda z, t: torch.empty_like(t))
ops.cross_entropy.register_fake(
    lambda z, labels: (
        z.new_empty((z.shape[0],), dtype=torch.float32),
        z.new_empty(z.shape),
        z.new_empty((z.shape[0],), dtype=torch.int32),
    )
)
ops.objective.register_fake(lambda losses, *_, **__: losses.new_empty((), dtype=torch.float32))
ops.norm_value.register_fake(lambda u, norm: u.new_empty((u.shape[0],), dtype=torch.float32))
for seeded in (ops.norm_seed, ops.fast_tbp_seed):
    seeded.register_fake(lambda u, *_, **__: (torch.empty_like(u), u.new_empty((u.shape[0],), dtype=torch.float32)))
