"""The operators as the sweeps call them: past torch's dispatcher, which takes 30 µs, where nothing there would look.

Whoever looks gets the operator: autograd, torch.compile and other tracers, torch.func's transforms, dispatch modes,
profilers, and subclasses of Tensor.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

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


def straight(operator: CustomOpDef) -> Callable[..., Any]:
    """An operator's own function where it is `unseen`, else the operator; its first argument tells plain tensors."""
    function = operator._init_fn

    def call(first: Any, *args: Any, **kwargs: Any) -> Any:
        one = first[0] if isinstance(first, list) else first
        return (function if type(one) is Tensor and unseen() else operator)(first, *args, **kwargs)

    return call


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
weight_gradient = straight(operators.weight_gradient)
