"""Gradients of R networks of one structure, each with its own weights: in one vmapped call, and one after another."""

from __future__ import annotations

from torch import Tensor

import ibp_triton as ibp
from ibp_triton.alike import apart
from ibp_triton.bench.candidates import Case
from ibp_triton.replicated_step import tolerance
from ibp_triton.vmapped import Inputs, Together, Vmapped


class ReplicatedGradients:
    """The case's network `replicas` times, from seeds 0, 1, …, and a method's gradients of all on the case's batch."""

    def __init__(self, case: Case, method: ibp.Method) -> None:
        count = case.replicas
        models = [case.model(seed) for seed in range(count)]
        self.network = ibp.ReplicatedNetwork(models, range(count), case.backend, case.dtype)
        x, labels, tau = case.data()
        self.method, self.inputs = method, Inputs(x, labels, tau if method.needs_tangents else None, {})
        self._vmapped = Vmapped(self.network)

    def together(self) -> Together:
        """All in one call."""
        return self._vmapped([self.method] * len(self.network), self.inputs)

    def one_by_one(self) -> list[dict[str, Tensor]]:
        """The same numbers, {parameter name: gradient} of each."""
        found = []
        for own, state in zip(self.network.networks, self.network.states, strict=True):
            with state.again():
                found.append(self.method.gradients(own, *self.inputs.whole[:3])[1])
        return found

    def off(self) -> tuple[float, float]:
        """How far the two are apart, relative to the largest entry of a replica, and how far they may be."""
        joint, alone = self.together(), self.one_by_one()
        each = [{name: g[r] for name, g in joint.gradients.items()} for r in range(len(alone))]
        off = max(apart(one, own) for one, own in zip(each, alone, strict=True))
        return off, tolerance(joint.parts["logits"].dtype)
