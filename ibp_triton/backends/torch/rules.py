"""Which rule a torch function gets."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ibp_triton.backends.torch.activations import (
    CELU,
    ELU,
    GLU,
    UNARY,
    Clamp,
    ClampMax,
    ClampMin,
    Hardtanh,
    Power,
    PReLU,
    ReLU6,
)
from ibp_triton.backends.torch.attention import ScaledDotProductAttention
from ibp_triton.backends.torch.batch_norm import BatchNorm, BatchNormEval, InstanceNormEval
from ibp_triton.backends.torch.binary import (
    Divide,
    Maximum,
    MaximumOf,
    Minimum,
    MinimumOf,
    Multiply,
    ReverseDivide,
    Where,
)
from ibp_triton.backends.torch.blends import AddAt, AddProduct, Lerp, ScatterAdd
from ibp_triton.backends.torch.dense import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    Dense,
)
from ibp_triton.backends.torch.moves import (
    CumulativeSum,
    Expand,
    Flip,
    Identity,
    Mean,
    MoveAxis,
    Negative,
    Permute,
    ReverseAxes,
    Roll,
    Sum,
    Transpose,
)
from ibp_triton.backends.torch.multihead import MultiHeadAttention
from ibp_triton.backends.torch.normalisation import GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from ibp_triton.backends.torch.pointwise import (
    GELU,
    ChannelDropout,
    Dropout,
    LeakyReLU,
    ReLU,
    Sigmoid,
    SiLU,
    Softplus,
    Tanh,
)
from ibp_triton.backends.torch.pooling import AdaptiveAvgPool2d, MaxPool1d, MaxPool2d, MaxPool3d
from ibp_triton.backends.torch.products import BMM, AddMM, BAddBMM, Einsum, MatMul
from ibp_triton.backends.torch.reductions import (
    Deviation,
    EuclideanNorm,
    Extreme,
    LogSumExp,
    Normalize,
    Peak,
    Pick,
    Sort,
    TopK,
    Variance,
    VectorNorm,
)
from ibp_triton.backends.torch.selection import Gather, IndexSelect, Item, MaskedFill, Split, Stack, Triangle, Unbind
from ibp_triton.backends.torch.softmax import LogSoftmax, Softmax, TorchLogSoftmax, TorchSoftmax
from ibp_triton.backends.torch.structural import (
    Add,
    BatchedMap,
    Concatenate,
    LinearMap,
    Pad,
    Reshape,
    ReverseSubtract,
    Subtract,
)
from ibp_triton.backends.torch.sync_batch_norm import SyncBatchNorm, sync_batch_norm
from ibp_triton.layer import Layer

T = torch.Tensor

_TRUE_DIVISIONS = (torch.true_divide, T.true_divide, T.__truediv__, T.__div__)
_TRANSPOSED = tuple(vars(torch._C.TensorBase)[name].__get__ for name in ("mT", "mH"))
_REVERSED = vars(torch._C.TensorBase)["T"].__get__
_ACTIVATIONS = {
    name: (getattr(F, name),) for name in ("logsigmoid", "softsign", "tanhshrink", "hardsigmoid", "hardswish", "mish")
} | {"selu": (F.selu, torch.selu)}
_ELEMENTARY = ("exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "square", "reciprocal", "abs", "sin", "cos", "erf")
_FUNCTIONS: dict[type[Layer], tuple[Callable[..., Any], ...]] = {
    Dense: (F.linear,),
    Conv1d: (F.conv1d,),
    Conv2d: (F.conv2d,),
    Conv3d: (F.conv3d,),
    ConvTranspose1d: (F.conv_transpose1d,),
    ConvTranspose2d: (F.conv_transpose2d,),
    ConvTranspose3d: (F.conv_transpose3d,),
    MaxPool1d: (F.max_pool1d,),
    MaxPool2d: (F.max_pool2d,),
    MaxPool3d: (F.max_pool3d,),
    ReLU: (F.relu, torch.relu, T.relu),
    LeakyReLU: (F.leaky_relu,),
    Sigmoid: (F.sigmoid, torch.sigmoid, T.sigmoid),
    Tanh: (F.tanh, torch.tanh, T.tanh),
    Softplus: (F.softplus,),
    SiLU: (F.silu,),
    GELU: (F.gelu,),
    Dropout: (F.dropout,),
    ChannelDropout: (F.dropout1d, F.dropout2d, F.dropout3d),
    BatchNorm: (F.batch_norm,),
    BatchNormEval: (F.batch_norm,),
    SyncBatchNorm: (sync_batch_norm,),
    LayerNorm: (F.layer_norm,),
    GroupNorm: (F.group_norm,),
    InstanceNorm: (F.instance_norm,),
    InstanceNormEval: (F.instance_norm,),
    RMSNorm: (F.rms_norm,),
    Softmax: (F.softmax,),
    TorchSoftmax: (torch.softmax, T.softmax),
    LogSoftmax: (F.log_softmax,),
    TorchLogSoftmax: (torch.log_softmax, T.log_softmax),
    ScaledDotProductAttention: (F.scaled_dot_product_attention,),
    MultiHeadAttention: (F.multi_head_attention_forward,),
    MatMul: (operator.matmul, torch.matmul, T.matmul, T.__matmul__),
    BMM: (torch.bmm, T.bmm, torch.mm, T.mm),
    AddMM: (torch.addmm, T.addmm),
    BAddBMM: (torch.baddbmm, T.baddbmm),
    Einsum: (torch.einsum,),
    ELU: (F.elu,),
    CELU: (F.celu, torch.celu),
    GLU: (F.glu,),
    PReLU: (F.prelu, torch.prelu, T.prelu),
    Hardtanh: (F.hardtanh,),
    ReLU6: (F.relu6,),
    Clamp: (torch.clamp, T.clamp, torch.clip, T.clip),
    ClampMin: (torch.clamp_min, T.clamp_min),
    ClampMax: (torch.clamp_max, T.clamp_max),
    Power: (operator.pow, torch.pow, T.pow, T.__pow__),
    Multiply: (operator.mul, torch.mul, T.mul, torch.multiply, T.multiply, T.__mul__, T.__rmul__),
    Divide: (operator.truediv, torch.div, T.div, torch.divide, T.divide, *_TRUE_DIVISIONS),
    ReverseDivide: (T.__rtruediv__, T.__rdiv__),
    Add: (operator.add, torch.add, T.add, T.__add__, T.__radd__),
    Subtract: (operator.sub, torch.sub, T.sub, torch.subtract, T.subtract, T.__sub__),
    ReverseSubtract: (torch.rsub, T.__rsub__),
    Maximum: (torch.maximum, T.maximum),
    Minimum: (torch.minimum, T.minimum),
    Where: (torch.where,),
    **{UNARY[name]: functions for name, functions in _ACTIVATIONS.items()},
    **{UNARY[name]: (getattr(torch, name), getattr(T, name)) for name in _ELEMENTARY},
    Concatenate: (torch.cat, torch.concat, torch.concatenate),
    Stack: (torch.stack,),
    Item: (operator.getitem, T.__getitem__),
    Reshape: (
        *(torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.ravel, torch.unflatten),
        *(T.flatten, T.reshape, T.squeeze, T.unsqueeze, T.ravel, T.unflatten, T.view, T.view_as, T.reshape_as),
    ),
    AdaptiveAvgPool2d: (F.adaptive_avg_pool2d,),
    BatchedMap: (
        *(
            F.avg_pool1d,
            F.avg_pool2d,
            F.avg_pool3d,
            F.adaptive_avg_pool1d,
            F.adaptive_avg_pool3d,
            F.interpolate,
            F.upsample,
        ),
        *(F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle, F.unfold, F.fold),
    ),
    Pad: (F.pad,),
    Identity: (
        *(torch.clone, T.clone, T.contiguous, T.to, T.float, T.double, T.half, T.bfloat16, T.type_as, T.cpu, T.cuda),
        *(torch.positive, T.positive, T.__pos__),
    ),
    Negative: (operator.neg, torch.neg, T.neg, torch.negative, T.negative, T.__neg__),
    Permute: (torch.permute, T.permute),
    Transpose: (
        *(torch.transpose, torch.swapaxes, torch.swapdims, torch.t, torch.adjoint),
        *(T.transpose, T.swapaxes, T.swapdims, T.t, T.adjoint, *_TRANSPOSED),
    ),
    ReverseAxes: (_REVERSED,),
    MoveAxis: (torch.movedim, T.movedim, torch.moveaxis, T.moveaxis),
    Flip: (torch.flip, T.flip),
    Roll: (torch.roll, T.roll),
    Expand: (T.expand, T.expand_as, torch.broadcast_to, T.broadcast_to),
    Sum: (torch.sum, T.sum),
    Mean: (torch.mean, T.mean),
    CumulativeSum: (torch.cumsum, T.cumsum),
    IndexSelect: (torch.index_select, T.index_select),
    Gather: (torch.gather, T.gather),
    MaskedFill: (torch.masked_fill, T.masked_fill),
    Triangle: (torch.tril, T.tril, torch.triu, T.triu),
    Split: (
        *(torch.chunk, torch.split, torch.tensor_split),
        *(T.chunk, T.split, T.tensor_split, T.split_with_sizes, torch.split_with_sizes),
    ),
    Unbind: (torch.unbind, T.unbind),
    Variance: (torch.var, T.var),
    Deviation: (torch.std, T.std),
    EuclideanNorm: (torch.norm, T.norm),
    VectorNorm: (torch.linalg.vector_norm,),
    Normalize: (F.normalize,),
    Pick: (torch.max, T.max, torch.min, T.min, torch.median, T.median),
    Peak: (torch.max, T.max, torch.min, T.min),
    MaximumOf: (torch.max, T.max),
    MinimumOf: (torch.min, T.min),
    LogSumExp: (torch.logsumexp, T.logsumexp),
    AddProduct: (torch.addcmul, T.addcmul),
    Lerp: (torch.lerp, T.lerp),
    AddAt: (torch.index_add, T.index_add),
    ScatterAdd: (torch.scatter_add, T.scatter_add),
    TopK: (torch.topk, T.topk),
    Sort: (torch.sort, T.sort),
    Extreme: (torch.amax, T.amax, torch.amin, T.amin),
    LinearMap: (
        torch.narrow,
        T.narrow,
        torch.select,
        T.select,
        T.repeat,
        torch.roll,
        T.roll,
        torch.diagonal,
        T.diagonal,
        *(torch.rot90, T.rot90, torch.fliplr, T.fliplr, torch.flipud, T.flipud, torch.tile, T.tile),
        *(torch.repeat_interleave, T.repeat_interleave, torch.diag_embed, T.diag_embed, torch.diff, T.diff),
    ),
}
_RULES: dict[Any, tuple[type[Layer], ...]] = {}
for _rule, _functions in _FUNCTIONS.items():
    for _function in _functions:
        _RULES[_function] = (*_RULES.get(_function, ()), _rule)


def rule_for(function: Callable[..., Any], kinds: Mapping[str, str], static: Mapping[str, Any]) -> type[Layer] | None:
    """The rule for a call of ``function``, None where only the generic one fits.

    Args:
        function: the torch function.
        kinds: of each operand that is a tensor: active, parametric or constant.
        static: all its arguments by the rule's names; tensors of other nodes are references.
    """
    return next((rule for rule in _RULES.get(function, ()) if rule.accepts(kinds, static)), None)


def candidate(function: Callable[..., Any]) -> type[Layer] | None:
    """The rule to bind a call's arguments with, before its operands are known: all of a function's name them alike."""
    return next(iter(_RULES.get(function, ())), None)
