"""The state of torch's random numbers: noticed when it moves, and put back to draw the same numbers again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.utils._python_dispatch import _disable_current_modes


@dataclass(frozen=True, eq=False)
class RandomState:
    """The generators' states: the CPU's, and the CUDA device's where one is in use."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, tensors: Sequence[Tensor] = ()) -> RandomState:
        """The present state, of CUDA too if one of the tensors is there."""
        with _real():
            cuda = torch.cuda.get_rng_state() if any(x.is_cuda for x in tensors) else None
            return cls(torch.get_rng_state(), cuda)

    def differs(self, other: RandomState) -> bool:
        """Whether random numbers were drawn between the two."""
        pairs = [(self.cpu, other.cpu), *([(self.cuda, other.cuda)] if self.cuda is not None else [])]
        with _real():
            return any(b is None or not torch.equal(a, b) for a, b in pairs)

    def restore(self) -> None:
        """Go on from here."""
        with _real():
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers inside; outside, nothing was drawn."""
        with torch.random.fork_rng([] if self.cuda is None else [torch.cuda.current_device()]):
            self.restore()
            yield


def _real() -> AbstractContextManager[Any]:
    """Inside, states are real also under fake tensors."""
    modes = torch._C._len_torch_dispatch_stack() or _len_torch_dispatch_stack_pre_dispatch()
    return _disable_current_modes() if modes else nullcontext()
