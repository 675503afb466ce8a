"""The arguments of a call: the values for its layer, and what two calls must have in common to be the same node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Look = Callable[[Tensor], tuple[Any, Any]]  # a tensor → its value and its key, a Ref or a Constant
_ITSELF = {type(None), int, str, torch.dtype, torch.device, torch.memory_format, torch.layout, torch.Size, type(...)}
_SIZES = {int}


@dataclass(frozen=True, eq=False)
class Same:
    """The key of an argument that can only be compared by identity."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value


def bind(args: Iterable[Any], look: Look) -> tuple[list[Any], list[Any]]:
    """Values and keys of the arguments; numbers are the same only if their types are."""
    values: list[Any] = [*args]
    keys = values.copy()
    for i, a in enumerate(keys):
        kind = type(a)
        if kind in _ITSELF:
            continue
        if kind is Tensor or isinstance(a, Tensor):
            values[i], keys[i] = look(a)
        elif kind is float or kind is bool:
            keys[i] = (kind, a)
        elif kind is not tuple or {*map(type, a)} != _SIZES:
            values[i], keys[i] = _container(a, kind, look)
    return values, keys


def bind_named(kwargs: Mapping[str, Any], look: Look) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """The same for arguments by name."""
    values, keys = bind(kwargs.values(), look)
    return dict(zip(kwargs, values, strict=True)), tuple(zip(kwargs, keys, strict=True))


def _container(a: Any, kind: Any, look: Look) -> tuple[Any, Any]:
    if isinstance(a, (list, tuple)):
        parts, keys = bind(a, look)
        return rebuilt(a, parts), (kind, *keys)
    if kind is slice:
        parts, keys = bind((a.start, a.stop, a.step), look)
        return slice(*parts), (kind, *keys)
    if kind is dict:
        named, named_keys = bind_named(a, look)
        return named, (kind, *named_keys)
    return a, Same(a)


def unbind(key: Any) -> Any:
    """An argument from its key, with Refs and Constants where tensors were."""
    if isinstance(key, Same):
        return key.value
    if type(key) is not tuple or not key or not isinstance(key[0], type):
        return key
    kind, *parts = key
    if kind in (float, bool):
        return parts[0]
    if kind is dict:
        return {name: unbind(part) for name, part in parts}
    found = [unbind(part) for part in parts]
    return slice(*found) if kind is slice else kind(*found) if hasattr(kind, "_fields") else kind(found)


def rebuilt(like: Any, parts: Sequence[Any]) -> Any:
    """The parts in a container of the same type: list, tuple, named tuple or one of torch's return types."""
    return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)
