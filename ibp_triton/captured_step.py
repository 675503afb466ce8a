"""A training step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ibp_triton.alike import flags, plain, with_latest
from ibp_triton.checks import check_tangents
from ibp_triton.errors import MethodError
from ibp_triton.methods.base import Method, Parts
from ibp_triton.methods.cost import none
from ibp_triton.step import KEPT, SEEN, EagerStep, strength_tensors, value_of

WARM_UP = 3  # eager steps before a capture: they create the optimizer's state and fill torch's caches


class CapturedStep(EagerStep):
    """The same step as one CUDA graph: a single launch for the CPU. Without CUDA, and with several processes, eagerly.

    Of each kind of batch the first three run eagerly, the fourth is captured and later ones replay it. β, ε and λ
    lie on the device and may change. A step that differs in anything else that a capture holds (shapes, a learning
    rate that is a number, modes, frozen layers, parameters or optimizer state that have moved) is captured anew.

    Args:
        network: the model, wrapped or bare.
        method: one of ``ibp_triton.METHODS``.
        optimizer: one with a ``capturable`` option needs ``capturable=True`` on CUDA.
        accumulate: must be 1 here.
        clip_norm: as for ``EagerStep``.
        reduce: as for ``EagerStep``; it is captured too.

    Raises:
        MethodError (a ValueError): for an optimizer that can't be captured, or for accumulation.
    """

    def _begin(self) -> None:
        self.captures = 0
        self._seen: dict[Any, int] = {}
        self._made: dict[Any, _Captured] = {}
        if self.accumulate != 1:
            raise MethodError("CapturedStep: a graph holds whole updates: use accumulate=1, or EagerStep")
        if self._device.type == "cuda" and any(g.get("capturable") is False for g in self.optimizer.param_groups):
            name = type(self.optimizer).__name__
            raise MethodError(
                f"CapturedStep: {name} keeps its step count on the CPU: construct it with capturable=True"
            )

    @property
    def _device(self) -> torch.device:
        return next(self.network.model.parameters()).device

    def __call__(
        self, x: Tensor, y: Any, tangents: Tensor | None = None, extra: Mapping[str, Any] | None = None
    ) -> Parts:
        """One batch; arguments as for ``EagerStep``."""
        if not _can_capture(self._device) or self.network.world is not None:
            return super().__call__(x, y, tangents, extra)
        check_tangents(self.method.key, self.method.needs_tangents, x, tangents)
        batch = (x, torch.as_tensor(y, device=x.device), tangents, dict(extra or {}))
        with _current(self._device):
            return self._on_device(batch)

    def _on_device(self, batch: Any) -> Parts:
        kind = self._key(*batch)
        if self._seen.get(kind, 0) < WARM_UP:
            self._seen = with_latest(self._seen, kind, self._seen.get(kind, 0) + 1, SEEN)
            with _side_stream(self._device):
                return super().__call__(*batch)
        self._refuse_host_state()
        held = (kind, self._held())
        found = self._made.get(held)
        if found is None:
            found = _Captured(self, batch)
            self.captures += 1
            self._made = with_latest(self._made, held, found, KEPT)
        return found(batch, self.method)

    def eager(self, batch: Any, method: Method) -> Parts:
        """The step of this method that a capture records, ``batch`` being the four arguments of a step."""
        own, self.method = self.method, method
        try:
            return super().__call__(*batch)
        finally:
            self.method = own

    def _held(self) -> tuple[Any, ...]:
        """The addresses and numbers that a capture freezes."""
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        numbers = tuple(plain(v) for g in groups for _, v in sorted(g.items()))
        states = tuple(t.data_ptr() for t in self._state())
        places = tuple(p.data_ptr() for p in self.network.model.parameters())
        value = value_of(self.method)
        strength = id(value) if isinstance(value, Tensor) else none(value)  # for which some methods do less
        return strength, numbers, states, places, tuple(b.data_ptr() for b in self.network.model.buffers()), flags()

    def _state(self) -> list[Tensor]:
        """The optimizer's."""
        return [t for t in tree_leaves(list(self.optimizer.state.values())) if isinstance(t, Tensor)]

    def _refuse_host_state(self) -> None:
        if any(t.device.type != self._device.type for t in self._state()):
            raise MethodError(
                f"CapturedStep: {type(self.optimizer).__name__} keeps part of its state on the CPU, where a CUDA graph "
                "can't move it: use capturable=True, another optimizer, or EagerStep"
            )


class _Captured:
    """A captured step: buffers that it reads, the strength among them, the graph, and what it writes."""

    def __init__(self, step: CapturedStep, batch: Any) -> None:
        self._batch = tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, batch)
        self._strength = {} if none(value_of(step.method)) else strength_tensors(step.method, batch[0])
        graph = _graph()
        with _capturing(graph):
            self._parts = step.eager(self._batch, step.method.at(**self._strength))
        self._gradients = [(p, p.grad) for p in step.network.model.parameters()]
        self._graph = graph  # last: a capture that failed leaves nothing to replay

    def __call__(self, batch: Any, method: Method) -> Parts:
        for name, held in self._strength.items():
            if getattr(method, name) is not held:
                held.fill_(getattr(method, name))
        for own, new in zip(tree_leaves(self._batch), tree_leaves(batch), strict=True):
            if isinstance(own, Tensor):
                own.copy_(new)
        for parameter, gradient in self._gradients:  # a step of another kind may have put its own there
            parameter.grad = gradient
        self._graph.replay()
        return Parts(*(None if part is None else part.clone() for part in self._parts))  # type: ignore[arg-type]


def _can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


def _graph() -> Any:
    return torch.cuda.CUDAGraph()


def _capturing(graph: Any) -> Any:
    return torch.cuda.graph(graph)


def _current(device: torch.device) -> Any:
    return torch.cuda.device(device)


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Beside the current stream, as the warm-up of a capture must be."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)
