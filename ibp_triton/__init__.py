"""Invariant Backpropagation and its rivals as drop-in losses for PyTorch.

Invariant Backpropagation (arXiv 1502.04434) trains classifiers whose loss or predictions change little when the input
moves. It has nothing to do with Interval Bound Propagation, which the literature abbreviates alike.
"""

from ibp_triton import reference
from ibp_triton.attacks import fgsm, gaussian_noise, pgd
from ibp_triton.capture import CapturedStep
from ibp_triton.methods import (
    BP,
    METHODS,
    AdversarialTraining,
    FastAdversarialTraining,
    FastTangentBP,
    LossIBP,
    Method,
    PredictionIBP,
    TangentBP,
)
from ibp_triton.network import Network
from ibp_triton.tangents import lie_tangents

__all__ = [
    "BP",
    "METHODS",
    "AdversarialTraining",
    "CapturedStep",
    "FastAdversarialTraining",
    "FastTangentBP",
    "LossIBP",
    "Method",
    "Network",
    "PredictionIBP",
    "TangentBP",
    "fgsm",
    "gaussian_noise",
    "lie_tangents",
    "pgd",
    "reference",
]
__version__ = "0.1.0"
