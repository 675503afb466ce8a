"""Each kernel as a torch custom operator, ``torch.ops.ibp_triton.*``: known to torch.compile, profilers and autograd.

Operators take a leading axis of tangents, [T, N, ...], T = 1 for a plain batch, because a sweep of T tangents shares
the weights and the masks. Images are [T, N, C, H, W], best with the channels contiguous in memory; results are so.
float32, bfloat16 and float16 throughout, with float32 sums. The linear operators (layers, their reverses, weight
gradients, pooling) are differentiable any number of times; ReLUs and masks count as constants where they are flat.
The functions under operators with weights also take an axis of replicas in front of all tensors, for vmap's rules.
Errors are those of the functions in ``ibp_triton.kernels``: ValueError for shapes, dtypes and strides,
RuntimeError where neither a CUDA device nor the interpreter is there.

Importing this module imports triton; ``import ibp_triton`` does not.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ibp_triton.kernels import conv as _conv
from ibp_triton.kernels import gates as _gates
from ibp_triton.kernels import gemm as _gemm
from ibp_triton.kernels import loss as _loss
from ibp_triton.kernels import norm_seeds as _norm_seeds
from ibp_triton.kernels import pool as _pool
from ibp_triton.kernels import pooled_conv as _pooled_conv
from ibp_triton.kernels import wgrad as _wgrad
from ibp_triton.kernels.combine import PartSums
from ibp_triton.kernels.geometry import ONE, Geometry


def numbers(some: Sequence[float], on_device: Sequence[Tensor | None]) -> list[Any]:
    """These numbers, those that lie on the device as tensors."""
    return [n if t is None else t for n, t in zip(some, on_device or [None] * len(some), strict=True)]


def apart(strengths: Sequence[Any]) -> tuple[list[float], list[Tensor | None]]:
    """Strengths as an operator takes them: the numbers, and if some lie on a device, the tensors in their places."""
    tensors = [s if isinstance(s, Tensor) else None for s in strengths]
    numbers = [float("nan") if isinstance(s, Tensor) else float(s) for s in strengths]
    return numbers, tensors if any(t is not None for t in tensors) else []


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    height, width = sizes
    return height, width


def conv_geometry(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Geometry:
    """Of a convolution, from sizes as operators take them."""
    return Geometry.conv(_pair(size), _pair(kernel), _pair(stride), _pair(padding), _pair(dilation))


def pool_geometry(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil: bool,
    margin: Sequence[int] = (0, 0),
) -> Geometry:
    """Of a pooling, from sizes as operators take them."""
    return Geometry.pool(_pair(size), _pair(kernel), _pair(stride), _pair(padding), ceil, _pair(margin))


@lru_cache(1024)
def _kept(make: Callable[..., Geometry], *sizes: Any) -> Geometry:
    return make(*sizes)


def _once(make: Callable[..., Geometry], *sizes: Any) -> Geometry:
    """A geometry, made once for sizes that are numbers; those of a fake tensor may be symbols."""
    return _kept(make, *[tuple(some) if type(some) is list else some for some in sizes])


@custom_op("ibp_triton::linear", mutates_args=())
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    relu: bool = False,
    sign: bool = False,
    slope: Tensor | None = None,
) -> Tensor:
    """φ(ψ(x) Wᵀ + b): x [T, N, I], weight [O, I], bias [O], mask and slope [N, O] → [T, N, O]; see ``gemm.linear``."""
    return _gemm.linear(x, weight, bias, relu=relu, mask=mask, sign=sign, slope=slope)


@custom_op("ibp_triton::linear_vjp", mutates_args=())
def linear_vjp(d: Tensor, weight: Tensor, mask: Tensor | None = None, slope: Tensor | None = None) -> Tensor:
    """(d W) ⊙ [mask > 0], or ⊙ slope: d [T, N, O], weight [O, I], mask, slope [N, I] → [T, N, I]."""
    return _gemm.linear_vjp(d, weight, mask, slope)


@custom_op("ibp_triton::conv2d", mutates_args=())
def conv2d(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    relu: bool = False,
    sign: bool = False,
) -> Tensor:
    """φ(ψ(x) ∗ W + b): x [T, N, C, H, W], weight [O, C, KH, KW], mask [N, O, OH, OW] → [T, N, O, OH, OW]."""
    geometry = _once(conv_geometry, x.shape[-2:], weight.shape[-2:], stride, padding, dilation)
    return _conv.conv2d(x, weight, geometry, bias, relu=relu, mask=mask, sign=sign)


@custom_op("ibp_triton::conv2d_vjp", mutates_args=())
def conv2d_vjp(
    d: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Tensor | None = None,
) -> Tensor:
    """(Wᵀ ∗ d) ⊙ [mask > 0]: d [T, N, O, OH, OW], mask [N, C, H, W] → [T, N, C, H, W], (H, W) = ``size``."""
    return _conv.conv2d_vjp(d, weight, _once(conv_geometry, size, weight.shape[-2:], stride, padding, dilation), mask)


@custom_op(
    "ibp_triton::weight_gradient",
    mutates_args=(),
    schema="(Tensor[] lefts, Tensor[] rights, float[] coefficients, bool[] biased, bool[] signs, Tensor?[] on_device, "
    "Tensor weight, SymInt[] stride, SymInt[] padding, SymInt[] dilation, float scale=1.0, bool wide=False, "
    "Tensor? push=None, float beta=1.0) -> (Tensor, Tensor)",  # all but `later`
)
def weight_gradient(
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    coefficients: Sequence[float],
    biased: Sequence[bool],
    signs: Sequence[bool],
    on_device: Sequence[Tensor | None],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    scale: float = 1.0,
    wide: bool = False,
    push: Tensor | None = None,
    beta: float = 1.0,
    *,
    later: PartSums | None = None,
) -> tuple[Tensor, Tensor]:
    """scale · Σ_i coefficient_i · g(left_i, right_i) of a weight's shape, and the bias gradient of the biased terms.

    Args:
        lefts: one to four of [n_i, I], or [n_i, C, H, W] with the same strides.
        rights: [n_i, O], or [n_i, O, OH, OW] with the channels contiguous.
        coefficients: one for each term.
        biased: whether a term counts in the bias gradient, one flag for each.
        signs: whether a left side (of the first, its push if there is one) is read as its sign, one flag for each.
        on_device: 0-d tensors that stand for coefficients, and the last of all for beta, None for those that are
            numbers; [] where all are.
        weight: [O, I], or [O, C, KH, KW]; gives shape and order of axes.
        stride, padding, dilation: of the convolution; [1, 1], [0, 0], [1, 1] for a linear layer.
        scale: 1 / N.
        wide: a float32 result whatever the dtype of the weight.
        push: like the first left side, which is then read as left + beta · push (float32, not tf32).
        later: not of the operator, of the function alone: the results may hold nothing until it has made its sums.

    Returns: the gradient, and the bias gradient [O], [0] when no term has one.
    """
    geometry = ONE
    if weight.dim() > 3:
        geometry = _once(conv_geometry, lefts[0].shape[-2:], weight.shape[-2:], stride, padding, dilation)
    *coefficients, beta = numbers([*coefficients, beta], on_device)
    segments = [
        _wgrad.Segment(c, left, right, bias, push if i == 0 else None, sign)
        for i, (left, right, c, bias, sign) in enumerate(zip(lefts, rights, coefficients, biased, signs, strict=True))
    ]
    dtype = torch.float32 if wide else weight.dtype
    gradient, bias = _wgrad.weight_gradient(
        segments, weight, geometry, beta=beta, scale=scale, dtype=dtype, later=later
    )
    return gradient, gradient.new_empty((*weight.shape[: weight.dim() % 2], 0)) if bias is None else bias


@custom_op("ibp_triton::max_pool2d", mutates_args=())
def max_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    margin: Sequence[int],
    ceil: bool = False,
    relu: bool = False,
    channels_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """max over windows, then a ReLU if ``relu``: x [N, C, H, W] → [N, C, OH, OW] and offsets [N, OH, OW, C] uint8.

    ``margin`` [rows, columns] of -∞ below and to the right; ``channels_first`` lays the result out for a flatten.
    """
    geometry = _once(pool_geometry, x.shape[2:], kernel, stride, padding, ceil, margin)
    return _pool.max_pool2d(x, geometry, relu=relu, channels_first=channels_first)


@custom_op("ibp_triton::max_pool2d_jvp", mutates_args=())
def max_pool2d_jvp(
    t: Tensor,
    code: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    margin: Sequence[int],
    ceil: bool = False,
    channels_first: bool = False,
) -> Tensor:
    """t [T, N, C, H, W] at the offsets of ``max_pool2d`` → [T, N, C, OH, OW]."""
    geometry = _once(pool_geometry, t.shape[3:], kernel, stride, padding, ceil, margin)
    return _pool.pool2d_jvp(t, code, geometry, channels_first=channels_first)


@custom_op("ibp_triton::max_pool2d_vjp", mutates_args=())
def max_pool2d_vjp(
    d: Tensor,
    code: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    margin: Sequence[int],
    ceil: bool = False,
) -> Tensor:
    """d [T, N, C, OH, OW] summed at the offsets of ``max_pool2d`` → [T, N, C, H, W], (H, W) = ``size``."""
    return _pool.pool2d_vjp(d, code, _once(pool_geometry, size, kernel, stride, padding, ceil, margin))


@custom_op("ibp_triton::conv2d_max_pool2d", mutates_args=())
def conv2d_max_pool2d(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    bias: Tensor | None,
    kernel: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    margin: Sequence[int],
    ceil: bool = False,
    relu: bool = False,
    channels_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """``max_pool2d`` of x ∗ W + b, x [N, C, H, W], in one launch where there is little to compute anew, else in two.

    Returns: what ``max_pool2d`` does, [N, O, PH, PW] and the offsets [N, PH, PW, O] uint8.
    """
    conv = _once(conv_geometry, x.shape[-2:], weight.shape[-2:], stride, padding, dilation)
    pool = _once(pool_geometry, conv.out, kernel, pool_stride, pool_padding, ceil, margin)
    if _pooled_conv.worth_it(x.unsqueeze(-5), conv, pool):
        return _pooled_conv.conv_max_pool(x, weight, conv, pool, bias, relu=relu, channels_first=channels_first)
    y = _conv.conv2d(x.unsqueeze(-5), weight, conv, bias).squeeze(-5)
    if x.dim() == 4:
        return _pool.max_pool2d(y, pool, relu=relu, channels_first=channels_first)
    y, code = _pool.max_pool2d(y.flatten(0, 1), pool, relu=relu, channels_first=channels_first)
    return y.unflatten(0, x.shape[:2]), code.unflatten(0, x.shape[:2])


@custom_op("ibp_triton::conv2d_max_pool2d_jvp", mutates_args=())
def conv2d_max_pool2d_jvp(
    t: Tensor,
    weight: Tensor,
    code: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    kernel: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    margin: Sequence[int],
    ceil: bool = False,
    sign: bool = False,
    channels_first: bool = False,
) -> Tensor:
    """ψ(t) ∗ W at the offsets of ``conv2d_max_pool2d``, t [T, N, C, H, W] → [T, N, O, PH, PW]; ψ: sign or none."""
    conv = _once(conv_geometry, t.shape[-2:], weight.shape[-2:], stride, padding, dilation)
    pool = _once(pool_geometry, conv.out, kernel, pool_stride, pool_padding, ceil, margin)
    if _pooled_conv.worth_it(t, conv, pool):
        return _pooled_conv.conv_max_pool_jvp(t, weight, code, conv, pool, sign=sign, channels_first=channels_first)
    y = _conv.conv2d(t, weight, conv, sign=sign)
    if t.dim() == 5:
        return _pool.pool2d_jvp(y, code, pool, channels_first=channels_first)
    every = y.movedim(0, 1).flatten(1, 2)
    out: Tensor = _pool.pool2d_jvp(every, code.flatten(0, 1), pool, channels_first=channels_first)
    return torch.unflatten(out, 1, (len(t), -1)).movedim(1, 0)


@custom_op("ibp_triton::avg_pool2d", mutates_args=())
def avg_pool2d(
    t: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil: bool = False,
    count_padding: bool = True,
    channels_first: bool = False,
) -> Tensor:
    """Means over windows, of activations and tangents alike: [T, N, C, H, W] → [T, N, C, OH, OW]."""
    geometry = _once(pool_geometry, t.shape[3:], kernel, stride, padding, ceil)
    return _pool.pool2d_jvp(t, None, geometry, count_padding=count_padding, channels_first=channels_first)


@custom_op("ibp_triton::avg_pool2d_vjp", mutates_args=())
def avg_pool2d_vjp(
    d: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil: bool = False,
    count_padding: bool = True,
) -> Tensor:
    """The reverse of ``avg_pool2d``: [T, N, C, OH, OW] → [T, N, C, H, W], (H, W) = ``size``."""
    return _pool.pool2d_vjp(
        d, None, _once(pool_geometry, size, kernel, stride, padding, ceil), count_padding=count_padding
    )


@custom_op("ibp_triton::relu", mutates_args=())
def relu(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """max(x, 0), or x ⊙ [mask > 0] for x [*S] or [T, *S] and mask [*S]."""
    return _gates.relu(x, mask)


@custom_op("ibp_triton::cross_entropy", mutates_args=())
def cross_entropy(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, M], labels [N] → losses [N] float32, c = softmax(z) − onehot(l) [N, M], hits [N] int32."""
    return _loss.cross_entropy(z, labels)


@custom_op("ibp_triton::hessian_product", mutates_args=())
def hessian_product(z: Tensor, t: Tensor) -> Tensor:
    """H t, H the Hessian of the cross-entropy at the logits z [N, M]; t [N, M] or [T, N, M]."""
    return _loss.hessian_product(z, t)


@custom_op("ibp_triton::objective", mutates_args=())
def objective(
    losses: Tensor,
    penalties: Tensor,
    a: float,
    b: float,
    on_device: Sequence[Tensor | None],
    scale: float = 1.0,
    absolute: bool = False,
) -> Tensor:
    """scale · (a Σ losses + b Σ penalties) (Σ |penalties| if ``absolute``), 0-d float32.

    ``on_device``: 0-d tensors that stand for a and b, None for those that are numbers; [] where both are.
    """
    a, b = numbers([a, b], on_device)
    return _loss.objective(losses, penalties, a, b, scale=scale, absolute=absolute)


@custom_op("ibp_triton::norm_seed", mutates_args=())
def norm_seed(u: Tensor, norm: float) -> tuple[Tensor, Tensor]:
    """ψ(u) = sign(u)|u|^(r−1) like u [N, ...], and ‖u‖_r^r / r of each sample [N] float32."""
    seed, value = _norm_seeds.norm_seed(u, norm)
    assert seed is not None
    return seed, value


@custom_op("ibp_triton::norm_value", mutates_args=())
def norm_value(u: Tensor, norm: float) -> Tensor:
    """‖u‖_r^r / r of each sample of u [N, ...]: [N] float32."""
    return _norm_seeds.norm_seed(u, norm, seed_wanted=False)[1]


@custom_op("ibp_triton::fgsm_step", mutates_args=())
def fgsm_step(x: Tensor, d: Tensor, epsilon: float, on_device: Tensor | None = None) -> Tensor:
    """x + ε sign(d), like x; ``on_device``: a 0-d tensor that stands for ε."""
    return _norm_seeds.fgsm_step(x, d, epsilon if on_device is None else on_device)


@custom_op("ibp_triton::fast_tbp_seed", mutates_args=())
def fast_tbp_seed(d: Tensor, tangents: Tensor, norm: float) -> tuple[Tensor, Tensor]:
    """Σ_j ψ(⟨d, τ_j⟩) τ_j like d [N, ...], and Σ_j |⟨d, τ_j⟩|^r / r [N] float32, for tangents [T, N, ...]."""
    return _norm_seeds.fast_tbp_seed(d, tangents, norm)
