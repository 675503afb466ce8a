"""How a model is called, and which of its results are the logits."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ibp_triton.errors import InputTypeError, ModelError

Pick = str | int | Callable[[Any], Tensor] | None


@dataclass(frozen=True)
class Interface:
    """x is the model's argument of this position or name; ``output`` picks the logits of what it returns.

    ``within`` gives the context that the model runs in.
    """

    x: int | str = 0
    output: Pick = None
    within: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext  # of the model, in which it runs

    def call(self, model: nn.Module, x: Tensor, extra: Mapping[str, Any]) -> Any:
        """The model's result for x and the other inputs, which go by name."""
        args, named = ((x,), extra) if self.x == 0 else ((), {self._name(model): x, **extra})
        try:
            with self.within(model):
                return model(*args, **named)
        except TypeError as error:
            try:
                inspect.signature(model.forward).bind(*args, **named)
            except TypeError as misfit:
                given = "".join(f", {name}=…" for name in extra)
                raise ModelError(
                    f"Network calls {type(model).__name__}.forward with x{given}: {misfit}; "
                    "pass its other inputs as extra={name: value}"
                ) from error
            raise

    def _name(self, model: nn.Module) -> str:
        if isinstance(self.x, str):
            return self.x
        names = list(inspect.signature(model.forward).parameters)
        if self.x >= len(names):
            raise ModelError(f"x={self.x}: the forward of {type(model).__name__} takes only {', '.join(names)}")
        return names[self.x]

    def pick(self, result: Any) -> Tensor:
        """The logits."""
        found = self._picked(result)
        if not isinstance(found, Tensor):
            raise ModelError(
                f"the model must return one tensor of logits [N, M], not {type(found).__name__}{_choices(found)}"
            )
        return found

    def _picked(self, result: Any) -> Any:
        if callable(self.output):
            return self.output(result)
        if self.output is not None:
            return _entry(result, self.output)
        if isinstance(result, Tensor):
            return result
        if isinstance(result, Mapping):
            return result.get("logits", result)
        if isinstance(getattr(result, "logits", None), Tensor):
            return result.logits
        if isinstance(result, (tuple, list)):
            tensors = [part for part in result if isinstance(part, Tensor)]
            return tensors[0] if len(tensors) == 1 else result
        return result


def _entry(result: Any, key: str | int) -> Any:
    try:
        if isinstance(key, int) or isinstance(result, Mapping):
            return result[key]
        return getattr(result, key)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise ModelError(f"output={key!r}: the model returned {type(result).__name__}{_choices(result)}") from error


def _choices(result: Any) -> str:
    """What output= could be."""
    if isinstance(result, Mapping):
        keys: list[Any] = [key for key, part in result.items() if isinstance(part, Tensor)]
    elif dataclasses.is_dataclass(result):
        keys = [f.name for f in dataclasses.fields(result) if isinstance(getattr(result, f.name), Tensor)]
    elif hasattr(result, "_fields"):
        keys = list(result._fields)
    elif isinstance(result, (tuple, list)):
        keys = [i for i, part in enumerate(result) if isinstance(part, Tensor)]
    else:
        return "; pass Network(model, output=function) with a function that picks the logits"
    return f": pass Network(model, output=…) with one of {', '.join(map(repr, keys)) or 'its keys, or a function'}"


def check_extra(extra: Any) -> dict[str, Any]:
    """The further inputs by name.

    Raises:
        InputTypeError: for anything else than a mapping from names.
    """
    if extra is None:
        return {}
    if not isinstance(extra, Mapping) or not all(isinstance(name, str) for name in extra):
        raise InputTypeError("extra must map the names of forward's other arguments to their values, {'mask': mask}")
    return dict(extra)
