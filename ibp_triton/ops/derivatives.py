"""Derivatives of the operators, in terms of one another.

What is bilinear differentiates for ever: ``linear`` → ``linear_vjp`` and ``weight_gradient`` → ``linear`` …; a
pooling's reverse and its linear sweep are each other's adjoints. A mask, the position of a maximum and a sign are
constants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ibp_triton.ops import operators as ops

LINEAR: tuple[list[int], list[int], list[int]] = ([1, 1], [0, 0], [1, 1])  # stride, padding, dilation


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save the tensors (those in lists one by one), remember the rest, in order."""
    outputs = output if isinstance(output, tuple) else (output,)
    flat: list[Any] = []
    for value in inputs:
        flat += list(value) if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor) else [value]
    ctx.lists = [len(v) if isinstance(v, (list, tuple)) and v and isinstance(v[0], Tensor) else 0 for v in inputs]
    ctx.rest = [None if isinstance(v, Tensor) else v for v in (*flat, *outputs)]
    ctx.tensor = [isinstance(v, Tensor) for v in (*flat, *outputs)]
    ctx.save_for_backward(*[v for v in (*flat, *outputs) if isinstance(v, Tensor)])


def kept(ctx: Any) -> list[Any]:
    """The inputs, lists as lists, then the outputs."""
    saved = iter(ctx.saved_tensors)
    flat = iter([next(saved) if is_tensor else value for is_tensor, value in zip(ctx.tensor, ctx.rest, strict=True)])
    inputs = [[next(flat) for _ in range(n)] if n else next(flat) for n in ctx.lists]
    return [*inputs, *flat]


def _no_gradient(some: list[Any]) -> Any:
    """None for an argument that is a list, as torch wants it: one for each entry if all are tensors."""
    return None if any(one is None for one in some) else [None] * len(some)


def _gated(g: Tensor, mask: Tensor | None) -> Tensor:
    """g where the mask is positive; g [T, ...] in the mask's order of axes."""
    if mask is None:
        return g
    if g.dim() < 4:
        return ops.relu(g.contiguous(), mask)  # type: ignore[no-any-return]
    last = mask.movedim(-3, -1)
    return ops.relu(g.movedim(-3, -1).contiguous(), last).movedim(-1, -3)  # type: ignore[no-any-return]


def _rows(t: Tensor) -> Tensor:
    """[T, N, ...] as [T · N, ...], dense, channels last."""
    flat = t.flatten(0, 1)
    return flat.contiguous(memory_format=torch.channels_last) if flat.dim() == 4 else flat.contiguous()


def parameters(ctx: Any, at: int, left: Tensor, right: Tensor, weight: Tensor, geometry: Any, bias: bool) -> Any:
    """The gradients of weight and bias where they are wanted: inputs `at` and, with `bias`, one more."""
    if not (ctx.needs_input_grad[at] or bias):
        return None, None
    gradient, shift = ops.weight_gradient([_rows(left)], [_rows(right)], [1.0], [bias], [False], [], weight, *geometry)
    return gradient, shift if bias else None


def _linear(ctx: Any, g: Tensor) -> Any:
    x, weight, bias, mask, relu, sign, slope, out = kept(ctx)
    steep = None
    if slope is not None and ctx.needs_input_grad[6]:
        steep = (g * ops.linear(x, weight, bias, None, False, sign)).sum(0)
    g = (_gated(g, out if relu else mask) if slope is None else g * slope).contiguous()
    d = None if sign or not ctx.needs_input_grad[0] else ops.linear_vjp(g, weight)
    w, b = parameters(ctx, 1, x.sign() if sign else x, g, weight, LINEAR, bias is not None)
    return d, w, b, None, None, None, steep


def _linear_vjp(ctx: Any, g: Tensor) -> Any:
    d, weight, mask, slope, _ = kept(ctx)
    steep = None
    if slope is not None and ctx.needs_input_grad[3]:
        steep = (g * ops.linear_vjp(d, weight)).sum(0)
    g = (_gated(g, mask) if slope is None else g * slope).contiguous()
    return ops.linear(g, weight), parameters(ctx, 1, g, d, weight, LINEAR, False)[0], None, steep


def _conv2d(ctx: Any, g: Tensor) -> Any:
    x, weight, *geometry, bias, mask, relu, sign, out = kept(ctx)
    g = _gated(g, out if relu else mask)
    d = None
    if ctx.needs_input_grad[0] and not sign:
        d = ops.conv2d_vjp(g, weight, x.shape[3:], *geometry)
    w, b = parameters(ctx, 1, x.sign() if sign else x, g, weight, geometry, bias is not None)
    return d, w, None, None, None, b, None, None, None


def _conv2d_vjp(ctx: Any, g: Tensor) -> Any:
    d, weight, _, *geometry, mask, _ = kept(ctx)
    g = _gated(g, mask)
    w = parameters(ctx, 1, g, d, weight, geometry, False)[0]
    return ops.conv2d(g, weight, *geometry), w, None, None, None, None, None


def _weight_gradient(ctx: Any, g: Tensor, g_bias: Tensor) -> Any:
    lefts, rights, coefficients, biased, signs, on_device, _, *geometry, scale, _, push, _, _, _ = kept(ctx)
    if push is not None or any(signs):
        raise NotImplementedError(
            "a weight gradient with a push or a sign has no derivative: give its terms one by one"
        )
    back_lefts, back_rights = [], []
    coefficients = ops.numbers(coefficients, on_device[:-1])
    for left, right, coefficient, bias in zip(lefts, rights, coefficients, biased, strict=True):
        w, factor = g.to(left.dtype), scale * coefficient
        if left.dim() == 4:
            back = ops.conv2d_vjp(right[None], w, left.shape[2:], *geometry)[0]
            forth = ops.conv2d(left[None], w, *geometry)[0]
            shift = g_bias[:, None, None] if bias else 0
        else:
            w = w.contiguous()
            back, forth = ops.linear_vjp(right[None], w)[0], ops.linear(left[None], w)[0]
            shift = g_bias if bias else 0
        back_lefts.append(factor * back)
        back_rights.append((factor * (forth + shift)).to(right.dtype))
    rest = [None] * (len(ctx.needs_input_grad) - 6)
    return back_lefts, back_rights, None, None, None, _no_gradient(on_device), *rest


def _max_pool2d(ctx: Any, g: Tensor, _: Any) -> Any:
    x, *sizes, _relu, _first, _, code = kept(ctx)
    return ops.max_pool2d_vjp(g[None], code, x.shape[2:], *sizes)[0], *[None] * 7


def _max_pool2d_jvp(ctx: Any, g: Tensor) -> Any:
    t, code, *sizes, _first, _ = kept(ctx)
    return ops.max_pool2d_vjp(g, code, t.shape[3:], *sizes), *[None] * 7


def _max_pool2d_vjp(ctx: Any, g: Tensor) -> Any:
    _, code, _, *sizes, _ = kept(ctx)
    return ops.max_pool2d_jvp(g, code, *sizes), *[None] * 7


def _conv2d_max_pool2d(ctx: Any, g: Tensor, _: Any) -> Any:
    x, weight, *geometry, bias, kernel, stride, padding, margin, ceil, _relu, _first, _, code = kept(ctx)
    sizes = (kernel, stride, padding, margin, ceil)
    d, w, b = _joined(ctx, x[None], weight, geometry, code, g[None], sizes, bias)
    return None if d is None else d[0], w, None, None, None, b, *[None] * 7


def _conv2d_max_pool2d_jvp(ctx: Any, g: Tensor) -> Any:
    t, weight, code, *geometry, kernel, stride, padding, margin, ceil, sign, _first, _ = kept(ctx)
    sizes = (kernel, stride, padding, margin, ceil)
    d, w, _ = _joined(ctx, t.sign() if sign else t, weight, geometry, code, g, sizes, None)
    return None if sign else d, w, *[None] * 11


def _joined(
    ctx: Any, x: Tensor, weight: Tensor, geometry: Any, code: Tensor, g: Tensor, sizes: Any, bias: Tensor | None
) -> Any:
    """The gradients of image, weight and bias of a convolution whose result is read where a pool's code says."""
    g = ops.max_pool2d_vjp(g, code, ops.conv_geometry(x.shape[3:], weight.shape[2:], *geometry).out, *sizes)
    d = ops.conv2d_vjp(g, weight, x.shape[3:], *geometry) if ctx.needs_input_grad[0] else None
    return d, *parameters(ctx, 1, x, g, weight, geometry, bias is not None)


def _avg_pool2d(ctx: Any, g: Tensor) -> Any:
    t, *sizes, _first, _ = kept(ctx)
    return ops.avg_pool2d_vjp(g, t.shape[3:], *sizes), *[None] * 6


def _avg_pool2d_vjp(ctx: Any, g: Tensor) -> Any:
    _, _, *sizes, _ = kept(ctx)
    return ops.avg_pool2d(g, *sizes), *[None] * 6


def _relu(ctx: Any, g: Tensor) -> Any:
    _, mask, out = kept(ctx)
    mask = out if mask is None else mask
    dense = mask.contiguous()
    return ops.relu(g.contiguous(), dense), None


def keep_sparse(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """As `_keep`, with None for the gradient of an output that nothing depends on."""
    _keep(ctx, inputs, output)
    ctx.set_materialize_grads(False)


def _cross_entropy(ctx: Any, g_loss: Tensor | None, g_c: Tensor | None, _: Any) -> Any:
    z, _, _, c, _ = kept(ctx)
    d = torch.zeros_like(z) if g_loss is None else c * g_loss[:, None].to(c.dtype)
    return d if g_c is None else d + ops.hessian_product(z, g_c.contiguous()), None


def _hessian_product(ctx: Any, g: Tensor) -> Any:
    z, _, _ = kept(ctx)
    if ctx.needs_input_grad[0]:
        raise NotImplementedError("the Hessian's product has no derivative with respect to the logits")
    return None, ops.hessian_product(z, g.contiguous())


def _objective(ctx: Any, g: Tensor) -> Any:
    losses, penalties, a, b, on_device, scale, absolute, _ = kept(ctx)
    a, b = (scale * number for number in ops.numbers([a, b], on_device))
    back = (b * g).to(penalties.dtype) * (penalties.sign() if absolute else torch.ones_like(penalties))
    rest = [None] * (len(ctx.needs_input_grad) - 5)
    return (a * g).to(losses.dtype).expand_as(losses), back, None, None, _no_gradient(on_device), *rest


def _norm_seed(ctx: Any, g_seed: Tensor, g_value: Tensor) -> Any:
    u, norm, seed, _ = kept(ctx)
    wide = g_value.view(-1, *[1] * (u.dim() - 1)).to(u.dtype) * seed
    if norm == 1:  # the sign is constant almost everywhere
        return wide, None
    return wide + _bend(u, norm) * g_seed, None


def _norm_value(ctx: Any, g: Tensor) -> Any:
    u, norm, _ = kept(ctx)
    return g.view(-1, *[1] * (u.dim() - 1)).to(u.dtype) * ops.norm_seed(u, norm)[0], None


def _fgsm_step(ctx: Any, g: Tensor) -> Any:
    return g.clone(), None, None, None


def _fast_tbp_seed(ctx: Any, g_seed: Tensor, g_value: Tensor) -> Any:
    """Σ_j u_j τ_j for d, ψ(s_j) g_seed + u_j d for τ_j; s_j = ⟨d, τ_j⟩, u_j = ψ'(s_j)⟨g_seed, τ_j⟩ + ψ(s_j) g_value."""
    d, tangents, norm, *_ = kept(ctx)
    samples = [1] * (d.dim() - 1)
    slopes = torch.linalg.vecdot(tangents.flatten(2), d.flatten(1))
    psi = slopes.sign() * slopes.abs() ** (norm - 1)
    bend = _bend(slopes, norm) * torch.linalg.vecdot(tangents.flatten(2), g_seed.flatten(1))
    weight = (bend + psi * g_value.to(d.dtype)).view((*slopes.shape, *samples))
    back = psi.view((*slopes.shape, *samples)) * g_seed + weight * d
    return (weight * tangents).sum(0), back, None


def _bend(u: Tensor, norm: float) -> Tensor:
    """ψ'(u), almost everywhere: 0 for norm 1."""
    if norm == 1:
        return torch.zeros_like(u)
    return torch.where(u == 0, 1.0 if norm == 2 else 0.0, (norm - 1) * u.abs() ** (norm - 2))


for _name, _backward in {
    "linear": _linear,
    "linear_vjp": _linear_vjp,
    "conv2d": _conv2d,
    "conv2d_vjp": _conv2d_vjp,
    "weight_gradient": _weight_gradient,
    "max_pool2d": _max_pool2d,
    "max_pool2d_jvp": _max_pool2d_jvp,
    "max_pool2d_vjp": _max_pool2d_vjp,
    "conv2d_max_pool2d": _conv2d_max_pool2d,
    "conv2d_max_pool2d_jvp": _conv2d_max_pool2d_jvp,
    "avg_pool2d": _avg_pool2d,
    "avg_pool2d_vjp": _avg_pool2d_vjp,
    "relu": _relu,
    "cross_entropy": _cross_entropy,
    "hessian_product": _hessian_product,
    "objective": _objective,
    "norm_seed": _norm_seed,
    "norm_value": _norm_value,
    "fgsm_step": _fgsm_step,
    "fast_tbp_seed": _fast_tbp_seed,
}.items():
    getattr(ops, _name).register_autograd(_backward, setup_context=keep_sparse if _name == "cross_entropy" else _keep)
