"""The training methods by key. ``METHODS`` holds the paper's seven and three of the literature."""

from ibp_triton.methods.adversarial import TRADES, AdversarialTraining, FastAdversarialTraining, PGDTraining
from ibp_triton.methods.base import Method, Parts
from ibp_triton.methods.ibp import BP, LossIBP, PredictionIBP
from ibp_triton.methods.jacobian import JacobianRegularisation
from ibp_triton.methods.tangent import FastTangentBP, TangentBP

PAPER: dict[str, type[Method]] = {
    method.key: method
    for method in (BP, LossIBP, PredictionIBP, AdversarialTraining, FastAdversarialTraining, TangentBP, FastTangentBP)
}
METHODS: dict[str, type[Method]] = {
    **PAPER,
    **{method.key: method for method in (JacobianRegularisation, PGDTraining, TRADES)},
}

__all__ = [
    "BP",
    "METHODS",
    "PAPER",
    "TRADES",
    "AdversarialTraining",
    "FastAdversarialTraining",
    "FastTangentBP",
    "JacobianRegularisation",
    "LossIBP",
    "Method",
    "PGDTraining",
    "Parts",
    "PredictionIBP",
    "TangentBP",
]
