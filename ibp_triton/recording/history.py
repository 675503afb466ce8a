"""Autograd's own graph behind what unseen code made: what it hangs on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


class History:
    """The tensors that graphs may end at without being leaves: results of unseen code, parameters with a history."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        copied = (p for p in parameters if p.grad_fn is not None)  # those of a copied scripted module
        self._made: dict[Any, Tensor] = {p.grad_fn: p for p in copied}

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
