"""What a forward pass moves besides its result, random numbers, buffers, counters: to run it as for the first time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ibp_triton.layer import wrapped
from ibp_triton.members import buffers_of, modules_of
from ibp_triton.randomness import RandomState

_VALUES = (int, float, str, type(None), tuple, Tensor)  # of attributes that a model may count or remember in


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The generators' states, a model's buffers, objects and numbers, and its modules' attributes, at one moment."""

    random: RandomState
    buffers: list[tuple[nn.Module, str, Tensor, Tensor]]  # module, name, object, numbers
    attributes: list[tuple[nn.Module, type[nn.Module], dict[str, object]]]  # the class: a lazy module changes its own

    @classmethod
    def of(cls, model: nn.Module, x: Tensor) -> Snapshot:
        """Now."""
        found = [(*place, place[2].detach().clone()) for place in buffers_of(model)]
        return cls(RandomState.now([x]), found, [(m, type(m), vars(m).copy()) for m in modules_of(model)])

    def restore(self) -> None:
        """Put everything back; of the attributes those that have a new value, not what was written into one."""
        self.random.restore()
        for module, kind, before in self.attributes:
            if type(module) is kind:
                _put_back(vars(module), before)
        with torch.no_grad():
            for module, name, buffer, numbers in self.buffers:
                module._buffers[name] = buffer
                # unseen by autograd, as a layer's graph may hold the buffer; vmap refuses `data`
                (buffer if wrapped(buffer) else buffer.data).copy_(numbers)

    @contextmanager
    def again(self, x: Tensor) -> Iterator[None]:
        """Inside, as it was then, on copies of the buffers; afterwards, as it was before this.

        The buffers themselves stay what the first pass's layers know them as.
        """
        now = [(module, name, module._buffers.get(name)) for module, name, _, _ in self.buffers]
        random = RandomState.now([x])
        self.random.restore()
        for module, name, _, numbers in self.buffers:
            module._buffers[name] = numbers.clone()
        try:
            yield
        finally:
            random.restore()
            for module, name, buffer in now:
                module._buffers[name] = buffer


def _put_back(now: dict[str, object], before: dict[str, object]) -> None:
    for name in now.keys() - before.keys():
        if isinstance(now[name], _VALUES):
            del now[name]
    now |= {name: a for name, a in before.items() if isinstance(a, _VALUES)}
