"""A whole training step, method and optimizer, as one call: a CUDA graph where there is CUDA, eager elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ibp_triton.methods.base import Method
from ibp_triton.network import Network

WARM_UP = 3  # real steps, run eagerly, before a capture: they create the optimizer's state and fill torch's caches


class CapturedStep:
    """``step(x, labels)`` trains on one batch and returns the objective, 0-d, as it was before the update.

    On CUDA the first three steps run eagerly, the fourth is captured and later ones replay it: one launch for the CPU.
    A step whose numbers have changed (β, ε, a learning rate) is captured anew; a batch of another shape runs eagerly.
    Without CUDA every step runs eagerly, with the same results. Gradients stay in ``.grad``, as after ``backward()``.

    Args:
        network: the wrapped model; move it to its device first.
        method: one of ``ibp_triton.METHODS``, with numbers (not tensors) for its hyper-parameters. Assign
            ``step.method`` to change them.
        optimizer: over the model's parameters; one with a ``capturable`` option needs ``capturable=True`` on CUDA.
        batch_shape: shape [N, ...] of x in every full batch.
        tangents: T, for a method that needs tangent vectors.

    Raises:
        ValueError: for an optimizer that cannot be captured on the model's device, or for tangents without need.
    """

    def __init__(
        self,
        network: Network,
        method: Method,
        optimizer: torch.optim.Optimizer,
        batch_shape: Sequence[int],
        tangents: int = 0,
    ) -> None:
        self.network, self.method, self.optimizer = network, method, optimizer
        self.batch_shape, self.tangents = tuple(batch_shape), tangents
        self.captures = 0
        self._graph: Any = None
        self._key: Any = None
        self._seen = 0
        first = next(network.model.parameters())
        self._cuda = first.is_cuda
        if method.needs_tangents != bool(tangents):
            need = "needs the number of tangent vectors" if method.needs_tangents else "takes no tangent vectors"
            raise ValueError(f"CapturedStep: {method.key} {need}, and got tangents={tangents}")
        if self._cuda and any(group.get("capturable") is False for group in optimizer.param_groups):
            name = type(optimizer).__name__
            raise ValueError(f"CapturedStep: {name} keeps its step count on the CPU: construct it with capturable=True")
        if self._cuda:
            self._make_buffers(first)

    def _make_buffers(self, first: Tensor) -> None:
        self._x = first.new_zeros(self.batch_shape)
        self._labels = torch.zeros(self.batch_shape[:1], dtype=torch.int64, device=first.device)
        self._tau = first.new_zeros((self.tangents, *self.batch_shape)) if self.tangents else None

    def __call__(self, x: Tensor, labels: Tensor, tangents: Tensor | None = None) -> Tensor:
        """One step on x [N, ...], labels [N] and, for tangent methods, tangents [T, N, ...]; returns the objective."""
        if not self._cuda or tuple(x.shape) != self.batch_shape:
            return self._step(x, labels, tangents)
        if self._key != self._numbers():
            self._graph, self._key = None, self._numbers()
        if self._graph is None and self._seen < WARM_UP:
            self._seen += 1
            return self._beside(x, labels, tangents)
        self._x.copy_(x)
        self._labels.copy_(labels)
        if self._tau is not None and tangents is not None:
            self._tau.copy_(tangents)
        if self._graph is None:
            self._capture()
        self._graph.replay()
        return self._loss.clone()

    def _step(self, x: Tensor, labels: Tensor, tangents: Tensor | None) -> Tensor:
        loss, gradients = self.method.gradients(self.network, x, labels, tangents)
        for name, parameter in self.network.model.named_parameters():
            parameter.grad = gradients.get(name)
        self.optimizer.step()
        return loss

    def _beside(self, x: Tensor, labels: Tensor, tangents: Tensor | None) -> Tensor:
        """A step on a side stream, as the warm-up of a capture must be."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = self._step(x, labels, tangents)
        torch.cuda.current_stream().wait_stream(stream)
        return loss

    def _capture(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = self._step(self._x, self._labels, self._tau)
        self.captures += 1

    def _numbers(self) -> tuple[Any, ...]:
        """What a capture freezes: the method's numbers, the optimizer's, and the model's train or eval mode."""
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        modes = tuple(m.training for m in self.network.model.modules())
        return repr(self.method), tuple(tuple(sorted((k, repr(v)) for k, v in g.items())) for g in groups), modes
