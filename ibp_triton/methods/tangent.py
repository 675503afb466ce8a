"""Tangent propagation: invariance along given directions."""

from __future__ import annotations

from dataclasses import dataclass

from ibp_triton.methods.base import Method, Strength
from ibp_triton.methods.ibp import along, bent
from ibp_triton.methods.passes import Recipe, Step
from ibp_triton.sweeps import g


@dataclass(frozen=True, repr=False, eq=False)
class TangentBP(Method):
    """Tangent BP (Simard et al. 1992): minimises L + β Σ_j ‖J τ_j‖_r^r / r.

    Args:
        beta: β ≥ 0, a number or a 0-d tensor: what a sample's penalty counts, for each tangent, beside its own loss.
            J τ_j is how the logits change for a unit of the transformation, such as a pixel of shift, so that β has no
            unit of x; tangents k times as long ask for β / k^r.
        norm: r ≥ 1, over the M numbers of J τ_j.
        semantics: "paper" or "exact"; they differ only for layers that are curved in their input, where the paper's
            leaves out the change of J with the layer's input.
        criterion: the loss L of the data, as ``Method`` describes; None is cross-entropy on class numbers.

    Raises:
        MethodError, InputTypeError: for a value out of range, or no number.
    """

    key, title, parameter, needs_tangents = "tbp", "Tangent BP", "beta", True
    beta: Strength
    norm: float = 1
    semantics: str = "paper"

    def recipe(self, s: Step) -> Recipe:
        """g(a, d) + β Σ_j g(t^j, e^j) with t^j_0 = τ_j, e^j_K = ψ(t^j_K); exact: d + βη of curved layers for d."""
        plain = s.without(self.beta)
        a = s.forward()
        t = a.tangent(s.tangents)
        seed, penalty = a.output_seed(t, self.norm)
        if plain is not None:
            yield from s.of_data(plain, penalty)
            return
        yield s.objective(a, (1, a.losses), penalty=(self.beta, penalty))
        e = a.reverse(seed)
        if self.semantics == "exact":
            yield from bent(a, self.beta, e, t)
        else:
            yield g(a, a.reverse(a.counted(a.c)))
        yield self.beta * g(t, e)


@dataclass(frozen=True, repr=False, eq=False)
class FastTangentBP(Method):
    """Fast Tangent BP: minimises L + β Σ_j |⟨∇_x L, τ_j⟩|^r / r, all tangents in one collapsed seed.

    Args:
        beta: β ≥ 0, a number or a 0-d tensor: what a sample's penalty counts, for each tangent, beside its own loss.
            ⟨∇_x L, τ_j⟩ is how the loss changes for a unit of the transformation, so that β has no unit of x; tangents
            k times as long ask for β / k^r.
        norm: r ≥ 1, of the single number ⟨∇_x L, τ_j⟩.
        semantics: "paper" (Algorithm 1: ∂L/∂z counts as a constant in the extra passes, biases get no gradient of the
            penalty; it is not the objective's gradient) or "exact" (the objective's true gradient, as
            ``create_graph=True`` would give it, for 6 sweeps instead of 4).
        criterion: the loss L of the data, as ``Method`` describes; None is cross-entropy on class numbers.

    Raises:
        MethodError, InputTypeError: for a value out of range, or no number.
    """

    key, title, parameter, needs_tangents = "fast_tbp", "Fast Tangent BP", "beta", True
    beta: Strength
    norm: float = 1
    semantics: str = "paper"

    def recipe(self, s: Step) -> Recipe:
        """g(a + βt, d) with t_0 = Σ_j ψ(⟨d_0, τ_j⟩) τ_j; exact: and g(a, δ) with δ_K = H t_K."""
        a = s.forward()
        d = a.reverse(a.c)
        assert s.tangents is not None  # checked before the step began
        seed, penalty = a.tangent_seed(d, s.tangents, self.norm)
        yield s.objective(a, (1, a.losses), penalty=(self.beta, penalty))
        yield from along(a, d, seed, self.beta, self.semantics)
