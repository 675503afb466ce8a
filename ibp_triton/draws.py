"""Random numbers of several replicas under one ``torch.func.vmap``: each replica's come from its own generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ibp_triton.randomness import RandomState


class Draws(TorchDispatchMode):
    """Inside, a random operation of all replicas, [R, ...], is R operations, each from its replica's state.

    torch's own generator goes through the first replica's states, and whoever puts an earlier one back, to draw the
    same numbers again, gets the others' too.

    Args:
        states: of each replica's generator.
        x: a tensor on the device in use.
    """

    def __init__(self, states: Sequence[RandomState], x: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._x, self._states = x, {_name(states[0]): list(states)}
        states[0].restore()

    def states(self) -> list[RandomState]:
        """Each replica's, now.

        Raises:
            RuntimeError: where the model has seeded torch's generator itself.
        """
        found = self._states.get(_name(RandomState.now([self._x])))
        if found is None:
            raise RuntimeError("the model seeds torch's random numbers itself")
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        return self._each(func, args, kwargs or {})

    def _each(self, func: Any, args: Any, kwargs: Any) -> Any:
        states, found, after = self.states(), [], []
        for r, state in enumerate(states):
            state.restore()
            found.append(func(*_own(args, r, len(states)), **_own(kwargs, r, len(states))))
            after.append(RandomState.now([self._x]))
        after[0].restore()
        self._states[_name(after[0])] = after
        if func._schema.is_mutable:  # into the replicas' parts of the first argument
            return args[0]
        return tree_map(lambda *parts: torch.stack(parts), *found)


def _own(arguments: Any, r: int, count: int) -> Any:
    """One replica's arguments: its part of a tensor [R, ...], and the rest of a shape [R, ...]."""

    def part(a: Any) -> Any:
        if isinstance(a, Tensor):
            return a[r] if a.dim() and a.shape[0] == count else a
        return a[1:] if isinstance(a, list) and isinstance(a[0] if a else None, int) and a[0] == count else a

    return tree_map(part, arguments, is_leaf=lambda a: isinstance(a, list))


def _name(state: RandomState) -> bytes:
    parts = [state.cpu] if state.cuda is None else [state.cpu, state.cuda]
    return b"".join(part.numpy().tobytes() for part in parts)
