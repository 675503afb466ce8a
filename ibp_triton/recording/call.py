"""One call of a torch function on its way to a node."""

from __future__ import annotations

from copy import copy
from typing import Any

from torch import Tensor


class Call:
    """Its arguments' values and keys, and the tensors that were among them."""

    __slots__ = ("constants", "generic", "keys", "named", "named_keys", "operands", "sources", "values")

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.keys: list[Any] = []
        self.named: dict[str, Any] = {}
        self.named_keys: tuple[Any, ...] = ()
        self.operands: list[int] = []
        self.constants: list[Tensor] = []  # those without nodes
        self.sources: list[tuple[Tensor, Tensor]] = []  # what the layer gets for the model's tensor
        self.generic = False  # whether no rule of its own may take it, as of complex numbers

    def without(self, flag: int | None) -> Call:
        """The same without the arguments that ask for work in place."""
        call = copy(self)
        call.values, call.keys = list(self.values), list(self.keys)
        if flag is not None and flag < len(self.values):
            call.values[flag], call.keys[flag] = False, (bool, False)
        call.named = {name: value for name, value in self.named.items() if name not in ("inplace", "out")}
        call.named_keys = tuple((name, key) for name, key in self.named_keys if name in call.named)
        return call
