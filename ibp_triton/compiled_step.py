"""A training step whose gradient is compiled by inductor, and what it takes to be trusted."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from ibp_triton.alike import apart, in_short, rounded, with_latest
from ibp_triton.checks import check_labels
from ibp_triton.compiling import compiled
from ibp_triton.criteria import CrossEntropy, criterion_for
from ibp_triton.methods.base import Method, Parts
from ibp_triton.network import Network
from ibp_triton.recording.snapshot import Snapshot
from ibp_triton.step import KEPT, SEEN, EagerStep, Gradients, strength_tensors

CHECKED = 3  # compiled steps that run beside the eager one before they are used
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative to the largest entry; 0.1 in half precision
NEAR = 8  # steps at parameters moved by a few last bits: they tell what is wrong from what is rounded
NOISE = 3.0  # times as far off as those a compiled step may be,
MOST = (0.01, 0.5)  # but its forward pass and its gradient no further than this


class CompiledStep(EagerStep):
    """The same step, its gradient compiled by inductor from the operations that one eager gradient consists of.

    A batch's kind (shapes, modes, flags and plain attributes of the model) is compiled when it comes a second time, and
    used once it has agreed with the eager step on three batches: in float32 to 1e-4 of a tensor's largest entry or,
    where many ReLUs make a gradient rough, to thrice what rounding does to the eager one; there the means of some steps
    are compared, in which rounding counts less than a fault does. What can't be compiled runs
    eagerly, and a warning says why: random draws inside the model, control flow that looks at numbers. The model's own
    Python code runs only while it is recorded: what it does besides (hooks, counters) happens then alone. A network of
    several processes is trained eagerly. Arguments as for ``EagerStep``.
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
        outcome = _Outcome(parts, gradients, _buffers(self.network))
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
        found.checked += 1
        eager = _Outcome(expected, own, _buffers(self.network))
        limit = TOLERANCE.get(self.network.dtype or x.dtype, 0.1)
        off, limits = outcome.off(eager), (limit, limit)
        if not max(off) <= limit:
            after = Snapshot.of(self.network.model, x)
            noise, mean = self._near(found, eager, before, x, y, tangents, extra)
            after.restore()
            off = off[0], min(off[1], mean)
            limits = max(limit, min(NOISE * noise[0], MOST[0])), max(limit, min(NOISE * noise[1], MOST[1]))
        for what, far, most in zip(("forward pass", "gradient"), off, limits, strict=True):
            if not far <= most and self._made[key] is not None:
                self._made[key] = None
                self._say(f"its {what} is off by {far:.2g} of the largest entry, more than {most:.2g}")
        return expected

    def _near(
        self, found: _Compiled, eager: _Outcome, before: Snapshot, x: Tensor, y: Any, tangents: Any, extra: Any
    ) -> tuple[tuple[float, float], float]:
        """How far rounding alone moves the eager step, and how far the two ways' mean gradients are apart.

        Of many ReLUs one meets 0, and turns: such turns fade in a mean, a fault does not.
        """
        dtype, generator = self.network.dtype or x.dtype, torch.Generator().manual_seed(0)
        noise = 0.0, 0.0
        means: list[Gradients] = [{}, {}]
        for _ in range(NEAR):
            with torch.no_grad():
                near = {n: rounded(p, 4 * torch.finfo(dtype).eps, generator) for n, p in found.parameters.items()}
                before.restore()
                compiled = found(self.method, x, y, tangents, extra, near)[1]
                before.restore()
                value, own, step = self.method.step(self.network, x, y, tangents, near, extra)
                outcome = _Outcome(self.method.parts_of(value, step), own, _buffers(self.network))
            forward, gradient = outcome.off(eager)
            noise = max(noise[0], forward), max(noise[1], gradient)
            means = [
                {n: mean.get(n, 0) + g / NEAR for n, g in some.items()}
                for mean, some in zip(means, (compiled, own), strict=True)
            ]
        return noise, apart(*means)

    def _say(self, reason: str) -> None:
        warnings.warn(f"CompiledStep: this kind of batch is trained by the eager step; {reason}", stacklevel=6)


class _Outcome(NamedTuple):
    """What one step found, and the buffers that it left."""

    parts: Parts
    gradients: Gradients
    buffers: Gradients

    def off(self, expected: _Outcome) -> tuple[float, float]:
        """How far the forward pass is off another's, and how far gradient and penalty are, which ReLUs make rough."""
        (loss, data_loss, _, logits), other = self.parts, expected.parts
        values = apart({"logits": logits, "": data_loss}, {"logits": other.logits, "": other.data_loss})
        forward = max(values, apart(self.buffers, expected.buffers))
        return forward, max(apart({"": loss}, {"": other.loss}), apart(self.gradients, expected.gradients))


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
            graph = make_fx(gradient)(copies, strength_tensors(method, x), *batch)
        self.run = compiled(graph)

    def __call__(
        self, method: Method, x: Tensor, y: Any, tangents: Any, extra: Any, near: Gradients | None = None
    ) -> tuple[Parts, Gradients]:
        """What the eager gradient would give, the targets checked as it does; ``near`` stands for the parameters."""
        criterion = criterion_for(method.criterion)
        if isinstance(criterion, CrossEntropy) and not y.is_floating_point():
            check_labels(y, self.logits, criterion.ignored)
        with torch.no_grad():
            own = {n: p.detach() for n, p in self.parameters.items()} if near is None else near
            parts, gradients = self.run(own, strength_tensors(method, x), x, y, tangents, dict(extra or {}))
        return Parts(*parts), gradients


def _buffers(network: Network) -> Gradients:
    return {name: b.detach().clone() for name, b in network.model.named_buffers()}
