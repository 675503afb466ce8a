"""What a call of a torch function does, as far as a recording must know: reads, gives constants, works in place."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Any]


class Kind(enum.Enum):
    """What a function does that is no layer."""

    READ = "gives a size, a dtype or the like"
    NUMBER = "gives a number or text made of the values"
    CONSTANT = "gives a tensor that no derivative flows through"
    GRAPH = "needs a graph of what sweeps know without one"
    HOOK = "hangs a hook on a tensor"


def _named(names: str) -> set[Any]:
    found = (getattr(place, name, None) for name in names.split() for place in (Tensor, torch, F))
    return {function for function in found if callable(function)}


def _getters(names: Iterable[str], what: str = "__get__") -> set[Any]:
    """The accessors of properties, as a mode sees them."""
    return {getattr(getattr(Tensor, name), what) for name in names}


_TENSOR_PROPERTIES = {"T", "H", "mT", "mH", "real", "imag", "data", "grad"}
_DESCRIPTORS = [n for n in dir(Tensor) if type(getattr(Tensor, n)).__name__ in ("getset_descriptor", "property")]
_READING = (
    "size dim numel nelement ndimension stride storage_offset is_contiguous is_floating_point is_complex is_signed "
    "element_size get_device data_ptr untyped_storage storage type is_set_to is_shared is_pinned is_same_size is_conj "
    "is_neg is_inference is_tensor is_grad_enabled result_type promote_types __len__ __hash__ __deepcopy__ "
    "__reduce_ex__ _is_view"
)
_NUMBERS = (
    "item tolist numpy is_nonzero equal allclose __bool__ __int__ __float__ __index__ __complex__ __repr__ __format__ "
    "__contains__ __array__ __dlpack__"
)
_CONSTANT = (
    "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty new_full "
    "new_tensor argmax argmin argsort bucketize searchsorted one_hot eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ "
    "__gt__ __ge__ isnan isinf isfinite isclose logical_and logical_or logical_not any all nonzero count_nonzero "
    "bernoulli multinomial detach detach_ requires_grad_"
)
_HOOKS = "register_hook retain_grad register_post_accumulate_grad_hook"

KINDS: dict[Any, Kind] = {
    **dict.fromkeys(_named(_READING) | _getters(n for n in _DESCRIPTORS if n not in _TENSOR_PROPERTIES), Kind.READ),
    **dict.fromkeys(_named(_NUMBERS), Kind.NUMBER),
    **dict.fromkeys(
        _named(_CONSTANT) | _getters(["data", "grad"]) | _getters(["requires_grad"], "__set__"), Kind.CONSTANT
    ),
    **dict.fromkeys((torch.autograd.grad, torch.autograd.backward, Tensor.backward), Kind.GRAPH),
    **dict.fromkeys(_named(_HOOKS), Kind.HOOK),
}


# these read no number of the other tensor
SHAPED_LIKE = frozenset({Tensor.view_as, Tensor.reshape_as, Tensor.expand_as, Tensor.type_as, Tensor.to})


def _listed(tensors: Any) -> list[Tensor]:
    return list(tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)) else tensors)


def _expanded(*tensors: Any) -> tuple[Tensor, ...]:
    shape = torch.broadcast_shapes(*(t.shape for t in _listed(tensors)))
    return tuple(t.expand(shape) for t in _listed(tensors))


def _meshed(*tensors: Any, indexing: str = "ij") -> tuple[Tensor, ...]:
    tensors = tuple(_listed(tensors))
    axes = [*range(len(tensors))]
    if indexing == "xy" and len(axes) > 1:
        axes[:2] = 1, 0
    shape = [0] * len(axes)
    for t, axis in zip(tensors, axes, strict=True):
        shape[axis] = t.numel()
    views = [[-1 if i == axis else 1 for i in range(len(axes))] for axis in axes]
    return tuple(t.reshape(view).expand(shape) for t, view in zip(tensors, views, strict=True))


# several functions of one operand each, which are not to be taken for one of all of them
APART: dict[Any, Function] = {torch.broadcast_tensors: _expanded, torch.meshgrid: _meshed}


@dataclass(frozen=True)
class Cloned:
    """An in-place function as a pure one: it works on a copy of its first argument and returns that."""

    function: Function

    @property
    def __name__(self) -> str:
        return str(getattr(self.function, "__name__", self.function))

    def __call__(self, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The copy after the work."""
        copy = target.clone()
        self.function(copy, *args, **kwargs)
        return copy


@dataclass(frozen=True)
class InPlace:
    """How a function works in place: its pure form, and whether it changes the shape instead of the numbers."""

    pure: Function
    reshapes: bool = False


_SHAPES = ("squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_")
REFUSED = frozenset(getattr(Tensor, name) for name in ("set_", "resize_", "resize_as_", "apply_", "map_"))


@cache
def in_place(function: Function) -> InPlace | None:
    """How a function that always works in place does so, None for others."""
    name = getattr(function, "__name__", "")
    if name == "__setitem__":
        return InPlace(Cloned(function))
    if not name.endswith("_") or name.endswith("__"):
        return None
    places = (getattr(place, name[:-1], None) for place in (Tensor, torch, F))
    return InPlace(next((p for p in places if callable(p)), Cloned(function)), name in _SHAPES)


@cache
def flag_position(function: Function) -> int | None:
    """The position of a function's argument ``inplace``, None where it has none."""
    if not inspect.isfunction(function):
        return None
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def written(function: Function, args: Any, kwargs: Any) -> tuple[InPlace | None, Any]:
    """How a call works in place, and on what; (None, None) where it does not."""
    how = in_place(function)
    if how is None:
        if kwargs and isinstance(kwargs.get("out"), Tensor):
            return InPlace(function), kwargs["out"]
        position = flag_position(function)
        if position is None or not (kwargs.get("inplace") or (position < len(args) and args[position])):
            return None, None
        how = InPlace(function)
    return how, args[0] if args else kwargs.get("input")
