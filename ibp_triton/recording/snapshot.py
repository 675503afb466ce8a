"""Random numbers and buffers, which a forward pass moves besides its result: to run it as if for the first time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ibp_triton.randomness import RandomState


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The generators' states and a model's buffers, objects and numbers, at one moment."""

    random: RandomState
    buffers: list[tuple[nn.Module, str, Tensor, Tensor]]  # module, name, object, numbers

    @classmethod
    def of(cls, model: nn.Module, x: Tensor) -> Snapshot:
        """Now."""
        found = [(*place, place[2].detach().clone()) for place in _buffers(model)]
        return cls(RandomState.now([x]), found)

    def restore(self) -> None:
        """Put everything back."""
        self.random.restore()
        with torch.no_grad():
            for module, name, buffer, numbers in self.buffers:
                module._buffers[name] = buffer
                buffer.data.copy_(numbers)  # unseen by autograd, as a layer's graph may hold the buffer

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


def _buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """As ``named_buffers`` has them, at half its price: a step asks each time."""
    seen, todo = set(), [model]
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield module, name, buffer
        todo += [child for child in module._modules.values() if child is not None]
