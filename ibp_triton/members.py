"""A model's modules, parameters and buffers, as torch's generators give them, at half the price: every step asks."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """As ``dict(model.named_parameters())``."""
    if type(model).named_parameters is not nn.Module.named_parameters:  # a model that shows but some
        return dict(model.named_parameters())
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, module in _modules(model):
        for name, p in module._parameters.items():
            if p is not None and id(p) not in found:
                found[id(p)] = prefix + name, p
    return dict(found.values())


def buffers_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Each module's own, under the name that it has there."""
    for _, module in _modules(model):
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield module, name, buffer


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """Each once, in the order of ``modules``."""
    return (module for _, module in _modules(model))


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each once, in the order of ``named_modules``, with what its members' names begin with."""
    seen, todo = set(), [("", model)]
    while todo:
        prefix, module = pair = todo.pop()
        if module not in seen:
            seen.add(module)
            yield pair
            if children := module._modules:
                todo += [(f"{prefix}{name}.", child) for name, child in reversed(children.items()) if child is not None]
