"""Standard backpropagation and the two forms of Invariant Backpropagation. Equations: arXiv 1502.04434v3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ibp_triton.methods.base import Method, Strength
from ibp_triton.methods.cost import none
from ibp_triton.methods.passes import Pass, Recipe, Step
from ibp_triton.sweeps import Linear, Reverse, Term, g


@dataclass(frozen=True, repr=False, eq=False)
class BP(Method):
    """Standard backpropagation: minimises L, the mean of the criterion over the batch.

    Args:
        criterion: the loss L of the data, as ``Method`` describes; None is cross-entropy on class numbers.
    """

    key, title = "bp", "BP"

    def recipe(self, s: Step) -> Recipe:
        """g(a, d)."""
        a = s.forward()
        yield s.objective(a, (1, a.losses))
        yield g(a, a.reverse(a.counted(a.c)))


@dataclass(frozen=True, repr=False, eq=False)
class LossIBP(Method):
    """Loss IBP: minimises L + β ‖∇_x L‖_r^r / r (Eq. 8 of the paper and Algorithm 1).

    Args:
        beta: β ≥ 0, a number or a 0-d tensor: what a sample's penalty counts beside its loss. ∇_x L is each sample's,
            not the batch mean's: β does not depend on the batch size. For norm 1 β has the unit of x, and the penalty
            is to first order the largest rise of L while no number of x moves by more than β; for norm r its unit is
            loss · (x per loss)^r. Inputs divided by s ask for β / s^r.
        norm: r ≥ 1. 1 sums |∂L/∂x_i| over a sample's numbers, 2 is half their squared Euclidean length.
        semantics: "paper" (Algorithm 1: ∂L/∂z counts as a constant in the extra passes, biases get no gradient of the
            penalty; it is not the objective's gradient) or "exact" (the objective's true gradient, as
            ``create_graph=True`` would give it, for 6 sweeps instead of 4).
        criterion: the loss L of the data, as ``Method`` describes; None is cross-entropy on class numbers.

    Raises:
        MethodError, InputTypeError: for a value out of range, or no number.
    """

    key, title, parameter = "loss_ibp", "Loss IBP", "beta"
    beta: Strength
    norm: float = 1
    semantics: str = "paper"

    def recipe(self, s: Step) -> Recipe:
        """g(a + βt, d) with t_0 = ψ(d_0); exact: and g(a, δ) with δ_K = H t_K."""
        a = s.forward()
        d = a.reverse(a.c)
        seed, penalty = a.input_seed(d, self.norm)
        yield s.objective(a, (1, a.losses), penalty=(self.beta, penalty))
        yield from along(a, d, seed, self.beta, self.semantics)


@dataclass(frozen=True, repr=False, eq=False)
class PredictionIBP(Method):
    """Prediction IBP: minimises L + β ‖J ∇_x L‖_r^r / r, J the Jacobian of the logits (Section 4 of the paper).

    Args:
        beta: β ≥ 0, a number or a 0-d tensor: what a sample's penalty counts beside its own loss. J ∇_x L is how the M
            logits move along the gradient, each sample's. For norm 1 β has the unit of x squared; inputs divided by s
            ask for β / s^(2r). The paper's values may be for derivatives of the mean over a batch of 32: divided by 32,
            they stand for the same penalty of norm 1 here.
        norm: r ≥ 1, over the M numbers of J ∇_x L.
        semantics: "paper" (Algorithm 1: ∂L/∂z counts as a constant in the extra passes, biases get no gradient of the
            penalty; it is not the objective's gradient) or "exact" (the objective's true gradient, as
            ``create_graph=True`` would give it, for 9 sweeps instead of 6).
        criterion: the loss L of the data, as ``Method`` describes; None is cross-entropy on class numbers.

    Raises:
        MethodError, InputTypeError: for a value out of range, or no number.
    """

    key, title, parameter = "prediction_ibp", "Prediction IBP", "beta"
    beta: Strength
    norm: float = 1
    semantics: str = "paper"

    def recipe(self, s: Step) -> Recipe:
        """g(a, d) + β g(t, e) with t_0 = d_0, e_K = ψ(t_K); exact: and Loss IBP's exact term with seed e_0."""
        plain = s.without(self.beta)
        a = s.forward()
        d = a.reverse(a.c)
        t = a.tangent(d.at_input)
        seed, penalty = a.output_seed(t, self.norm)
        if plain is not None:
            yield from s.of_data(plain, penalty)
            return
        yield s.objective(a, (1, a.losses), penalty=(self.beta, penalty))
        e = a.reverse(seed)
        if self.semantics == "paper":
            yield a.data(d)
            yield self.beta * g(t, e)
            return
        u = a.tangent(e.at_input)
        yield a.data(d)
        yield self.beta * g(t, e)
        yield self.beta * g(u, d)
        yield self.beta * g(a, a.reverse(a.hessian(u), bends=[(d, u), (e, t)]))


def bent(a: Pass, beta: Any, r: Reverse, t: Linear) -> Iterator[Term]:
    """g(a, d) + β g(a, η), η the curvature along r and t, where it may be as g(a, d + βη), by one sweep."""
    c = a.counted(a.c)
    if a.adds_up:
        yield g(a, a.reverse(c, bends=[(r, t)], bent_by=beta))
        return
    yield g(a, a.reverse(c))
    yield beta * g(a, a.reverse(None, bends=[(r, t)]))


def along(a: Pass, d: Reverse, seed: Any, beta: Any, semantics: str) -> Iterator[Term]:
    """Terms of L + β ⟨d_0, seed⟩: paper g(a + βt, d); exact also g(a, δ), the change of d along the seed."""
    if none(beta):
        yield a.data(d)
        return
    if semantics == "exact" and a.curved:
        yield a.data(d)
        yield beta * a.change(seed)
        return
    t = a.tangent(seed)
    bent = a.reverse(a.hessian(t), bends=[(d, t)]) if semantics == "exact" else None
    yield a.data(d)
    yield beta * g(t, d)
    if bent is not None:
        yield beta * g(a, bent)
