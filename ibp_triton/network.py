"""Network: a model as a sequence of layers whose four rules the sweeps apply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ibp_triton import ledger
from ibp_triton.builder import Builder
from ibp_triton.graph import Graph
from ibp_triton.trace import Trace, run
from ibp_triton.tracing import signature, trace

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


class Network:
    """Any classifier ``model(x) -> logits [N, M]`` as nodes in order, for the explicit sweeps of the methods.

    The parameters stay the model's own; ``train()`` and ``eval()`` are followed. Submodules that torch.fx cannot trace
    run as one layer each, named once in a warning; no model is refused for its structure.

    Args:
        model: the classifier; x is its one input.
        backend: "torch", "triton", or "auto" (triton where the parameters are on a CUDA device, else torch).
        dtype: the dtype to compute in, e.g. torch.bfloat16 with float32 parameters as master weights; None computes
            in the parameters' own dtype. Gradients always come in the parameters' dtype.

    Raises:
        TypeError: for a model wrapped for data parallelism or compiled; the message names the cure.
        ValueError: for an unknown backend or a dtype that is not floating point.
    """

    def __init__(self, model: nn.Module, backend: str = "auto", dtype: torch.dtype | None = None) -> None:
        _check_model(model)
        if backend not in ("auto", "torch", "triton"):
            raise ValueError(f"backend must be 'auto', 'torch' or 'triton', not {backend!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point dtype such as torch.bfloat16, not {dtype}")
        self.model, self.backend, self.dtype = model, backend, dtype
        self._graphs: dict[Any, Graph] = {}
        self._warned = False
        self._shape: tuple[int, ...] | None = None

    def graph(self) -> Graph:
        """The nodes for the model's present structure and train/eval modes; traced once for each."""
        fast = self.native
        key = (signature(self.model), fast)
        if key not in self._graphs:
            graph = self._trace()
            self._graphs[key] = import_module("ibp_triton.rules.triton").lower(graph) if fast else graph
        return self._graphs[key]

    @property
    def native(self) -> bool:
        """Whether the Triton kernels are in use: asked for, or parameters on CUDA, and a dtype that they compute in."""
        first = next(self.model.parameters(), None)
        if self.backend == "torch" or first is None or (self.dtype or first.dtype) not in _KERNEL_DTYPES:
            return False
        if self.backend == "auto":
            return first.is_cuda and find_spec("triton") is not None
        if find_spec("triton") is None:
            raise ImportError("backend='triton' needs the package triton: pip install triton, or use backend='torch'")
        return True

    @property
    def head(self) -> Any:
        """The loss head of the backend in use: see ``ibp_triton.head``."""
        if not self.native:
            return import_module("ibp_triton.head")
        return import_module("ibp_triton.rules.triton_head").Head(self.graph())

    def _trace(self) -> Graph:
        warn, self._warned = not self._warned, True
        graph = trace(self.model, lambda graph, model: Builder(model).build(graph, model), warn)
        return graph if graph is not None else Builder(self.model).whole()

    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters by name, each once."""
        return dict(self.model.named_parameters())

    def forward(
        self, x: Tensor, parameters: Mapping[str, Tensor], first: Trace | None = None, frugal: bool = False
    ) -> Trace:
        """The first sweep at x [N, ...]; see ``ibp_triton.trace.run``."""
        self._shape = tuple(x.shape)
        return run(self.graph(), self.model, x, parameters, self.dtype, first, frugal)

    def summary(self, input_shape: Sequence[int] | None = None) -> str:
        """The nodes, the rule each uses and the multiply-adds of every sweep, as text to print.

        Args:
            input_shape: [N, ...]; by default that of the last batch.

        Raises:
            ValueError: without a shape before the first batch.
        """
        return ledger.summary(self._rows(input_shape))

    def multiply_adds(self, input_shape: Sequence[int] | None = None) -> ledger.MultiplyAdds:
        """Multiply-adds of each sweep on inputs [N, ...] of this shape (by default the last batch's)."""
        return ledger.total(self._rows(input_shape))

    def _rows(self, input_shape: Sequence[int] | None) -> list[ledger.Row]:
        shape = self._shape if input_shape is None else tuple(input_shape)
        if shape is None:
            raise ValueError("the network has seen no batch yet: pass the input's shape, summary([32, 1, 28, 28])")
        first = next(self.model.parameters())
        x = torch.zeros(shape, dtype=first.dtype, device=first.device)
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with torch.no_grad(), torch.random.fork_rng([first.device] if first.is_cuda else []):
            rows = ledger.rows(run(self.graph(), self.model, x, {}, self.dtype))
        for buffer, before in buffers:
            buffer.copy_(before)
        return rows

    def __repr__(self) -> str:
        dtype = "" if self.dtype is None else f", dtype={self.dtype}"
        return f"Network({type(self.model).__name__}, backend={self.backend!r}{dtype})"


def _check_model(model: Any) -> None:
    if isinstance(model, _WRAPPERS):
        raise TypeError(
            f"Network needs the plain model, not {type(model).__name__}: put the loss inside the wrapper instead. "
            "Write a module whose forward(x, labels) returns method(self.network, x, labels), with self.model = model "
            "and self.network = Network(model), and wrap that module"
        )
    if type(model).__name__ == "OptimizedModule":
        raise TypeError("Network needs the plain model, not the result of torch.compile: pass the module you compiled")
    if not isinstance(model, nn.Module):
        raise TypeError(f"Network needs a torch.nn.Module, not {type(model).__name__}")
