"""One forward pass, the first sweep: what later sweeps read of it, and how it comes about."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ibp_triton.backends import Backend
from ibp_triton.errors import IBPError, InputTypeError, ModelError
from ibp_triton.graph import Graph, Node
from ibp_triton.head import Head
from ibp_triton.layer import Layer
from ibp_triton.plan import Plan
from ibp_triton.recording.interface import Interface
from ibp_triton.recording.recorder import Recorder
from ibp_triton.recording.settings import Diverged, Restart, Settings
from ibp_triton.recording.snapshot import Snapshot
from ibp_triton.shards import Shards


@dataclass(eq=False)
class Trace:
    """One forward pass: the nodes, the layer that computed each, and of the values those that are read again."""

    graph: Graph
    values: list[Any]
    layers: list[Layer | None]
    plan: Plan
    head: Head
    frugal: bool = False  # whether sweeps let go of what only curvature would read again
    lean: bool = False  # whether one linear sweep is to come, along with the weight gradients
    shards: Shards | None = None  # where parameters lie in pieces

    def reach(self, node: Node) -> None:
        """See to the numbers of the parameters that a node's layer reads, where these lie in pieces."""
        assert self.shards is not None
        self.shards.open(self.graph.reads[node.index])

    @property
    def logits(self) -> Tensor:
        """[N, M]."""
        return self.values[self.graph.output]  # type: ignore[no-any-return]

    @property
    def input(self) -> Tensor:
        """x, in the dtype of the computation."""
        return self.values[self.graph.input]  # type: ignore[no-any-return]


class Recordings:
    """A network's recordings: the last one, which the next follows, and the modules that run under plain autograd."""

    def __init__(self, interface: Interface, backend: Backend) -> None:
        self.interface, self.backend = interface, backend
        self.opaque: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.last: Graph | None = None
        self._plain: Graph | None = None
        self._lowered: dict[bool, Graph] = {}  # what became of it, for passes with curvature and without
        self._plan: Plan | None = None
        self._copies_x = False  # because the model writes to it

    def record(self, settings: Settings, x: Tensor, extra: dict[str, Any], frugal: bool = False) -> Trace:
        """Run the model once on x and record it, by a backend's own layers where there is a lowering."""
        recorder, graph = self._run(settings, x, extra, curved=not frugal)
        trainable = frozenset(i for i, name in graph.parameters.items() if recorder.own[name].requires_grad)
        if self._plan is None or self._plan.graph is not graph or self._plan.trainable != trainable:
            self._plan = Plan(graph, trainable)
        return Trace(graph, recorder.values, recorder.layers, self._plan, self.backend.head(graph), frugal)

    def _run(self, settings: Settings, x: Tensor, extra: dict[str, Any], curved: bool) -> tuple[Recorder, Graph]:
        lower = self.backend.lower
        if lower is None:
            recorder, self.last = self._recorded(settings, x, extra, self.last)
            return recorder, self.last
        start, settings = Snapshot.of(settings.model, x), replace(settings, watch=True)
        for _ in range(2):
            if self._lowered and self._plain is not None and curved not in self._lowered:
                self._lowered[curved] = lower(self._plain, curved)
            if curved in self._lowered:
                try:
                    recorder, self.last = self._once(settings, x, extra, self._lowered[curved], strict=True)
                    return recorder, self.last
                except (Diverged, Restart):
                    start.restore()
            recorder, self._plain = self._recorded(settings, x, extra, self._plain)
            if self.opaque:
                return recorder, self._plain
            self._lowered = {curved: lower(self._plain, curved)}
            start.restore()
        self.last, self._lowered = None, {}  # code that never runs alike twice: torch's layers
        return self._recorded(settings, x, extra, self._plain)

    def _recorded(self, settings: Settings, x: Tensor, extra: Any, last: Graph | None) -> tuple[Recorder, Graph]:
        """A recording by torch's layers; begun again where a module turns out to need plain autograd or a copy of x."""
        start = Snapshot.of(settings.model, x)
        while True:
            try:
                return self._once(settings, x, extra, last)
            except Restart as again:
                if again.module is None:
                    self._copies_x = True
                else:
                    self.opaque.add(again.module)
                start.restore()

    def _once(
        self, settings: Settings, x: Tensor, extra: Any, last: Graph | None, strict: bool = False
    ) -> tuple[Recorder, Graph]:
        if self._copies_x:
            settings = replace(settings, own_input=True)
        recorder = Recorder(settings, last, self.opaque, strict)
        try:
            with torch.enable_grad():
                seen = recorder.input(x.clone() if settings.own_input else x)
                with recorder:
                    logits = self.interface.pick(self.interface.call(settings.model, seen, extra))
                output = recorder.output(logits)
        except (RuntimeError, ValueError) as error:
            raise_explained(error, settings.model, settings.dtype)
        return recorder, recorder.transcript.graph(output)


def raise_explained(error: Exception, model: nn.Module, dtype: torch.dtype | None) -> NoReturn:
    """Raise torch's complaint about writes out of sight, control flow or mixed dtypes with the cure, others as is."""
    if type(error).__name__ == "UncapturedHigherOrderOpError":  # its module would import the compiler
        raise ModelError(
            "the model calls torch.cond, while_loop or another of torch's operators for control flow, which compile "
            "their branches and are not followed: write them in Python (if, while, for), which is"
        ) from error
    if "a leaf Variable that requires grad" in str(error):
        raise ModelError(
            "a custom autograd.Function marks an activation dirty, which is not followed: give it a copy (x.clone())"
        ) from error
    dtypes = {str(p.dtype) for p in model.parameters() if p.is_floating_point()}
    if isinstance(error, IBPError) or "dtype" not in str(error) or (dtype is None and len(dtypes) < 2):
        raise error
    if dtype is not None:
        raise InputTypeError(
            f"{error}. With dtype={dtype} activations, and parameters and buffers that meet them, are of that dtype; "
            "what the model makes itself is not, nor a parameter that it reads under no_grad, nor a recurrent layer's "
            "weights: cast there by .to(x.dtype), or leave dtype= out"
        ) from error
    raise InputTypeError(
        f"{error}. The parameters are {', '.join(sorted(dtypes))}, and the model's forward does not cast between them: "
        "pass Network(model, dtype=torch.float32) to compute in one dtype"
    ) from error
