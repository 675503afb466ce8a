"""Invariant Backpropagation and its rivals as drop-in losses for PyTorch.

Invariant Backpropagation (arXiv 1502.04434) trains classifiers whose loss or predictions change little when the input
moves. It has nothing to do with Interval Bound Propagation, which the literature abbreviates alike.
"""

from ibp_triton import attacks, reference
from ibp_triton.allocator import keep_freed_memory
from ibp_triton.attacks import fgsm, gaussian_noise, pgd, random_signs
from ibp_triton.captured_step import CapturedStep
from ibp_triton.compiled_step import CompiledStep
from ibp_triton.errors import IBPError
from ibp_triton.evaluation import robustness
from ibp_triton.methods import (
    BP,
    METHODS,
    TRADES,
    AdversarialTraining,
    FastAdversarialTraining,
    FastTangentBP,
    JacobianRegularisation,
    LossIBP,
    Method,
    Parts,
    PGDTraining,
    PredictionIBP,
    TangentBP,
)
from ibp_triton.network import Network
from ibp_triton.outcomes import Robustness
from ibp_triton.replicas import ReplicatedNetwork
from ibp_triton.replicated_step import ReplicatedStep
from ibp_triton.step import EagerStep
from ibp_triton.tangents import lie_tangents

__all__ = [
    "BP",
    "METHODS",
    "TRADES",
    "AdversarialTraining",
    "CapturedStep",
    "CompiledStep",
    "EagerStep",
    "FastAdversarialTraining",
    "FastTangentBP",
    "IBPError",
    "JacobianRegularisation",
    "LossIBP",
    "Method",
    "Network",
    "PGDTraining",
    "Parts",
    "PredictionIBP",
    "ReplicatedNetwork",
    "ReplicatedStep",
    "Robustness",
    "TangentBP",
    "attacks",
    "fgsm",
    "gaussian_noise",
    "keep_freed_memory",
    "lie_tangents",
    "pgd",
    "random_signs",
    "reference",
    "robustness",
]
__version__ = "0.1.0"
