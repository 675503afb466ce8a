"""Which of the model's modules is running now."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator
from functools import cached_property
from typing import Any

from torch import nn


class Running:
    """The modules of a model whose code is on the stack."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @cached_property
    def _paths(self) -> dict[int, str]:
        return {id(module): path for path, module in self.model.named_modules()}

    def module(self) -> nn.Module | None:
        """The innermost."""
        return next((module for module in _modules() if id(module) in self._paths), None)

    def path(self) -> str:
        """The innermost's, "" for the model itself and outside."""
        module = self.module()
        return "" if module is None else self._paths[id(module)]

    def inside(self, some: Container[nn.Module]) -> bool:
        """Whether the code of one of these is running."""
        return any(module in some for module in _modules())

    def __str__(self) -> str:
        """For messages."""
        return self.path() or "the model"


def _modules() -> Iterator[nn.Module]:
    """Whatever is ``self`` in a frame of the stack and a module, innermost first."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            yield module
        frame = frame.f_back
