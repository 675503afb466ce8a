"""Standard backpropagation and the two forms of Invariant Backpropagation. Equations: arXiv 1502.04434v3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ibp_triton.methods.base import Method, Pass, Recipe, Step, none
from ibp_triton.sweeps import Reverse, Term, g


@dataclass(frozen=True, repr=False, eq=False)
class BP(Method):
    """Standard backpropagation: minimises L."""

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
        beta: strength of the penalty, for the derivative of each sample's loss with respect to x in x's units.
        norm: r.
        semantics: "paper" (Algorithm 1) or "exact" (the true gradient of the objective).
    """

    key, title, parameter = "loss_ibp", "Loss IBP", "beta"
    beta: float
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
        beta: strength of the penalty, per sample.
        norm: r.
        semantics: "paper" or "exact" (the true gradient of the objective).
    """

    key, title, parameter = "prediction_ibp", "Prediction IBP", "beta"
    beta: float
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


def along(a: Pass, d: Reverse, seed: Any, beta: Any, semantics: str) -> Iterator[Term]:
    """Terms of L + β ⟨d_0, seed⟩: paper g(a + βt, d); exact also g(a, δ), the change of d along the seed."""
    if none(beta):
        yield a.data(d)
        return
    t = a.tangent(seed)
    bent = a.reverse(a.hessian(t), bends=[(d, t)]) if semantics == "exact" else None
    yield a.data(d)
    yield beta * g(t, d)
    if bent is not None:
        yield beta * g(a, bent)
