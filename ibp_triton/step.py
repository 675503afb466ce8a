"""A whole training step, gradient and optimizer, as one call: eager, compiled by inductor, or captured as a CUDA graph.

All three are called alike, ``step(x, y, tangents=None, extra=None) -> Parts``, and train alike: a compiled step is held
against the eager one before it is used, a captured one replays what an eager one launched. Shapes are learned from the
batches, and whatever a step was made for may change (β, learning rate, modes, frozen layers, the optimizer's state):
the next step then runs eagerly or is made anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

from ibp_triton.alike import apart, flags, in_short, kind_of, plain, settings, with_latest
from ibp_triton.checks import check_labels, check_tangents
from ibp_triton.compiling import compiled
from ibp_triton.criteria import CrossEntropy, criterion_for
from ibp_triton.errors import MethodError
from ibp_triton.methods.base import Method, Parts
from ibp_triton.methods.cost import none
from ibp_triton.network import Network, network_for
from ibp_triton.recording.snapshot import Snapshot

Gradients = dict[str, Tensor]
Reduce = Callable[[Gradients], Gradients]
CHECKED = 3  # compiled steps that run beside the eager one before they are used
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative to the largest entry; 0.1 in half precision
WARM_UP = 3  # eager steps before a capture: they create the optimizer's state and fill torch's caches
SEEN = 64  # kinds of batches that are remembered
KEPT = 4  # compiled or captured steps that are kept, the ones last used


class EagerStep:
    """``step(x, y)`` trains on one batch and returns its ``Parts``, detached, as they were before the update.

    Assign ``step.method`` to change it: the next step follows. Gradients stay in ``.grad`` until the next step begins.

    Args:
        network: the model, wrapped or bare; move it to its device first.
        method: one of ``ibp_triton.METHODS``.
        optimizer: over the model's parameters.
        accumulate: how many batches make one update, their gradients averaged.
        clip_norm: the largest norm of all gradients together; None leaves them.
        reduce: what becomes of {parameter name: gradient} before the update, such as an average over processes.

    Raises:
        MethodError (a ValueError): for fewer than one batch, or a norm that is not positive.
    """

    def __init__(
        self,
        network: Network | nn.Module,
        method: Method,
        optimizer: torch.optim.Optimizer,
        *,
        accumulate: int = 1,
        clip_norm: float | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        if accumulate < 1 or (clip_norm is not None and not clip_norm > 0):
            raise MethodError(
                f"{type(self).__name__}: accumulate must be at least 1 and clip_norm positive, not {accumulate} and "
                f"{clip_norm}"
            )
        self.network, self.method, self.optimizer = network_for(network), method, optimizer
        self.accumulate, self.clip_norm, self.reduce = accumulate, clip_norm, reduce
        self._batches = 0  # since the last update
        self._begin()

    def _begin(self) -> None:
        """What a kind of step keeps besides."""

    def __call__(
        self, x: Tensor, y: Any, tangents: Tensor | None = None, extra: Mapping[str, Any] | None = None
    ) -> Parts:
        """One batch, and an update where it is the last of ``accumulate``.

        Args:
            x: [N, ...].
            y: targets, as the method takes them.
            tangents: [T, N, ...], for tangent methods only.
            extra: the model's other inputs, by name.
        """
        if self._batches == 0:
            self.optimizer.zero_grad()
        parts = self._add_gradients(x, y, tangents, extra)
        self._batches = (self._batches + 1) % self.accumulate
        if self._batches == 0:
            self._update()
        return parts

    def _add_gradients(self, x: Tensor, y: Any, tangents: Any, extra: Any) -> Parts:
        """The batch's share of the gradient is added to ``.grad``."""
        parts = self.method.parts(self.network, x, y, tangents, extra)
        if parts.loss.requires_grad:
            (parts.loss / self.accumulate if self.accumulate > 1 else parts.loss).backward()
        return parts._replace(loss=parts.loss.detach())

    def _update(self) -> None:
        self._finish_gradients()
        self.optimizer.step()

    def _finish_gradients(self) -> None:
        """What becomes of them between the last batch and the optimizer."""
        own = self.network.parameters()
        if self.reduce is not None:
            for name, g in self.reduce({n: p.grad for n, p in own.items() if p.grad is not None}).items():
                own[name].grad = g
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(own.values(), self.clip_norm)

    def _key(self, x: Tensor, y: Any, tangents: Any, extra: Any) -> tuple[Any, ...]:
        """What the tensor operations of a gradient depend on, but for the numbers that they get."""
        method = self.method.at(**_strength(self.method, 0.0))
        inputs = tuple(kind_of(a) for a in tree_leaves((x, y, tangents, dict(extra or {}))))
        own = tuple((id(p), p.requires_grad, p.dtype, p.device) for p in self.network.model.parameters())
        return method, settings(method.criterion), inputs, own, settings(self.network.model)


class CompiledStep(EagerStep):
    """The same step, its gradient compiled by inductor from the operations that one eager gradient consists of.

    A batch's kind (shapes, modes, flags and plain attributes of the model) is compiled when it comes a second time, and
    used once it has agreed with the eager gradient on three batches. What can't be compiled runs eagerly, and a warning
    says why: random draws inside the model, control flow that looks at numbers. The model's own Python code runs only
    while it is recorded: what it does besides (hooks, counters) happens then alone. A network of several processes is
    trained eagerly. Arguments as for ``EagerStep``.
    """

    def _begin(self) -> None:
        self._seen: dict[Any, None] = {}
        self._made: dict[Any, _Compiled | None] = {}  # None: not to be compiled

    def _add_gradients(self, x: Tensor, y: Any, tangents: Any, extra: Any) -> Parts:
        if self.network.world is not None:
            return super()._add_gradients(x, y, tangents, extra)
        y = criterion_for(self.method.criterion).targets(y, x)
        key = self._key(x, y, tangents, extra)
        if key not in self._seen:  # a batch that comes once, such as an epoch's last, is not worth the time
            self._seen = with_latest(self._seen, key, None, SEEN)
            return super()._add_gradients(x, y, tangents, extra)
        if key not in self._made:
            self._made = with_latest(self._made, key, self._compiled(x, y, tangents, extra), KEPT)
        found = self._made[key]
        if found is None:
            return super()._add_gradients(x, y, tangents, extra)
        if found.checked < CHECKED:
            return self._checked(key, found, x, y, tangents, extra)
        parts, gradients = found(self.method, x, y, tangents, extra)
        for name, g in gradients.items():
            parameter = found.parameters[name]
            g = g / self.accumulate if self.accumulate > 1 else g
            parameter.grad = g if parameter.grad is None else parameter.grad + g
        return parts

    def prepare(
        self, x: Tensor, y: Any, tangents: Tensor | None = None, extra: Mapping[str, Any] | None = None
    ) -> bool:
        """Compile for batches of this kind now, and check on this one; nothing is trained; arguments as of a step.

        Returns whether such batches will be trained by the compiled step, whatever came before them.
        """
        if self.network.world is not None:
            return False
        y = criterion_for(self.method.criterion).targets(y, x)
        key = self._key(x, y, tangents, extra)
        found = self._made.get(key)
        if key in self._made and (found is None or found.checked == CHECKED):
            return found is not None
        before = Snapshot.of(self.network.model, x)
        gradients = [(p, p.grad) for p in self.network.model.parameters()]
        self._seen = with_latest(self._seen, key, None, SEEN)
        found = self._made[key] = self._compiled(x, y, tangents, extra)
        if found is not None:
            for p, _ in gradients:
                p.grad = None
            self._checked(key, found, x, y, tangents, extra)
            found.checked = CHECKED
        for p, g in gradients:
            p.grad = g
        before.restore()
        return self._made[key] is not None

    def _compiled(self, x: Tensor, y: Any, tangents: Any, extra: Any) -> _Compiled | None:
        before = Snapshot.of(self.network.model, x)
        try:
            return _Compiled(self.network, self.method, x, y, tangents, extra)
        except Exception as error:  # of torch's compilers or of the C++ compiler, whatever its type: training goes on
            self._say(in_short(error))
            return None
        finally:
            before.restore()

    def _checked(self, key: Any, found: _Compiled, x: Tensor, y: Any, tangents: Any, extra: Any) -> Parts:
        """The eager gradient, with the compiled one beside it, from the same buffers and random numbers."""
        before = Snapshot.of(self.network.model, x)
        try:
            parts, gradients = found(self.method, x, y, tangents, extra)
        except Exception as error:
            self._made[key] = None
            self._say(in_short(error))
            before.restore()
            return super()._add_gradients(x, y, tangents, extra)
        buffers = _buffers(self.network)
        before.restore()
        earlier = {name: p.grad for name, p in found.parameters.items()}
        for p in found.parameters.values():
            p.grad = None
        expected = super()._add_gradients(x, y, tangents, extra)
        own = {name: p.grad * self.accumulate for name, p in found.parameters.items() if p.grad is not None}
        for name, p in found.parameters.items():
            held = earlier[name]
            if held is not None:
                p.grad = held if p.grad is None else held + p.grad
        off = max(apart({"loss": parts.loss}, {"loss": expected.loss}), apart(gradients, own))
        off = max(off, apart(buffers, _buffers(self.network)))
        found.checked += 1
        limit = TOLERANCE.get(self.network.dtype or x.dtype, 0.1)
        if not off <= limit:
            self._made[key] = None
            self._say(f"its gradient is off by {off:.2g} of the largest entry, more than {limit:g}")
        return expected

    def _say(self, reason: str) -> None:
        warnings.warn(f"CompiledStep: this kind of batch is trained by the eager step; {reason}", stacklevel=6)


class _Compiled:
    """One kind of batch's gradient as a compiled function of parameters, strength and the batch."""

    def __init__(self, network: Network, method: Method, x: Tensor, y: Any, tangents: Any, extra: Any) -> None:
        self.parameters = {n: p for n, p in network.parameters().items() if p.requires_grad}
        self.checked = 0

        def gradient(parameters: Gradients, strength: Any, x: Tensor, y: Any, tangents: Any, extra: Any) -> Any:
            chosen = method.at(**strength)
            value, found, step = chosen.step(network, x, y, tangents, parameters, extra)
            parts = chosen.parts_of(value, step)
            self.logits = torch.empty(parts.logits.shape, device="meta")
            return tuple(parts), {n: found[n] for n in parameters if n in found}

        with torch.no_grad():
            copies = {n: p.detach().clone() for n, p in self.parameters.items()}
            batch = tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, (x, y, tangents, dict(extra or {})))
            graph = make_fx(gradient)(copies, _tensors(method, x), *batch)
        self.run = compiled(graph)

    def __call__(self, method: Method, x: Tensor, y: Any, tangents: Any, extra: Any) -> tuple[Parts, Gradients]:
        """What the eager gradient would give, the targets checked as it does."""
        criterion = criterion_for(method.criterion)
        if isinstance(criterion, CrossEntropy) and not y.is_floating_point():
            check_labels(y, self.logits, criterion.ignored)
        with torch.no_grad():
            own = {n: p.detach() for n, p in self.parameters.items()}
            parts, gradients = self.run(own, _tensors(method, x), x, y, tangents, dict(extra or {}))
        return Parts(*parts), gradients


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
        value = _value(self.method)
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
        self._strength = {} if none(_value(step.method)) else _tensors(step.method, batch[0])
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


def _buffers(network: Network) -> Gradients:
    return {name: b.detach().clone() for name, b in network.model.named_buffers()}


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


def _strength(method: Method, value: Any) -> dict[str, Any]:
    return {} if method.parameter is None else {method.parameter: value}


def _value(method: Method) -> Any:
    """β, ε or λ; None where there is none."""
    return getattr(method, method.parameter) if method.parameter else None


def _tensors(method: Method, x: Tensor) -> dict[str, Tensor]:
    """β, ε or λ as a tensor: a number would be part of the graph."""
    value = _value(method)
    if value is not None and not isinstance(value, Tensor):
        value = torch.tensor(float(value), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return _strength(method, value)
