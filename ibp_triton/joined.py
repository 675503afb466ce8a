"""Several optimizers as few: one call updates the parameters of all that would make the same update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.optim import LBFGS, Optimizer


def joined(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """Optimizers whose calls together do what a call of each would, on the state of each.

    Those of one class of torch.optim become one, whose groups are those with equal options: a foreach or fused
    implementation updates each of these in one launch. Others, whose updates may hang together, stay as they are.
    """
    alike: dict[Any, list[Optimizer]] = {}
    for optimizer in optimizers:
        alike.setdefault(type(optimizer) if _plain(optimizer) else optimizer, []).append(optimizer)
    return [own[0] if len(own) == 1 else _one(own) for own in alike.values()]


def step(optimizers: Sequence[Optimizer]) -> None:
    """Update the parameters of all."""
    for optimizer in joined(optimizers):
        type(optimizer).step(optimizer)  # not that of an object, which a scheduler has tied to the one it watches
    for optimizer in optimizers:
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what a scheduler asks for


def _plain(optimizer: Optimizer) -> bool:
    """Whether each parameter's update depends on nothing but its own gradient and state."""
    kind = type(optimizer)
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    return kind.__module__.startswith("torch.optim.") and not issubclass(kind, LBFGS) and not any(hooks)


def _one(optimizers: Sequence[Optimizer]) -> Optimizer:
    groups: dict[Any, dict[str, Any]] = {}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        options = {name: value for name, value in group.items() if name != "params"}
        same = groups.setdefault(_key(options), {**options, "params": []})
        same["params"] += [p for p in group["params"] if p.grad is not None]
    one: Optimizer = object.__new__(type(optimizers[0]))
    one.__dict__ = {**optimizers[0].__dict__, "param_groups": list(groups.values())}
    one.state = {p: own.state[p] for own in optimizers for p in _trained(own)}  # type: ignore[assignment]
    return one


def _trained(optimizer: Optimizer) -> Iterable[Any]:
    return (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)


def _key(options: dict[str, Any]) -> Any:
    """Numbers, flags and texts as they are, of anything else which object it is."""
    plain = (bool, int, float, str, tuple, type(None))
    return tuple((name, value if isinstance(value, plain) else id(value)) for name, value in sorted(options.items()))
