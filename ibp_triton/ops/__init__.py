"""The kernels as torch operators with fake implementations, derivatives and rules for vmap."""

from ibp_triton.ops import batching as _batching  # noqa: F401 - registers them
from ibp_triton.ops import derivatives as _derivatives  # noqa: F401 - registers them
from ibp_triton.ops import shapes as _shapes  # noqa: F401 - registers them
from ibp_triton.ops.activation_operators import activation_curvature, linear_activation
from ibp_triton.ops.attention_operators import attention, attention_jvp, attention_vjp
from ibp_triton.ops.norm_operators import (
    batch_norm_cross,
    batch_norm_project,
    group_norm,
    group_norm_cross,
    group_norm_curvature,
    group_norm_jvp,
    group_norm_vjp,
)
from ibp_triton.ops.operators import (
    avg_pool2d,
    avg_pool2d_vjp,
    conv2d,
    conv2d_max_pool2d,
    conv2d_max_pool2d_jvp,
    conv2d_vjp,
    cross_entropy,
    fast_tbp_seed,
    fgsm_step,
    hessian_product,
    linear,
    linear_vjp,
    max_pool2d,
    max_pool2d_jvp,
    max_pool2d_vjp,
    norm_seed,
    norm_value,
    objective,
    relu,
    weight_gradient,
)

__all__ = [
    "activation_curvature",
    "attention",
    "attention_jvp",
    "attention_vjp",
    "avg_pool2d",
    "avg_pool2d_vjp",
    "batch_norm_cross",
    "batch_norm_project",
    "conv2d",
    "conv2d_max_pool2d",
    "conv2d_max_pool2d_jvp",
    "conv2d_vjp",
    "cross_entropy",
    "fast_tbp_seed",
    "fgsm_step",
    "group_norm",
    "group_norm_cross",
    "group_norm_curvature",
    "group_norm_jvp",
    "group_norm_vjp",
    "hessian_product",
    "linear",
    "linear_activation",
    "linear_vjp",
    "max_pool2d",
    "max_pool2d_jvp",
    "max_pool2d_vjp",
    "norm_seed",
    "norm_value",
    "objective",
    "relu",
    "weight_gradient",
]
