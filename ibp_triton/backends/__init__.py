"""What computes a network's layers and its loss head: torch's functions, or the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from ibp_triton.graph import Graph
from ibp_triton.head import Head

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """Its name, what puts its layers into a recorded graph (None: the recording has them already), and its head."""

    name: str
    lower: Callable[[Graph, bool], Graph] | None  # the flag: whether curvature will be asked of the pass
    head: Callable[[Graph], Head]


def backend_for(name: str, parameter: Tensor | None, dtype: torch.dtype | None) -> Backend:
    """The backend of a network that asks for ``name``: "auto" takes the kernels for parameters on CUDA.

    Args:
        name: "auto", "torch" or "triton".
        parameter: any of the model's; None without one.
        dtype: of the computation; None for the parameter's own.

    Raises:
        ImportError: for "triton" where the package is missing.
    """
    from ibp_triton.backends.torch import TORCH

    if name == "torch" or parameter is None or (dtype or parameter.dtype) not in KERNEL_DTYPES:
        return TORCH
    if name == "auto" and not parameter.is_cuda:
        return TORCH
    installed = find_spec("triton") is not None
    if name == "auto" and not installed:
        return TORCH
    if not installed:
        raise ImportError("backend='triton' needs the package triton: pip install triton, or use backend='torch'")
    from ibp_triton.backends.triton import TRITON

    return TRITON
