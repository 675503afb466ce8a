"""The oracle: the seven methods by torch.autograd on any nn.Module, from their definitions, not from the sweeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ibp_triton import adjoint
from ibp_triton.attacks import fgsm_step, tracked
from ibp_triton.errors import ModelError
from ibp_triton.recording.interface import Interface
from ibp_triton.reference_modes import CutPrimals, NoGradConstants, SteadyDropout, Unrounded, no_fast_path

Gradients = dict[str, Tensor]
Function = Callable[[Mapping[str, Tensor], Tensor], Tensor]


def gradients(
    model: nn.Module,
    method: Any,
    x: Tensor,
    labels: Tensor,
    tangents: Tensor | None = None,
    extra: Mapping[str, Any] | None = None,
    interface: Interface | None = None,
) -> tuple[Tensor, Gradients]:
    """The method's objective (mean over the batch) and {parameter name: gradient}, by automatic differentiation.

    Args:
        model: x [N, ...] → logits [N, M]. Its buffers and the global random state stay as they are; every evaluation
            sees the same random numbers.
        method: an object with ``key``, ``parameter`` and the attributes of the methods in ``ibp_triton``.
        x: [N, ...]; use float64 for comparisons.
        labels: [N] integers, or what ``method.criterion`` takes.
        tangents: [T, N, ...] for tbp and fast_tbp.
        extra: the model's other inputs by name.
        interface: how the model is called and its logits picked, as ``Network(model, x=…, output=…).interface``.

    Raises:
        KeyError: for an unknown ``method.key``.
        ModelError: for a method with a tangent on a model with a scripted module, or with another function of which
            torch's forward mode is not the adjoint of its reverse mode, such as one of torch.library.custom_op; for one
            with detach_; for one that torch's transforms do not take, as without a forward mode (grid_sample, cdist) or
            with checkpoints; in the paper's semantics for one that calls torch.func.jvp or vmap, or solves by a
            parameter's matrix.
    """
    run = ORACLES[method.key]
    scripted = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted and run in (_seeded, _prediction, _jacobian):
        raise ModelError(
            f"the reference cannot judge this method on the scripted module '{scripted[0]}', in which torch drops "
            "forward-mode derivatives without a word; give it the module as it was before torch.jit.script"
        )
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    x, labels, tangents = tracked(x), tracked(labels), tracked(tangents)
    with _within_limits(), sdpa_kernel(SDPBackend.MATH), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        numbers = _own_numbers(model, method, x, interface or Interface(), dict(extra or {}))
        function = _pure(model, interface or Interface(), dict(extra or {}))
        if run in (_seeded, _prediction, _jacobian) and not x.is_meta:
            _refuse_false_duals(function, parameters, x)
        target = _Target(method, labels, x)
        value, result = run(function, parameters, method, x, target, tangents if numbers is None else numbers)
    n = x.shape[0]
    return value.detach() / n, {name: g.detach() / n for name, g in result.items()}


_LIMITS = (
    *("forward AD", "is not implemented", "don't yet support", "would mutate a captured Tensor"),
    *("Recomputed values", "Autograd not support dtype", "single memory location"),
)


@contextmanager
def _within_limits() -> Iterator[None]:
    """What torch's transforms can't do is no fault of the model's."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ModelError) or not any(limit in str(error) for limit in _LIMITS):
            raise
        raise ModelError(
            "the reference cannot judge this method on this model, which torch.func's transforms do not take "
            f"({str(error).splitlines()[0]}); that says nothing of the method's own gradient"
        ) from error


def _own_numbers(model: nn.Module, method: Any, x: Tensor, interface: Interface, extra: Any) -> Tensor | None:
    """What a method draws for itself, before the model draws anything."""
    if method.key == "pgd_training" and method.random_start:
        return torch.rand(x.shape, dtype=x.dtype)
    if method.key == "trades":
        return torch.randn(x.shape, dtype=x.dtype)
    if method.key != "jacobian":
        return None
    with torch.random.fork_rng(devices=[]):
        function = _pure(model, interface, extra)
        classes = function({k: p.detach() for k, p in model.named_parameters()}, x).shape[1]
    if method.projections == "all":
        return torch.eye(classes, dtype=x.dtype)[:, None].repeat(1, x.shape[0], 1)
    v = torch.randn(method.projections, x.shape[0], classes, dtype=x.dtype)
    unit: Tensor = v / v.norm(dim=2, keepdim=True)
    return unit


def _refuse_false_duals(function: Function, parameters: Gradients, x: Tensor) -> None:
    t, leaf = adjoint.some(x), x.clone().requires_grad_()
    logits = function(parameters, leaf)
    if not logits.requires_grad:
        return
    u = adjoint.some(logits)
    (pulled,) = torch.autograd.grad(logits, leaf, u, allow_unused=True, materialize_grads=True)
    pushed = torch.func.jvp(lambda v: function(parameters, v), (x,), (t,))[1]
    if not adjoint.agrees([u], [pushed], [t], [pulled]):
        raise ModelError(
            "the reference cannot judge this method on this model: of a function in it torch's forward mode, which the "
            "reference goes by, is not the adjoint of its reverse mode (of torch.library.custom_op it is zero)"
        )


class _Called:
    """The model with other parameters and buffers, called as the interface says."""

    def __init__(self, model: nn.Module, interface: Interface, extra: Mapping[str, Any]) -> None:
        self.model, self.interface, self.extra = model, interface, extra

    def __call__(self, state: Mapping[str, Tensor], x: Tensor) -> Any:
        with torch.nn.utils.stateless._reparametrize_module(self.model, dict(state), tie_weights=True):
            return self.interface.call(self.model, x, self.extra)


def _pure(model: nn.Module, interface: Interface, extra: Mapping[str, Any]) -> Function:
    """The model as a function of parameters and x, at fixed buffers and random numbers."""
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    state = torch.get_rng_state()

    def function(parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        copies = {name: b.clone() for name, b in buffers.items()}
        with torch.random.fork_rng(devices=[]), no_fast_path(), NoGradConstants(), SteadyDropout(), Unrounded():
            torch.set_rng_state(state)
            return interface.pick(_Called(model, interface, extra)({**parameters, **copies}, x.clone()))

    return function


class _Target:
    """The criterion at a batch's targets: each sample's loss is the criterion on that sample alone."""

    def __init__(self, method: Any, y: Any, x: Tensor) -> None:
        self.criterion, self.y, self.batch = getattr(method, "criterion", None), torch.as_tensor(y), x.shape[0]
        self.weights = self._weights(x.new_ones(self.batch))

    def _weights(self, ones: Tensor) -> Tensor:
        """N κ_n: what each sample counts in the criterion on the batch."""
        m, y = self.criterion, self.y
        reduction = getattr(m, "reduction", "none") if isinstance(m, nn.Module) else "none"
        if not isinstance(m, (nn.CrossEntropyLoss, nn.NLLLoss)) or y.is_floating_point():
            return self.batch * ones if reduction == "sum" else ones
        w = ones.new_ones(int(y.max()) + 1) if m.weight is None else m.weight.to(ones.dtype)
        each = torch.where(y == m.ignore_index, 0, w[y.clamp_min(0)]).reshape(self.batch, -1).sum(1)
        if reduction == "mean":
            return self.batch * each / each.sum()
        return (each > 0) * ones * (self.batch if reduction == "sum" else 1)

    def losses(self, logits: Tensor) -> Tensor:
        """ℓ [N], zero for a sample that does not count."""
        m, y = self.criterion, self.y
        if m is None:
            return F.cross_entropy(logits, y, reduction="none")
        if not isinstance(m, nn.Module) or not hasattr(m, "reduction"):
            return m(logits, y)  # type: ignore[no-any-return]
        alone = [m(logits[n : n + 1], y[n : n + 1]).mean() for n in range(self.batch)]
        kept = [one if w > 0 else logits.new_zeros(()) for one, w in zip(alone, self.weights, strict=True)]
        return torch.stack(kept)

    def each(self, logits: Tensor) -> Tensor:
        """Σ ℓ_n, whose derivative is that of each sample's own loss."""
        return self.losses(logits).sum()

    def all(self, logits: Tensor) -> Tensor:
        """Σ N κ_n ℓ_n."""
        return (self.weights * self.losses(logits)).sum()

    def weighted(self, u: Tensor, axis: int = 0) -> Tensor:
        """N κ_n u_n, the samples being along ``axis``."""
        return self.weights.view(-1, *[1] * (u.dim() - 1 - axis)) * u


def _norm(u: Tensor, r: float, target: _Target, axis: int = 0) -> Tensor:
    return target.weighted(u.abs().pow(r), axis).sum() / r


def _psi(u: Tensor, r: float) -> Tensor:
    return u.sign() * u.abs().pow(r - 1) if r != 1 else u.sign()


def _loss_gradient(function: Function, parameters: Gradients, x: Tensor, target: _Target) -> tuple[Tensor, Gradients]:
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    value = target.all(function(leaves, x))
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return value, dict(zip(leaves, found, strict=True))


def _input_gradient(function: Function, parameters: Gradients, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    x = x.clone().requires_grad_()
    value = loss(function(parameters, x))
    if not value.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(value, x, allow_unused=True, materialize_grads=True)[0]


def _add(a: Gradients, b: Gradients, factor: Any) -> Gradients:
    return {name: a[name] + factor * b[name] for name in a}


def _bp(f: Function, parameters: Gradients, method: Any, x: Tensor, target: _Target, tangents: Any) -> Any:
    return _loss_gradient(f, parameters, x, target)


def _adversarial(f: Function, parameters: Gradients, method: Any, x: Tensor, target: _Target, tangents: Any) -> Any:
    star = fgsm_step(x, _input_gradient(f, parameters, x, target.all), method.epsilon)
    value, gradient = _loss_gradient(f, parameters, star, target)
    if method.key == "fast_at":
        return value, gradient
    clean, first = _loss_gradient(f, parameters, x, target)
    half = {name: 0.5 * g for name, g in gradient.items()}
    return 0.5 * (clean + value), _add(half, first, 0.5)


def _seeded(f: Function, parameters: Gradients, method: Any, x: Tensor, target: _Target, tangents: Any) -> Any:
    """Loss IBP and Fast TBP: a penalty on ⟨d_0, seed⟩."""
    value, gradient = _loss_gradient(f, parameters, x, target)
    d_0 = _input_gradient(f, parameters, x, target.each)
    if tangents is None:
        seed, size = target.weighted(_psi(d_0, method.norm)), _norm(d_0, method.norm, target)
    else:
        slopes = (tangents * d_0).flatten(2).sum(2)
        factors = target.weighted(_psi(slopes, method.norm), 1)
        seed = (factors.reshape((*slopes.shape, *[1] * (x.dim() - 1))) * tangents).sum(0)
        size = _norm(slopes, method.norm, target, 1)
    if method.semantics == "exact":
        extra = _loss_change(f, parameters, x, target, seed)
    else:
        c = torch.func.grad(target.each)(f(parameters, x).detach())
        extra = _paper_term(f, parameters, x, seed, c)
    return value + method.beta * size, _add(gradient, extra, method.beta)


def _loss_change(f: Function, parameters: Gradients, x: Tensor, target: _Target, seed: Tensor) -> Gradients:
    """d/ds ∇_w L(x + s · seed) at s = 0: forward over reverse."""

    def gradient(x: Tensor) -> Gradients:
        return torch.func.grad(lambda p: target.each(f(p, x)))(parameters)  # type: ignore[no-any-return]

    return torch.func.jvp(gradient, (x,), (seed,))[1]  # type: ignore[no-any-return]


def _prediction(f: Function, parameters: Gradients, method: Any, x: Tensor, target: _Target, tangents: Any) -> Any:
    """Prediction IBP (the tangent is d_0) and TBP (the tangents are given): a penalty on ‖J τ‖."""
    value, gradient = _loss_gradient(f, parameters, x, target)
    directions = [_input_gradient(f, parameters, x, target.each)] if tangents is None else list(tangents)
    for tau in directions:
        t_K = torch.func.jvp(lambda u: f(parameters, u), (x,), (tau,))[1]
        e_K = target.weighted(_psi(t_K, method.norm))
        value = value + method.beta * _norm(t_K, method.norm, target)
        if method.semantics == "paper":
            extra = _paper_term(f, parameters, x, tau, e_K)
        else:
            extra = _prediction_change(f, parameters, x, tau, e_K)
            if tangents is None:
                e_0 = torch.func.vjp(lambda u: f(parameters, u), x)[1](e_K)[0]
                extra = _add(extra, _loss_change(f, parameters, x, target, e_0), 1)
        gradient = _add(gradient, extra, method.beta)
    return value, gradient


def _prediction_change(f: Function, parameters: Gradients, x: Tensor, tau: Tensor, e: Tensor) -> Gradients:
    """∇_w ⟨e, J τ⟩ = d/ds (∇_w ⟨e, f(x + s τ)⟩) at s = 0: forward over reverse."""

    def gradient(x: Tensor) -> Gradients:
        return torch.func.vjp(lambda p: f(p, x), parameters)[1](e)[0]  # type: ignore[no-any-return]

    return torch.func.jvp(gradient, (x,), (tau,))[1]  # type: ignore[no-any-return]


def _paper_term(f: Function, parameters: Gradients, x: Tensor, seed: Tensor, r: Tensor) -> Gradients:
    """∇_w ⟨r, t_K⟩ where t_K is carried through the model by dual numbers whose primal part is cut after every torch
    function, so that only each Df_i depends on the parameters."""

    def tangent(parameters: Gradients) -> Tensor:
        def watched(u: Tensor) -> Tensor:
            with CutPrimals():
                return f(parameters, u)

        return torch.func.jvp(watched, (x,), (seed,))[1]  # type: ignore[no-any-return]

    return torch.func.vjp(tangent, parameters)[1](r)[0]  # type: ignore[no-any-return]


def _jacobian(f: Function, parameters: Gradients, method: Any, x: Tensor, target: _Target, v: Any) -> Any:
    """(M / 2n) Σ_j ‖Jᵀ v_j‖²: Tangent BP along (M/n) Jᵀ v_j, with v_j in place of ψ."""
    value, gradient = _loss_gradient(f, parameters, x, target)
    scale = v.shape[2] / v.shape[0]
    for direction in v:
        r = torch.func.vjp(lambda u: f(parameters, u), x)[1](direction)[0]
        value = value + method.beta * scale * _norm(r, 2, target)
        change = _prediction_change if method.semantics == "exact" else _paper_term
        gradient = _add(gradient, change(f, parameters, x, scale * target.weighted(r), direction), method.beta)
    return value, gradient


def _clamped(star: Tensor, x: Tensor, epsilon: float) -> Tensor:
    return torch.minimum(torch.maximum(star, x - epsilon), x + epsilon)


def _pgd(f: Function, parameters: Gradients, method: Any, x: Tensor, target: _Target, u: Any) -> Any:
    star = x if u is None else x + method.epsilon * (2 * u - 1)
    for _ in range(method.steps):
        star = fgsm_step(star, _input_gradient(f, parameters, star, target.all), method.step_size)
        star = _clamped(star, x, method.epsilon)
    return _loss_gradient(f, parameters, star, target)


def _trades(f: Function, parameters: Gradients, method: Any, x: Tensor, target: _Target, n: Any) -> Any:
    p, star = f(parameters, x).log_softmax(1).detach(), x + 0.001 * n
    for _ in range(method.steps):
        u = star.clone().requires_grad_()
        distance = F.kl_div(f(parameters, u).log_softmax(1), p, reduction="sum", log_target=True)
        star = fgsm_step(star, torch.autograd.grad(distance, u)[0], method.step_size)
        star = _clamped(star, x, method.epsilon)
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    logits = f(leaves, x)
    q = f(leaves, star).log_softmax(1)
    divergence = F.kl_div(q, logits.log_softmax(1), reduction="sum", log_target=True)
    value = target.all(logits) + method.lam * divergence
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return value, dict(zip(leaves, found, strict=True))


Oracle = Callable[[Function, Gradients, Any, Tensor, _Target, Any], tuple[Tensor, Gradients]]
ORACLES: dict[str, Oracle] = {
    "bp": _bp,
    "loss_ibp": _seeded,
    "fast_tbp": _seeded,
    "prediction_ibp": _prediction,
    "tbp": _prediction,
    "at": _adversarial,
    "fast_at": _adversarial,
    "jacobian": _jacobian,
    "pgd_training": _pgd,
    "trades": _trades,
}
