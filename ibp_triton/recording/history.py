"""Autograd's own graph behind what unseen code made: what it hangs on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

from torch import Tensor


class History:
    """The tensors that graphs may end at without being leaves: results of unseen code, parameters with a history."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = parameters

    @cached_property
    def _made(self) -> dict[Any, Tensor]:
        """By their last function; parameters have one in a copied scripted module."""
        return {p.grad_fn: p for p in self._parameters if p.grad_fn is not None}

    def add(self, a: Tensor) -> None:
        """A tensor that unseen code made, a node from now on."""
        self._made[a.grad_fn] = a

    def ends(self, last: Any, edges: Any) -> Iterator[tuple[Tensor, int]]:
        """The tensors that a graph hangs on, and the sequence number of the function that took each."""
        done, todo = set(), [(last, edge[0]) for edge in edges]
        while todo:
            user, function = todo.pop()
            if function is None or (user, function) in done:
                continue
            done.add((user, function))
            if hasattr(function, "variable"):
                yield function.variable, user._sequence_nr()
            elif function in self._made:
                yield self._made[function], user._sequence_nr()
            else:
                todo += [(function, edge[0]) for edge in function.next_functions]
