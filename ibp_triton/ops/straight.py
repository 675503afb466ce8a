"""The operators as the sweeps call them: past torch's dispatcher, which takes 30 µs, where nothing there would look.

Whoever looks gets the operator: autograd, torch.compile and other tracers, torch.func's transforms, dispatch modes,
profilers, and subclasses of Tensor.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from ibp_triton.kernels.combine import PartSums
from ibp_triton.ops import activation_operators, attention_operators, norm_operators, operators


def unseen() -> bool:
    """Whether nothing of torch would look at an operator on plain tensors."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._autograd._profiler_enabled()
    )


def straight(operator: CustomOpDef, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A function (the operator's own) where it is `unseen`, else the operator; its first argument tells tensors."""
    unwrapped = operator._init_fn if function is None else function

    def call(first: Any, *args: Any, **kwargs: Any) -> Any:
        one = first[0] if isinstance(first, list) else first
        return (unwrapped if type(one) is Tensor and unseen() else operator)(first, *args, **kwargs)

    return call


_LATER: ContextVar[PartSums | None] = ContextVar("later", default=None)


@contextmanager
def sums_together() -> Iterator[Callable[[], None]]:
    """A block whose weight gradients nothing reads before its end, or before it calls what it is given.

    Where nothing of torch's would look at them, their parts are then summed several to a launch.
    """
    sums = PartSums()
    token = _LATER.set(sums)
    try:
        yield sums.now
    finally:
        _LATER.reset(token)
    sums.now()


def _weight_gradient(*args: Any, **kwargs: Any) -> Any:
    return operators.weight_gradient._init_fn(*args, **kwargs, later=_LATER.get())


activation_curvature = straight(activation_operators.activation_curvature)
attention = straight(attention_operators.attention)
attention_jvp = straight(attention_operators.attention_jvp)
attention_vjp = straight(attention_operators.attention_vjp)
avg_pool2d = straight(operators.avg_pool2d)
avg_pool2d_vjp = straight(operators.avg_pool2d_vjp)
batch_norm_cross = straight(norm_operators.batch_norm_cross)
batch_norm_project = straight(norm_operators.batch_norm_project)
conv2d = straight(operators.conv2d)
conv2d_max_pool2d = straight(operators.conv2d_max_pool2d)
conv2d_max_pool2d_jvp = straight(operators.conv2d_max_pool2d_jvp)
conv2d_vjp = straight(operators.conv2d_vjp)
cross_entropy = straight(operators.cross_entropy)
fast_tbp_seed = straight(operators.fast_tbp_seed)
fgsm_step = straight(operators.fgsm_step)
group_norm = straight(norm_operators.group_norm)
group_norm_cross = straight(norm_operators.group_norm_cross)
group_norm_curvature = straight(norm_operators.group_norm_curvature)
group_norm_jvp = straight(norm_operators.group_norm_jvp)
group_norm_vjp = straight(norm_operators.group_norm_vjp)
hessian_product = straight(operators.hessian_product)
linear = straight(operators.linear)
linear_activation = straight(activation_operators.linear_activation)
linear_vjp = straight(operators.linear_vjp)
max_pool2d = straight(operators.max_pool2d)
max_pool2d_jvp = straight(operators.max_pool2d_jvp)
max_pool2d_vjp = straight(operators.max_pool2d_vjp)
norm_seed = straight(operators.norm_seed)
norm_value = straight(operators.norm_value)
objective = straight(operators.objective)
relu = straight(operators.relu)
weight_gradient = straight(operators.weight_gradient, _weight_gradient)
