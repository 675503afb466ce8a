"""Random numbers and buffers, which a forward pass moves besides its result: to run it as if for the first time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ibp_triton.members import buffers_of
from ibp_triton.randomness import RandomState


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The generators' states and a model's buffers, objects and numbers, at one moment."""

    random: RandomState
    buffers: list[tuple[nn.Module, str, Tensor, Tensor]]  # module, name, object, numbers

    @classmethod
    def of(cls, model: nn.Module, x: Tensor) -> Snapshot:
        """Now."""
        found = [(*place, place[2].detach().clone()) for place in buffers_of(model)]
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
