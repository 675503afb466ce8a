"""Which tensor of the model is which node, and what becomes of that when memory is written to.

A write must neither change what layers keep nor be missed by other tensors that show the same memory. So before a write
the two part: memory that came with the recording is copied for the model, all of whose tensors on it are known, and
other memory for the layers. After it, each other tensor there learns of the write when it is next read.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ibp_triton.backends.torch.written import Geometry, geometry
from ibp_triton.layer import Layer
from ibp_triton.recording.arguments import rebuilt

_NONE = {type(None), int, float, bool, str, torch.Size, torch.dtype}  # what holds no tensor
wrapped = torch._C._functorch.is_functorch_wrapped_tensor
level = torch._C._functorch.maybe_current_level


@dataclass(frozen=True)
class Write:
    """Numbers written to a storage: where, and by which node (None: a constant)."""

    place: Geometry
    node: int | None


class Memory:
    """The model's tensors by identity, while they live, and the writes to their storages."""

    def __init__(self, layers: list[Layer | None], values: list[Any]) -> None:
        self.layers, self.values = layers, values
        self.writes: dict[int, tuple[Any, list[Write]]] = {}  # by storage, which is kept alive
        self._nodes: dict[int, tuple[Any, int | None]] = {}
        self._read: dict[int, tuple[Any, int]] = {}  # of the writes to its storage, how many a tensor knows of
        self._history: dict[int, list[tuple[int, int | None]]] = {}
        self._foreign: dict[int, Any] = {}  # storages that tensors unknown to us may show
        self._met: set[int] = set()  # storages of what layers take and give
        self._looked = 0  # at so many of the values, which parameters are among
        self._holders: dict[int, list[int]] = {}  # which layers hold tensors on a storage
        self._searched = 0

    def track(self, a: Tensor, node: int | None) -> None:
        """This tensor is the value of that node, or with None a constant on an activation's memory."""
        self._nodes[id(a)] = (weakref.ref(a), node)
        self.meet(a)
        if self.writes:
            self.up_to_date(a)

    def meet(self, a: Tensor) -> None:
        """A layer takes or gives this tensor."""
        storage = storage_of(a)
        if storage is not None:
            self._met.add(storage._cdata)

    def knows(self, a: Tensor) -> bool:
        """Whether the tensor is tracked."""
        entry = self._nodes.get(id(a))
        return entry is not None and entry[0]() is a

    def node(self, a: Tensor) -> int | None:
        """The node that the tensor is the value of, None for a constant."""
        entry = self._nodes.get(id(a))
        return entry[1] if entry is not None and entry[0]() is a else None

    def alive(self) -> list[Tensor]:
        """The tensors of nodes other than x that somebody holds."""
        return [a for ref, node in self._nodes.values() if node and (a := ref()) is not None]

    def node_then(self, a: Tensor, number: int) -> int | None:
        """The node that it was when autograd's function of this sequence number took it."""
        for until, node in self._history.get(id(a), ()):
            if number < until:
                return node
        return self.node(a)

    def remember(self, a: Tensor) -> None:
        """The tensor is about to become another node: unseen code that took it before this took the present one."""
        self._history.setdefault(id(a), []).append((torch.autograd._get_sequence_nr(), self.node(a)))  # type: ignore[attr-defined]

    def news(self, a: Tensor) -> list[Write]:
        """The writes to the tensor's memory that it does not know of."""
        storage = storage_of(a)
        written = self.writes.get(storage._cdata) if storage is not None else None
        if written is None:
            return []
        entry = self._read.get(id(a))
        return written[1][entry[1] if entry is not None and entry[0]() is a else 0 :]

    def up_to_date(self, a: Tensor) -> None:
        """The tensor's node is what it shows now."""
        storage = storage_of(a)
        written = self.writes.get(storage._cdata) if storage is not None else None
        if written is not None:
            self._read[id(a)] = (weakref.ref(a), len(written[1]))
        else:
            self._read.pop(id(a), None)

    def shares(self, constant: Tensor, others: list[Tensor]) -> bool:
        """Whether it shows the memory of one of the others."""
        own = storage_of(constant) if others else None
        return own is not None and any(storage_of(a) is own for a in others)

    def deposit(self, target: Tensor, new: Tensor, node: int | None) -> None:
        """Let the target have new numbers: by taking over their memory where nobody else sees the target's."""
        storage = storage_of(target)
        if self._movable(target, storage):
            if len(self.aliases(storage)) == 1:
                target.data = new
                self.track(target, node)
                return
        elif storage is not None:
            self._foreign[storage._cdata] = storage
        self.set_apart(target)
        target.detach().copy_(new)
        storage = storage_of(target)
        if storage is not None and not wrapped(target):
            self.writes.setdefault(storage._cdata, (storage, []))[1].append(Write(geometry(target), node))
        self.track(target, node)

    def _movable(self, target: Tensor, storage: Any) -> bool:
        """Whether all tensors that the model has on this memory are known, and can be given other memory."""
        if storage is None or storage._cdata in self._foreign or not self.knows(target):
            return False
        return not (wrapped(target) or isinstance(target, FakeTensor) or get_proxy_mode() is not None)

    def aliases(self, storage: Any) -> list[Tensor]:
        """The model's living tensors on this memory; forgets the dead ones."""
        living = [(key, entry[0]()) for key, entry in self._nodes.items()]
        for key, a in living:
            if a is None:
                del self._nodes[key]
        return [a for _, a in living if a is not None and storage_of(a) is storage]

    def set_apart(self, target: Tensor) -> None:
        """Before a write: the model's tensors and what layers hold shall not share this memory any more."""
        storage = storage_of(target)
        if storage is None or not self._reaches_layers(storage):
            return
        if self._movable(target, storage):
            fresh = storage.clone()
            with torch.no_grad():
                for a in self.aliases(storage):
                    a.set_(fresh, a.storage_offset(), a.shape, a.stride())
            if storage._cdata in self.writes:
                self.writes[fresh._cdata] = (fresh, self.writes.pop(storage._cdata)[1])
            return
        for place in self._holding(storage):
            layer = self.layers[place]
            if layer is not None:
                layer.__dict__ = {name: _copied(value, storage) for name, value in layer.__dict__.items()}

    def _reaches_layers(self, storage: Any) -> bool:
        """Whether a layer can hold it: most writes are to counters of steps."""
        for value in self.values[self._looked :]:
            if isinstance(value, Tensor):
                self.meet(value)
        self._looked = len(self.values)
        return storage._cdata in self._met

    def _holding(self, storage: Any) -> list[int]:
        """The layers that hold tensors on this memory; each layer is searched once."""
        for place in range(self._searched, len(self.layers)):
            layer = self.layers[place]
            for tensor in tensors_in(vars(layer).values()) if layer is not None else ():
                own = storage_of(tensor)
                if own is not None:
                    self._holders.setdefault(own._cdata, []).append(place)
        self._searched = len(self.layers)
        return self._holders.pop(storage._cdata, [])


def storage_of(a: Any) -> Any:
    """The memory of a tensor, None where there is none to speak of."""
    while wrapped(a):
        a = torch._C._functorch.get_unwrapped(a)
    try:
        return a.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse and the like
        return None


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Those among the values, and in containers there."""
    found: list[Tensor] = []
    for value in values:
        if type(value) in _NONE:
            continue
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple, dict)):
            found += tensors_in(value.values() if isinstance(value, dict) else value)
    return found


def _copied(value: Any, storage: Any) -> Any:
    """The same with copies of the tensors that lie in this memory; autograd watches over those in its graphs."""
    if isinstance(value, Tensor):
        return value.clone() if storage_of(value) is storage and not value.requires_grad else value
    if isinstance(value, dict):
        return type(value)({key: _copied(part, storage) for key, part in value.items()})
    if isinstance(value, (list, tuple)):
        return rebuilt(value, [_copied(part, storage) for part in value])
    return value
