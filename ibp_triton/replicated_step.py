"""A training step of several replicas: their gradients in one vmapped call where that is right, else one by one."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ibp_triton import joined
from ibp_triton.alike import apart, in_short, with_latest
from ibp_triton.compiled_step import CHECKED
from ibp_triton.criteria.criterion import as_tensor
from ibp_triton.errors import MethodError
from ibp_triton.methods.base import Method, Parts
from ibp_triton.randomness import RandomState
from ibp_triton.replicas import ReplicatedNetwork
from ibp_triton.step import SEEN, EagerStep, Reduce
from ibp_triton.vmapped import Inputs, Together, Vmapped


class ReplicatedStep:
    """``step(x, y)`` trains every replica on one batch and returns their ``Parts``, [R] and [R, N, M], detached.

    Each replica becomes what an ``EagerStep`` of its own would make of it, up to rounding: its own method, learning
    rate, draws and running statistics; one that diverges leaves the others alone. All gradients come from one call
    under torch.func.vmap where that has agreed with the gradients of each alone on three batches of a kind, and from
    one call after another elsewhere; a warning then says why. One optimizer call updates all replicas whose options
    agree. Assign ``step.methods`` to change them.

    Args:
        network: the replicas.
        methods: one for each replica; they are trained together where they differ in β, ε, λ or step size alone.
        optimizers: one for each replica, over its model's parameters.
        clip_norm: the largest norm of all gradients of a replica together; None leaves them.
        reduce: what becomes of a replica's {parameter name: gradient} before the update.

    Raises:
        MethodError (a ValueError): for another number of methods or optimizers than of replicas.
    """

    def __init__(
        self,
        network: ReplicatedNetwork,
        methods: Sequence[Method],
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        clip_norm: float | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        if not len(network) == len(methods) == len(optimizers):
            raise MethodError(
                f"ReplicatedStep: {len(network)} replicas need as many methods and optimizers, not {len(methods)} and "
                f"{len(optimizers)}"
            )
        self.network = network
        self._alone = [
            EagerStep(own, method, optimizer, clip_norm=clip_norm, reduce=reduce)
            for own, method, optimizer in zip(network.networks, methods, optimizers, strict=True)
        ]
        self._together = Vmapped(network)
        self._seen: dict[Any, None] = {}
        self._trials: dict[Any, _Trial | None] = {}  # by kind of batch; None: one by one

    @property
    def methods(self) -> list[Method]:
        """Each replica's."""
        return [step.method for step in self._alone]

    @methods.setter
    def methods(self, methods: Sequence[Method]) -> None:
        for step, method in zip(self._alone, methods, strict=True):
            step.method = method

    def __call__(
        self,
        x: Tensor,
        y: Any,
        tangents: Tensor | None = None,
        extra: Mapping[str, Any] | None = None,
        *,
        each: bool = False,
    ) -> Parts:
        """One batch, and an update of every replica.

        Args:
            x: [N, ...] for all replicas, or [R, N, ...].
            y: targets, as the methods take them, or [R, ...] of them.
            tangents: [T, N, ...] or [R, T, N, ...], for tangent methods only.
            extra: the model's other inputs, by name; tensors [R, ...] where they are each replica's own.
            each: whether x, y, tangents and extra are each replica's own, with an axis of replicas in front.
        """
        batch = Inputs(x, as_tensor(y, x), tangents, dict(extra or {}), len(self.network) if each else None)
        batch.check()
        for step in self._alone:
            step.optimizer.zero_grad()
        self.network.gather()
        parts = self._gradients(batch)
        for step in self._alone:
            step._finish_gradients()
        joined.step([step.optimizer for step in self._alone])
        return parts

    def _gradients(self, batch: Inputs) -> Parts:
        """Into ``.grad`` of each replica's parameters."""
        kind = tuple(step._key(batch.x, batch.y, batch.tangents, batch.extra) for step in self._alone)
        if kind not in self._seen:  # one that comes once, such as an epoch's last, is not worth the check
            self._seen = with_latest(self._seen, kind, None, SEEN)
            return self._one_by_one(batch)
        trial = self._trials.get(kind, _Trial())
        if trial is None or trial.is_slower:
            return self._one_by_one(batch)
        clock = _Clock(batch.x)
        try:
            found = self._together(self.methods, batch)
        except Exception as error:  # of torch's transforms or of the model under them, whatever its type
            parts = self._one_by_one(batch)
            self._give_up(kind, in_short(error))
            return parts
        if trial.count == CHECKED:
            return self._taken(found)
        together, clock = clock.seconds(), _Clock(batch.x)
        parts = self._one_by_one(batch)
        self._judge(kind, trial.plus(together, clock.seconds()), found, parts)
        return parts

    def _one_by_one(self, batch: Inputs) -> Parts:
        states, parts = self.network.states, list[Parts]()
        for r, step in enumerate(self._alone):
            own = batch.of(r)
            with states[r].again():
                parts.append(step._add_gradients(*own))
                states[r] = RandomState.now([own[0]])
        return _stacked(parts)

    def _taken(self, found: Together) -> Parts:
        """The gradients, buffers and random states become the replicas'."""
        for name, gradient in found.gradients.items():
            for own, g in zip(self.network.own, gradient, strict=True):
                own[name].grad = g
        for name, buffer in found.buffers.items():
            self.network.buffers[name].copy_(buffer)
        self.network.states = list(found.states)
        return Parts(**{"penalty": None, **found.parts})  # type: ignore[arg-type]

    def _judge(self, kind: Any, trial: _Trial, found: Together, parts: Parts) -> None:
        """Hold the gradients found together against those found one by one, which the replicas have now."""
        off = [self._off(r, found, parts) for r in range(len(self.network))]
        worst = max((one for one in off if one is not None), default=None)
        limit = tolerance(parts.logits.dtype)
        if worst is not None and not worst <= limit:
            self._give_up(kind, f"together they are off by {worst:.2g} of the largest entry, more than {limit:g}")
        elif worst is not None:
            self._trials = with_latest(self._trials, kind, trial, SEEN)

    def _off(self, r: int, found: Together, parts: Parts) -> float | None:
        """How far a replica's gradient, loss, buffers and draws are from its own; None of one that has diverged."""
        own = {name: p.grad for name, p in self.network.own[r].items() if p.grad is not None}
        if not all(bool(g.isfinite().all()) for g in (*own.values(), parts.loss[r])):
            return None
        if found.states[r].differs(self.network.states[r]) or set(own) != set(found.gradients):
            return math.inf
        off = apart({"": found.parts["loss"][r]}, {"": parts.loss[r]})
        off = max(off, apart({n: g[r] for n, g in found.gradients.items()}, own))
        moved = {n: b[r] for n, b in found.buffers.items()}
        return max(off, apart(moved, dict(self.network.networks[r].model.named_buffers())))

    def _give_up(self, kind: Any, reason: str) -> None:
        self._trials = with_latest(self._trials, kind, None, SEEN)
        warnings.warn(f"ReplicatedStep: replicas are trained one after another; {reason}", stacklevel=5)


def tolerance(dtype: torch.dtype) -> float:
    """How far gradients found together may be off those found one by one, relative to the largest entry."""
    return {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 0.1)


def _stacked(parts: Sequence[Parts]) -> Parts:
    """[R, ...] of each; None of a penalty that not all have."""
    loss, data_loss, penalties, logits = zip(*parts, strict=True)
    penalty = None if any(p is None for p in penalties) else torch.stack(penalties)
    return Parts(torch.stack(loss), torch.stack(data_loss), penalty, torch.stack(logits))


@dataclass(frozen=True)
class _Trial:
    """On how many batches both ways agreed, and the least seconds of each."""

    count: int = 0
    together: float = math.inf
    alone: float = math.inf

    def plus(self, together: float, alone: float) -> _Trial:
        """One more."""
        return _Trial(self.count + 1, min(self.together, together), min(self.alone, alone))

    @property
    def is_slower(self) -> bool:
        """Whether one after another is the quicker way."""
        return self.count == CHECKED and self.alone < self.together


class _Clock:
    """Seconds from here, of a device too."""

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self._begin = self._now()

    def _now(self) -> float:
        if self._x.is_cuda:
            torch.cuda.synchronize(self._x.device)
        return time.perf_counter()

    def seconds(self) -> float:
        """Since then."""
        return self._now() - self._begin
