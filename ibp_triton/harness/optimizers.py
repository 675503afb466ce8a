"""Optimizers of torch.optim by name: their options checked against the class, their state as tensors to store."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ibp_triton.errors import DamageError, NetworkError
from ibp_triton.harness import plugins

Choice = dict[str, dict[str, Any]]  # {class name: options}
UNFIT = {"LBFGS": "it needs a closure", "SparseAdam": "it needs sparse gradients"}
STATE, NUMBER = "optimizer/", "optimizer number/"  # prefixes of stored names


def names() -> list[str]:
    """The classes that can be asked for."""
    found = {n: cls for n, cls in vars(torch.optim).items() if inspect.isclass(cls)}
    return sorted(n for n, cls in found.items() if issubclass(cls, torch.optim.Optimizer) and n not in _HIDDEN)


_HIDDEN = ("Optimizer", *UNFIT)


def read(given: Any) -> Choice:
    """A name, or {name: options}; the learning rate filled in, everything tried on a small matrix.

    Raises:
        ValueError: for an unknown class, unknown options and values that the class refuses.
    """
    if isinstance(given, str):
        given = {given: {}}
    if not isinstance(given, dict) or len(given) != 1:
        raise ValueError("expected an optimizer's name, or its name with options, such as {AdamW: {lr: 0.001}}")
    ((name, options),) = given.items()
    own = dict(options or {}) if isinstance(options, dict | None) else None
    if own is None:
        raise ValueError(f"{name}: expected its options, such as {{lr: 0.001}}, got {options!r:.80}")
    cls = _class(name)
    known = _options(cls)
    for option in own:
        if option not in known:
            raise ValueError(f"{name} takes no {option}; {_meant(option, known, 'its options')}")
    if "lr" not in known:
        raise ValueError(f"{name} takes no lr, which a training needs; take another one")
    own.setdefault("lr", inspect.signature(cls).parameters["lr"].default)
    try:
        _made(name, own, [torch.zeros(2, 2, requires_grad=True)])
    except Exception as error:  # whatever a class raises for a value
        raise ValueError(f"{name}: {error}") from error
    if not isinstance(own["lr"], float | int) or not own["lr"] > 0:
        raise ValueError(f"{name}: lr must be a positive number, got {own['lr']!r}")
    return {name: {**own, "lr": float(own["lr"])}}


def _class(name: str) -> type[torch.optim.Optimizer]:
    if name in UNFIT:
        raise ValueError(f"{name} can't train here: {UNFIT[name]}; take another one")
    target = None if name in names() else plugins.target_of("optimizers", name)
    if name not in names() and target is None:
        every = [*names(), *plugins.offered("optimizers")]
        raise ValueError(f"{name!r} is no optimizer of torch.optim; {_meant(name, every, 'there are')}")
    cls: type[torch.optim.Optimizer] = getattr(torch.optim, name) if target is None else plugins.load(target)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ValueError(f"{target} is no class derived from torch.optim.Optimizer")
    return cls


def _options(cls: type[torch.optim.Optimizer]) -> list[str]:
    return [option for option in inspect.signature(cls).parameters if option != "params"]


def schema() -> dict[str, Any]:
    """The JSON Schema of what `read` takes."""
    every = {
        name: {"type": ["object", "null"], "properties": {option: {} for option in _options(_class(name))}}
        for name in (*names(), *plugins.offered("optimizers"))
    }
    closed = {name: {**one, "additionalProperties": False} for name, one in every.items()}
    imported = {plugins.TARGET.pattern: {"type": ["object", "null"]}}
    named = {"properties": closed, "patternProperties": imported, "additionalProperties": False}
    one = {"type": "object", **named, "minProperties": 1, "maxProperties": 1}
    return {"anyOf": [{"enum": list(every)}, plugins.SCHEMA, one]}


def _meant(name: str, known: Iterable[str], others: str) -> str:
    spelled = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), spelled, 1, cutoff=0.5)
    return f"did you mean {spelled[close[0]]}?" if close else f"{others}: {', '.join(spelled.values())}"


def _made(name: str, options: Mapping[str, Any], parameters: list[Any]) -> torch.optim.Optimizer:
    plain: dict[str, Any] = {
        option: tuple(value) if isinstance(value, list) else value for option, value in options.items()
    }
    return _class(name)(parameters, **plain)


def on_cuda(device: str) -> bool:
    """Whether a device of torch by name is a CUDA device."""
    return torch.device(device).type == "cuda"


def is_capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a CUDA graph may hold its update: it keeps no count of steps on the host."""
    asked = [group.get("capturable") for group in optimizer.param_groups]
    return all(asked) or (isinstance(optimizer, torch.optim.SGD) and not any(asked))


def make(choice: Choice, parameters: list[nn.Parameter], capturable: bool = False) -> torch.optim.Optimizer:
    """The optimizer over these parameters, one that a CUDA graph may hold if that is asked and it can be such.

    Raises:
        NetworkError: where it can't train them.
    """
    ((name, options),) = choice.items()
    if capturable and "capturable" in _options(_class(name)):
        options = {"capturable": True} | options
    try:
        return _made(name, options, parameters)
    except (ValueError, RuntimeError, TypeError) as error:
        raise NetworkError(f"training.optimizer: {name} can't train this network: {error}") from error


def tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Its state by stored name: tensors as they are, numbers as 0-d ones."""
    found = {}
    for number, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                found[f"{STATE}{number}/{key}"] = value
            elif isinstance(value, int | float):
                found[f"{NUMBER}{number}/{key}"] = torch.tensor(value)
            elif value is not None:
                raise DamageError(
                    f"training.optimizer: {type(optimizer).__name__} keeps {key}, a {type(value).__name__}, in its "
                    "state, which can't be stored; take another one"
                )
    return found


def load(optimizer: torch.optim.Optimizer, stored: Mapping[str, Tensor]) -> None:
    """Take over the state that `tensors` gave."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in stored.items():
        place = name.removeprefix(STATE).removeprefix(NUMBER)
        if place != name:
            number, _, key = place.partition("/")
            state.setdefault(int(number), {})[key] = value.item() if name.startswith(NUMBER) else value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
