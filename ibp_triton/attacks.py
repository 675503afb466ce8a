"""Perturbed inputs x → x': adversarial examples and noise. ε and σ are in x's units; only ``bounds`` clip."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibp_triton.errors import InputError, MethodError

Classifier = Callable[[Tensor], Tensor]
Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]  # (model, x, y) → x', pixels to logits and to pixels
Bounds = tuple[float, float] | None
NORMS = ("linf", "l2")


def fgsm_step(x: Tensor, d: Tensor, epsilon: float | Tensor) -> Tensor:
    """x + ε sign(d) for the derivative d of the loss with respect to x; same shape (Eq. 4 of the paper)."""
    return x + epsilon * d.sign().to(x.dtype)


def tracked(a: Any) -> Any:
    """A tensor without its history, a copy if it was made in inference mode, of which autograd takes none."""
    if not isinstance(a, Tensor):
        return a
    return a.clone() if a.is_inference() else a.detach()


def input_gradient(model: Classifier, x: Tensor, labels: Tensor) -> Tensor:
    """∇_x of the per-sample cross-entropy, of x's shape [N, ...], not divided by N."""
    with torch.inference_mode(False), torch.enable_grad():
        x = tracked(x).requires_grad_()
        loss = F.cross_entropy(model(x), tracked(labels), reduction="sum")
        return torch.autograd.grad(loss, x)[0]


def fgsm(
    model: Classifier,
    x: Tensor,
    labels: Tensor,
    epsilon: float | Sequence[float],
    *,
    bounds: Bounds = None,
    norm: str = "linf",
) -> Tensor:
    """Fast gradient sign method: x + ε sign(∇_x L); for norm "l2" x + ε ∇_x L / ‖∇_x L‖₂, per sample.

    Args:
        model: x [N, ...] → logits [N, M]; its train/eval mode is the caller's.
        x: inputs, pixels in the units of ε.
        labels: [N] integers.
        epsilon: a size, or a list of E sizes that share one gradient.
        bounds: the least and the largest pixel, to which the result is clipped; None clips nothing.
        norm: of the perturbation, "linf" or "l2".

    Returns:
        [N, ...], or [E, N, ...] for a list.

    Raises:
        MethodError (a ValueError): for an unknown norm or bounds in disorder.
    """
    _check(bounds, norm)
    d = input_gradient(model, x, labels)
    if isinstance(epsilon, (int, float)):
        return _clipped(_step(x.detach(), d, epsilon, norm), bounds)
    return torch.stack([_clipped(_step(x.detach(), d, e, norm), bounds) for e in epsilon])


def pgd(
    model: Classifier,
    x: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    steps: int = 10,
    step_size: float | None = None,
    random_start: bool = True,
    generator: torch.Generator | None = None,
    bounds: Bounds = None,
    norm: str = "linf",
) -> Tensor:
    """Projected gradient descent in the ball ‖x' − x‖ ≤ ε of each sample (Madry et al. 2018).

    Args:
        model: x [N, ...] → logits [N, M].
        x: inputs, pixels in the units of ε.
        labels: [N] integers.
        epsilon: the radius of the ball.
        steps: gradient steps, at least 1.
        step_size: length of one step; 2.5 ε / steps by default.
        random_start: start at a uniform random point of the ball.
        generator: the random numbers' source; they are drawn on its device, so that x's device does not matter.
        bounds: the least and the largest pixel, to which every step is clipped; None clips nothing.
        norm: "linf", with steps along sign(d), or "l2", with steps along d / ‖d‖₂ (0 for a gradient of zeros).

    Returns:
        x' of x's shape.

    Raises:
        MethodError (a ValueError): for fewer than one step, a negative ε, an unknown norm or bounds in disorder.
    """
    if steps < 1 or epsilon < 0:
        raise MethodError(f"pgd needs steps >= 1 and epsilon >= 0, got steps={steps}, epsilon={epsilon}")
    _check(bounds, norm)
    x = x.detach()
    size = 2.5 * epsilon / steps if step_size is None else step_size
    offset = torch.zeros_like(x)
    if random_start:
        offset = epsilon * _uniform(x, norm, generator)
    star = _clipped(x + offset, bounds)
    for _ in range(steps):
        offset = offset if bounds is None else star - x
        offset = _projected(_step(offset, input_gradient(model, star, labels), size, norm), epsilon, norm)
        star = _clipped(x + offset, bounds)
    return star


def random_signs(x: Tensor, epsilon: float, generator: torch.Generator | None = None) -> Tensor:
    """x ± ε, each sign by a fair coin.

    Args:
        x: [N, ...].
        epsilon: ε in x's units.
        generator: the random numbers' source; they are drawn on its device.

    Returns:
        x' of x's shape.
    """
    return x + epsilon * (2 * (_drawn(torch.rand, x, generator) < 0.5).to(x.dtype) - 1)


def gaussian_noise(x: Tensor, sigma: float, generator: torch.Generator | None = None) -> Tensor:
    """x + σ n with n ~ N(0, 1) for each element.

    Args:
        x: [N, ...].
        sigma: σ in x's units.
        generator: the random numbers' source; they are drawn on its device.

    Returns:
        x' of x's shape.
    """
    return x + sigma * _drawn(torch.randn, x, generator)


def from_torchattacks(kind: Callable[..., Any], sizes: Sequence[float], **options: Any) -> dict[float, Attack]:
    """An attack of the package torchattacks, AutoAttack among them, for ``robustness``: {ε: (model, x, y) → x'}.

    A seed of 0 and the model's number of classes stand in where the attack asks for them and the options do not say:
    torchattacks itself takes the clock and ten. AutoAttack and APGDT need four classes or more.

    Args:
        kind: the attack's class, such as torchattacks.AutoAttack; one with a size ``eps``.
        sizes: ε, in pixel units; images have pixels from 0 to 1, to which torchattacks clips.
        options: of the class, such as norm="L2", steps=20; lengths of steps (``alpha``) in pixel units.

    Returns:
        {ε: attack}, for ``attacks={"a name": …}``.

    Raises:
        MethodError (a ValueError): for an attack without a size, such as DeepFool.
        InputError (a ValueError): on call, for images outside 0 … 1.
    """
    accepted = inspect.signature(kind).parameters
    if "eps" not in accepted:
        raise MethodError(
            f"{getattr(kind, '__name__', kind)} has no size eps: give robustness the function itself, such as "
            "{0.0: lambda model, x, y: attack(model)(x, y)}, under the size that the table shall show"
        )

    def of_size(epsilon: float) -> Attack:
        def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            if float(x.min()) < 0 or float(x.max()) > 1:
                raise InputError(
                    "torchattacks needs pixels from 0 to 1: scale the images, and give the rest to mean= and std="
                )
            chosen = dict(options)
            if "seed" in accepted:
                chosen.setdefault("seed", 0)
            if "n_classes" in accepted and "n_classes" not in chosen:
                with torch.no_grad():
                    chosen["n_classes"] = model(x[:1]).shape[1]
            star: Tensor = kind(model, eps=epsilon, **chosen)(x, y)
            return star

        return attack

    return {float(size): of_size(float(size)) for size in sizes}


def _drawn(draw: Any, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random numbers of x's shape, dtype and device, drawn by torch.rand or torch.randn on the generator's device."""
    place = generator.device if generator else x.device
    numbers: Tensor = draw(x.shape, dtype=x.dtype, device=place, generator=generator)
    return numbers.to(x.device)


def _check(bounds: Bounds, norm: str) -> None:
    if norm not in NORMS:
        raise MethodError(f"norm must be one of {', '.join(NORMS)}, not {norm!r}")
    if bounds is not None and not bounds[0] < bounds[1]:
        raise MethodError(f"bounds must be the least and the largest pixel, such as (0, 1), not {bounds}")


def _clipped(x: Tensor, bounds: Bounds) -> Tensor:
    return x if bounds is None else x.clamp(*bounds)


def _step(x: Tensor, d: Tensor, size: float, norm: str) -> Tensor:
    if norm == "linf":
        return fgsm_step(x, d, size)
    length = _lengths(d)
    return x + size * torch.where(length > 0, d / length, 0).to(x.dtype)


def _projected(offset: Tensor, epsilon: float, norm: str) -> Tensor:
    """The nearest offset with ‖offset‖ ≤ ε."""
    if norm == "linf":
        return offset.clamp(-epsilon, epsilon)
    length = _lengths(offset)
    return torch.where(length > epsilon, offset * (epsilon / length), offset)


def _uniform(x: Tensor, norm: str, generator: torch.Generator | None) -> Tensor:
    """Uniform points of the unit ball, of x's shape."""
    if norm == "linf":
        return 2 * _drawn(torch.rand, x, generator) - 1
    direction = _drawn(torch.randn, x, generator)
    one_each = x.flatten(1)[:, :1].reshape(-1, *[1] * (x.dim() - 1))
    radius = _drawn(torch.rand, one_each, generator) ** (1 / x[0].numel())
    return radius * direction / _lengths(direction)


def _lengths(d: Tensor) -> Tensor:
    """‖d_n‖₂ of each sample, [N, 1, ...]."""
    lengths: Tensor = torch.linalg.vector_norm(d.flatten(1), dim=1)
    return lengths.view(-1, *[1] * (d.dim() - 1))
