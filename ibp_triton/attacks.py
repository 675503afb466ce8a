"""Perturbed inputs x → x': adversarial examples and Gaussian noise. Nothing is clipped; ε and σ are in x's units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Classifier = Callable[[Tensor], Tensor]


def fgsm_step(x: Tensor, d: Tensor, epsilon: float | Tensor) -> Tensor:
    """x + ε sign(d) for the derivative d of the loss with respect to x; same shape (Eq. 4 of the paper)."""
    return x + epsilon * d.sign().to(x.dtype)


def input_gradient(model: Classifier, x: Tensor, labels: Tensor) -> Tensor:
    """∇_x of the per-sample cross-entropy, of x's shape [N, ...], not divided by N."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        loss = F.cross_entropy(model(x), labels, reduction="sum")
        return torch.autograd.grad(loss, x)[0]


def fgsm(model: Classifier, x: Tensor, labels: Tensor, epsilon: float | Sequence[float]) -> Tensor:
    """Fast gradient sign method: x + ε sign(∇_x L).

    Args:
        model: x [N, ...] → logits [N, M]; its train/eval mode is the caller's.
        x: inputs, pixels in the units of ε.
        labels: [N] integers.
        epsilon: a size, or a list of E sizes that share one gradient.

    Returns:
        [N, ...], or [E, N, ...] for a list.
    """
    d = input_gradient(model, x, labels)
    if isinstance(epsilon, (int, float)):
        return fgsm_step(x.detach(), d, epsilon)
    return torch.stack([fgsm_step(x.detach(), d, e) for e in epsilon])


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
) -> Tensor:
    """Projected gradient descent in the box |x' − x| ≤ ε (Madry et al. 2018).

    Args:
        model: x [N, ...] → logits [N, M].
        x: inputs, pixels in the units of ε.
        labels: [N] integers.
        epsilon: half the side of the box.
        steps: gradient steps, at least 1.
        step_size: length of one step; 2.5 ε / steps by default.
        random_start: start at a uniform random point of the box.
        generator: the random numbers' source; they are drawn on its device, so that x's device does not matter.

    Returns:
        x' of x's shape.

    Raises:
        ValueError: for fewer than one step or a negative ε.
    """
    if steps < 1 or epsilon < 0:
        raise ValueError(f"pgd needs steps >= 1 and epsilon >= 0, got steps={steps}, epsilon={epsilon}")
    x = x.detach()
    size = 2.5 * epsilon / steps if step_size is None else step_size
    offset = torch.zeros_like(x)
    if random_start:
        offset = (2 * _drawn(torch.rand, x, generator) - 1) * epsilon
    for _ in range(steps):
        d = input_gradient(model, x + offset, labels)
        offset = (offset + size * d.sign()).clamp(-epsilon, epsilon)
    return x + offset


def gaussian_noise(x: Tensor, sigma: float, generator: torch.Generator | None = None) -> Tensor:
    """x + σ n with n ~ N(0, 1) for each element, drawn on the generator's device; same shape."""
    return x + sigma * _drawn(torch.randn, x, generator)


def _drawn(draw: Any, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random numbers of x's shape, dtype and device, drawn by torch.rand or torch.randn on the generator's device."""
    place = generator.device if generator else x.device
    numbers: Tensor = draw(x.shape, dtype=x.dtype, device=place, generator=generator)
    return numbers.to(x.device)
