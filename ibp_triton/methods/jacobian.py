"""Jacobian regularisation: robustness by small derivatives of all outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ibp_triton.errors import MethodError
from ibp_triton.layer import wide
from ibp_triton.methods.base import Method, Strength
from ibp_triton.methods.ibp import bent
from ibp_triton.methods.passes import Recipe, Step
from ibp_triton.sweeps import g


@dataclass(frozen=True, repr=False, eq=False)
class JacobianRegularisation(Method):
    """Jacobian regularisation (Hoffman et al. 2019): minimises L + β ½ ‖J‖_F², J the Jacobian of the M logits.

    ‖J‖_F² is estimated without bias by (M / n) Σ_j ‖Jᵀ v_j‖², v_j [N, M] uniform on the unit sphere, new in each step.

    Args:
        beta: β ≥ 0, a number or a 0-d tensor: what a sample's penalty counts beside its own loss. J is in logits per
            unit of x, β in units of x squared; inputs divided by s ask for β / s².
        projections: n ≥ 1, or "all" for the M unit vectors, which give ‖J‖_F² itself.
        semantics: "exact" (the true gradient of the objective) or "paper" (without the curvature of layers).
        criterion: the loss L of the data, as ``Method`` describes; None is cross-entropy on class numbers.

    Raises:
        MethodError, InputTypeError: for a value out of range, or no number.
    """

    key, title, parameter = "jacobian", "Jacobian regularisation", "beta"
    beta: Strength
    projections: int | Literal["all"] = 1
    semantics: str = "exact"

    def recipe(self, s: Step) -> Recipe:
        """g(a, d) + β Σ_j g(t^j, r^j) with r^j_K = v_j, t^j_0 = (M/n) r^j_0; exact: d + βη of curved layers for d."""
        classes, count = s.classes(), s.x.shape[0]
        v = _basis(s.x, count, classes) if self.projections == "all" else _sphere(s, self.projections, count, classes)
        plain = s.without(self.beta)
        a = s.forward()
        if a.logits.dim() != 2:
            raise MethodError(f"Jacobian regularisation needs logits [N, M], not {list(a.logits.shape)}")
        r = a.reverse(v.to(a.logits.dtype))
        scale, rank = classes / v.shape[0], s.x.dim()
        penalty = scale / 2 * a.counted(wide(r.at_input).square(), rank).sum()
        if plain is not None:
            yield from s.of_data(plain, penalty)
            return
        yield s.objective(a, (1, a.losses), penalty=(self.beta, penalty))
        seed = scale * a.counted(r.at_input, rank)
        if self.semantics == "exact" and a.curved:
            yield g(a, a.reverse(a.counted(a.c)))
            yield self.beta * a.change(seed)
            return
        t = a.tangent(seed)
        if self.semantics == "exact":
            yield from bent(a, self.beta, r, t)
        else:
            yield g(a, a.reverse(a.counted(a.c)).run())  # so that t may run along with the weight gradients
        yield self.beta * g(t, r)


def _basis(x: Tensor, count: int, classes: int) -> Tensor:
    """The unit vectors of the logits [M, N, M], the same for all samples."""
    return torch.eye(classes, dtype=x.dtype, device=x.device)[:, None].expand(classes, count, classes).contiguous()


def _sphere(s: Step, projections: int, count: int, classes: int) -> Tensor:
    """Directions uniform on the unit sphere, [n, N, M]."""
    return torch.nn.functional.normalize(s.normal(projections, count, classes), dim=2)
