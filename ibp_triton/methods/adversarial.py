"""Training on perturbed inputs, which are constants to the gradient: adversarial training, PGD training and TRADES."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ibp_triton.methods.base import Method, Strength
from ibp_triton.methods.passes import Recipe, Step
from ibp_triton.sweeps import g


@dataclass(frozen=True, repr=False, eq=False)
class AdversarialTraining(Method):
    """Adversarial Training: minimises (L(x) + L(x*)) / 2 at x* = x + ε sign(∇_x L), x* a constant.

    Args:
        epsilon: ε ≥ 0, a number or a 0-d tensor: how far each number of x moves, in x's units as the model sees them
            (divide pixels by std where inputs are normalised); x* is not clipped.
        criterion: the loss L of the data, as ``Method`` describes; None is cross-entropy on class numbers.

    Raises:
        MethodError, InputTypeError: for a value out of range, or no number.
    """

    key, title, parameter = "at", "Adversarial Training", "epsilon"
    epsilon: Strength

    def recipe(self, s: Step) -> Recipe:
        """½ g(a, d) + ½ g(a*, d*)."""
        a = s.forward()
        d = a.reverse(a.counted(a.c))
        b = s.forward(a.fgsm(s.x, d, self.epsilon))
        yield s.objective(a, (0.5, a.losses), (0.5, b.losses))
        yield 0.5 * g(a, d)
        yield 0.5 * g(b, b.reverse(b.counted(b.c)))


@dataclass(frozen=True, repr=False, eq=False)
class FastAdversarialTraining(Method):
    """Fast Adversarial Training: minimises L(x*) at x* = x + ε sign(∇_x L), x* a constant.

    Args:
        epsilon: ε ≥ 0, a number or a 0-d tensor: how far each number of x moves, in x's units as the model sees them
            (divide pixels by std where inputs are normalised); x* is not clipped.
        criterion: the loss L of the data, as ``Method`` describes; None is cross-entropy on class numbers.

    Raises:
        MethodError, InputTypeError: for a value out of range, or no number.
    """

    key, title, parameter = "fast_at", "Fast AT", "epsilon"
    epsilon: Strength

    def recipe(self, s: Step) -> Recipe:
        """g(a*, d*)."""
        a = s.forward()
        b = s.forward(a.fgsm(s.x, a.reverse(a.counted(a.c)), self.epsilon))
        yield s.objective(b, (1, b.losses))
        yield g(b, b.reverse(b.counted(b.c)))


@dataclass(frozen=True, repr=False, eq=False)
class PGDTraining(Method):
    """PGD adversarial training (Madry et al. 2018): minimises L(x*), x* by steps of gradient sign within ‖x* − x‖∞ ≤ ε.

    Args:
        epsilon: ε ≥ 0, a number or a 0-d tensor: how far each number of x moves, in x's units as the model sees them
            (divide pixels by std where inputs are normalised); x* is not clipped.
        step_size: length of each step, ≥ 0, in x's units.
        steps: their number, at least 1; each costs a forward and a reverse sweep.
        random_start: whether to start at a uniform point of the box instead of x.
        criterion: the loss L of the data, as ``Method`` describes; None is cross-entropy on class numbers.

    Raises:
        MethodError, InputTypeError: for a value out of range, or no number.
    """

    key, title, parameter = "pgd_training", "PGD training", "epsilon"
    epsilon: Strength
    step_size: float
    steps: int
    random_start: bool = True

    def recipe(self, s: Step) -> Recipe:
        """g(a*, d*)."""
        star = s.x
        if self.random_start:
            star = s.x + self.epsilon * (2 * s.uniform(*s.x.shape) - 1)
        for _ in range(self.steps):
            a = s.forward(star)
            star = _within(a.fgsm(star, a.reverse(a.counted(a.c)), self.step_size), s.x, self.epsilon)
        b = s.forward(star)
        yield s.objective(b, (1, b.losses))
        yield g(b, b.reverse(b.counted(b.c)))


@dataclass(frozen=True, repr=False, eq=False)
class TRADES(Method):
    """TRADES (Zhang et al. 2019): minimises L(x) + λ KL(p(x) ‖ p(x*)), x* maximising the KL in ‖x* − x‖∞ ≤ ε.

    The search starts at x + 0.001 n, n standard normal, and treats p(x) as a constant; the gradient takes both sides.

    Args:
        lam: λ ≥ 0, what a sample's divergence, in nats, counts beside its own loss.
        epsilon: ε ≥ 0, a number or a 0-d tensor: how far each number of x moves, in x's units as the model sees them
            (divide pixels by std where inputs are normalised); x* is not clipped.
        step_size: length of each step, ≥ 0, in x's units.
        steps: their number, at least 1; each costs a forward and a reverse sweep.
        criterion: None alone, for TRADES is defined for cross-entropy on class numbers.

    Raises:
        MethodError, InputTypeError: for a value out of range, or no number.
    """

    key, title, parameter = "trades", "TRADES", "lam"
    lam: Strength
    epsilon: Strength
    step_size: float
    steps: int

    def recipe(self, s: Step) -> Recipe:
        """g(a, d) + λ g(a, h) + λ g(b, e): h_K = p∘(log p − log q − KL), e_K = q − p at x*."""
        s.plain_labels("TRADES")
        star = s.x + 0.001 * s.normal(*s.x.shape)
        a = s.forward()
        log_p = a.logits.log_softmax(1)
        p = log_p.exp()
        for _ in range(self.steps):
            b = s.forward(star)
            star = _within(b.fgsm(star, b.reverse(b.logits.softmax(1) - p), self.step_size), s.x, self.epsilon)
        b = s.forward(star)
        log_q = b.logits.log_softmax(1)
        gap = log_p - log_q
        divergence = (p * gap).sum(1)
        yield s.objective(a, (1, a.losses), penalty=(self.lam, divergence))
        yield g(a, a.reverse(a.counted(a.c)))
        yield self.lam * g(a, a.reverse(p * (gap - divergence[:, None])))
        yield self.lam * g(b, b.reverse(log_q.exp() - p))


def _within(star: Tensor, x: Tensor, epsilon: Any) -> Tensor:
    """The nearest point with ‖star − x‖∞ ≤ ε."""
    return x + (star - x).clamp(-epsilon, epsilon)
