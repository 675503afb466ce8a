"""Network: a model as a sequence of layers whose four rules the sweeps apply."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ibp_triton import ledger
from ibp_triton.allocator import first_block
from ibp_triton.backends import Backend, backend_for
from ibp_triton.backends.torch.generic import Generic
from ibp_triton.backends.torch.sync_batch_norm import Synchronised
from ibp_triton.errors import InputError, MethodError, ModelError
from ibp_triton.forward import Recordings, Trace, raise_explained
from ibp_triton.graph import Graph
from ibp_triton.layer import HALF
from ibp_triton.members import parameters_of
from ibp_triton.operator import number_of
from ibp_triton.recording.interface import Interface, Pick
from ibp_triton.recording.memory import level
from ibp_triton.recording.settings import Settings
from ibp_triton.recording.snapshot import Snapshot
from ibp_triton.shards import Scattered, Shards, shards_of
from ibp_triton.tape import Unmixed
from ibp_triton.world import Sums, World
from ibp_triton.wrappers import check_model, unwrapped


class Network:
    """Any classifier ``model(x) -> logits [N, M]`` for the explicit sweeps of the methods.

    The parameters stay the model's own. Every forward pass runs the model's own code and records it, so whatever
    changes between two steps (modes, attributes, layers, branches on data) is followed; hooks fire once a forward pass.

    Args:
        model: the classifier.
        backend: "torch", "triton", or "auto" (triton where the parameters are on a CUDA device, else torch).
        dtype: the dtype to compute in, e.g. torch.bfloat16 with float32 parameters as master weights; None computes
            in the parameters' own dtype. Gradients always come in the parameters' dtype.
        x: which argument of the model's forward x is, by position or name; others come as ``extra`` of a loss.
        output: which part of the model's result the logits are: a key, an attribute, an index or a function. By default
            the result itself, its ``.logits``, or the only tensor of a tuple.
        process_group: of torch.distributed, for data parallelism: each process gives its own samples (as many as it
            has, none too), objective and gradients are those of all samples together, the same on every process. The
            processes must start from the same weights and take the same steps. Random draws are each process's own,
            and so are batch statistics but those of nn.SyncBatchNorm. A model may be sharded by
            torch.distributed.fsdp.fully_shard: its parameters are gathered block by block for each sweep.
        sync_batchnorm: whether every batch norm in training normalises by all processes' samples, as nn.SyncBatchNorm
            does; on any device.

    Raises:
        ModelError (a TypeError): for a model wrapped for data parallelism or compiled, or sharded otherwise than by
            fully_shard; the message names the cure.
        MethodError (a ValueError): for an unknown backend, a dtype that is not floating point, or sync_batchnorm
            without a process group, or a dtype or Triton for a sharded model.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        *,
        x: int | str = 0,
        output: Pick = None,
        process_group: Any = None,
        sync_batchnorm: bool = False,
    ) -> None:
        model = unwrapped(model, dtype)
        check_model(model)
        if backend not in ("auto", "torch", "triton"):
            raise MethodError(f"backend must be 'auto', 'torch' or 'triton', not {backend!r}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise MethodError(f"dtype must be a floating-point dtype such as torch.bfloat16, not {dtype!r}")
        self.model, self.backend, self.dtype = model, backend, dtype
        if sync_batchnorm and process_group is None:
            raise MethodError("sync_batchnorm=True needs process_group=, the processes whose samples share statistics")
        known = process_group is None or isinstance(process_group, World)
        self.world = process_group if known else World(process_group)
        self.shards = shards_of(model, self.world)
        if self.shards is not None and (dtype is not None or backend == "triton"):
            raise MethodError(
                "a sharded model computes in its parameters' dtype by torch: leave dtype= and backend= out"
            )
        within: Any = nullcontext
        self._synchronised = None
        if self.world is not None:
            self._synchronised = Synchronised(self.world, sync_batchnorm)
            within = partial(_together, self._synchronised, self.shards)
        self.interface = Interface(x, output, within)
        self._recordings: MutableMapping[str, Recordings] = {}  # by backend
        self._shape: tuple[int, ...] | None = None
        self._classes: int | None = None
        self.bends = True  # as far as is known torch has second derivatives of all that the model calls
        self._whole: tuple[Graph | None, bool] = None, False
        self.reentrant: bool | None = None  # whether autograd refuses the model's checkpoints; None before it tried
        self.number = number_of(self)

    def graph(self) -> Graph | None:
        """The nodes of the last forward pass; None before the first."""
        return self._recorded().last

    def _recorded(self) -> Recordings:
        backend = self._backend()
        if backend.name not in self._recordings:
            self._recordings[backend.name] = Recordings(self.interface, backend)
        return self._recordings[backend.name]

    def _backend(self) -> Backend:
        asked = self.backend if self.shards is None else "torch"
        return backend_for(asked, next(self.model.parameters(), None), self.dtype)

    @property
    def native(self) -> bool:
        """Whether the Triton kernels are in use: asked for, or parameters on CUDA, and a dtype that they compute in."""
        return self._backend().name == "triton"

    @property
    def synchronised(self) -> bool:
        """Whether batch norms share their statistics with other processes."""
        return self._synchronised is not None and self._synchronised.applies(self.model)

    @property
    def together(self) -> bool:
        """Whether processes meet during the sweeps, so that each must run them, also without a sample."""
        return self.shards is not None or self.synchronised

    @contextmanager
    def in_pieces(self) -> Iterator[None]:
        """Afterwards, no parameter of a sharded model is left whole."""
        try:
            yield
        finally:
            if self.shards is not None:
                self.shards.close()

    def sums(self, parameters: Mapping[str, Tensor], forward: bool, sure: bool) -> Sums | Scattered:
        """What takes gradients to their sums over the processes, asked for after the forward passes.

        Arguments as of ``World.sums``; ``sure``: the step will not be taken back.
        """
        assert self.world is not None
        assert self._synchronised is not None
        if self.shards is not None:
            return Scattered(self.world, parameters, forward)
        return self.world.sums(parameters, forward=forward, early=sure and not self._synchronised.met)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters by name, each once; of a sharded model this process's pieces."""
        return parameters_of(self.model) if self.shards is None else self.shards.pieces()

    def forward(
        self,
        x: Tensor,
        parameters: Mapping[str, Tensor],
        extra: Mapping[str, Any] | None = None,
        *,
        own: Mapping[str, nn.Parameter] | None = None,
        frugal: bool = False,
        keep: bool = True,
    ) -> Trace:
        """The first sweep at x [N, ...] with ``parameters`` (the model's own where absent) and ``extra`` inputs.

        ``own``: the model's parameters, where the caller has them. ``frugal``: sweeps may let go of what only curvature
        would read again. ``keep``: all nodes' values are kept.
        """
        first_block()
        self._shape = tuple(x.shape)
        if self.shards is not None:
            own = self.shards.replaced_by(parameters)
        settings = Settings(self.model, self.parameters() if own is None else own, parameters, self.dtype, keep)
        trace = self._recorded().record(settings, x, dict(extra or {}), frugal)
        trace.shards = self.shards
        self._classes = trace.logits.shape[-1] if trace.logits.dim() else None
        return trace

    def keeps_to_autograd(self, own: Mapping[str, Tensor]) -> bool:
        """Whether passes without tangents may run as plain autograd: on torch's backend, in the parameters' own dtype.

        Half precision is left to the sweeps, which add up weight gradients in float32.
        """
        if (
            self.reentrant
            or self.shards is not None
            or self.dtype is not None
            or self.native
            or any(p.dtype in HALF for p in own.values())
        ):
            return False
        return level() is None and not torch.is_inference_mode_enabled() and not _below_autograd()

    def bends_by_autograd(self) -> bool:
        """Whether sweeps were no cheaper for exact penalties than autograd's second derivatives, in the last recording.

        So it is where most parameters lie in layers taken whole, and with attention, of which sweeps keep more besides.
        Not with full backward hooks, which sweeps call once a pass.
        """
        graph = self.graph() if self.bends else None
        if graph is None or graph is not self._whole[0]:
            self._whole = graph, graph is not None and self._sweeps_save_nothing(graph)
        return self._whole[1]

    def _sweeps_save_nothing(self, graph: Graph) -> bool:
        return not graph.watched and (graph.heavy or self._mostly_whole(graph))

    def _mostly_whole(self, graph: Graph) -> bool:
        sizes = {name: p.numel() for name, p in self.parameters().items()}
        taken = {
            i for node in graph.nodes if node.rule and issubclass(node.rule, Generic) for i in node.operands.values()
        }
        whole = sum(sizes[name] for i, name in graph.parameters.items() if i in taken)
        return 2 * whole > sum(sizes[name] for name in graph.parameters.values())

    def plain_forward(self, x: Tensor, extra: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> Tensor:
        """The logits at x [N, ...] and ``extra`` inputs with their history, ``parameters`` in place of the model's own.

        The model gets a copy of x, so that it may write to it.
        """
        first_block()
        self._shape = tuple(x.shape)
        try:
            with torch.enable_grad(), Unmixed(), _with(self.model, parameters):
                logits = self.interface.pick(self.interface.call(self.model, x.clone(), extra))
        except RuntimeError as error:
            raise_explained(error, self.model, self.dtype)
        if not logits.requires_grad and (x.requires_grad or all(p.requires_grad for p in self.model.parameters())):
            self._refuse_constant(x, extra, parameters)
        self._classes = logits.shape[-1] if logits.dim() else None
        return logits

    def _refuse_constant(self, x: Tensor, extra: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Let a recording raise for an output that nothing can be differentiated by; one that has x in it is right."""
        with self._leaving_no_trace(x):
            self.forward(x.detach(), parameters, extra, keep=False)

    @contextmanager
    def _leaving_no_trace(self, x: Tensor) -> Iterator[None]:
        """Random numbers, buffers, x and the shape of the last batch are afterwards what they were."""
        before, last = Snapshot.of(self.model, x), self._shape
        try:
            yield
        finally:
            before.restore()
            self._shape = last

    def classes(self, x: Tensor, extra: Mapping[str, Any] | None = None) -> int:
        """The number of logits: that of the last batch, else found by a forward pass at x that leaves no trace.

        Args:
            x: [N, ...].
            extra: the model's other inputs, by name.
        """
        if self._classes is None:
            with self._leaving_no_trace(x):
                self.forward(x, {}, extra, keep=False)
        if self._classes is None:
            raise ModelError("the model returned a single number instead of logits [N, M]")
        return self._classes

    def summary(self, input_shape: Sequence[int] | None = None, extra: Mapping[str, Any] | None = None) -> str:
        """The nodes, the rule each uses and the multiply-adds of every sweep, as text to print.

        Args:
            input_shape: [N, ...]; by default that of the last batch.
            extra: the model's other inputs, by name.

        Raises:
            InputError (a ValueError): without a shape before the first batch.
        """
        table, own = ledger.summary(self._rows(input_shape, extra)), self.parameters()
        if not self.keeps_to_autograd(own):
            return table
        plain = "bp, at, fast_at, pgd_training and trades, which need no tangent, run as plain autograd, at its cost"
        if self.bends_by_autograd():
            plain += "\nexact loss_ibp, fast_tbp and jacobian go by autograd's second derivatives"
        return f"{table}\n{plain}"

    def multiply_adds(
        self, input_shape: Sequence[int] | None = None, extra: Mapping[str, Any] | None = None
    ) -> ledger.MultiplyAdds:
        """Multiply-adds of each sweep; arguments as of ``summary``."""
        return ledger.total(self._rows(input_shape, extra))

    def _rows(self, input_shape: Sequence[int] | None, extra: Mapping[str, Any] | None) -> list[ledger.Row]:
        shape = self._shape if input_shape is None else tuple(input_shape)
        if shape is None:
            raise InputError("the network has seen no batch yet: pass the input's shape, summary([32, 1, 28, 28])")
        first = next(self.model.parameters())
        x = torch.zeros(shape, dtype=first.dtype, device=first.device)
        with self._leaving_no_trace(x), torch.no_grad():
            return ledger.rows(self.forward(x, {}, extra))

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: what was recorded stays behind, and is recorded again."""
        return {**self.__dict__, "_recordings": {}, "_whole": (None, False)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The copy is an object of its own to operators."""
        self.__dict__.update(state, number=number_of(self))

    def __repr__(self) -> str:
        dtype = "" if self.dtype is None else f", dtype={self.dtype}"
        return f"Network({type(self.model).__name__}, backend={self.backend!r}{dtype})"


@contextmanager
def _together(synchronised: Synchronised, shards: Shards | None, model: nn.Module) -> Iterator[None]:
    """What a forward pass of one of several processes runs in."""
    with synchronised(model), nullcontext() if shards is None else shards.forward():
        yield


def _with(model: nn.Module, parameters: Mapping[str, Tensor]) -> Any:
    """A context in which the model has these in place of its own."""
    if not parameters:
        return nullcontext()
    return torch.nn.utils.stateless._reparametrize_module(model, dict(parameters), tie_weights=True)


def _below_autograd() -> bool:
    """Whether autograd sees nothing of what runs: inside an operator of torch's."""
    return torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality)


_RECORDINGS: WeakKeyDictionary[nn.Module, MutableMapping[str, Recordings]] = WeakKeyDictionary()  # of bare models


def network_for(model: Network | nn.Module) -> Network:
    """The network itself, or one for a bare model, which follows the model's last recording and keeps nothing alive.

    Raises:
        ModelError (a TypeError): for anything else.
    """
    if isinstance(model, Network):
        return model
    if torch.compiler.is_compiling():
        raise ModelError("inside torch.compile pass the wrapped model: network = ibp.Network(model), outside")
    network = Network(model)
    network._recordings = _RECORDINGS.setdefault(model, {})
    return network
