"""What a recording depends on, and the signals that end one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """What a recording depends on besides the model: values in place of parameters, and the dtype to compute in."""

    model: nn.Module
    own: Mapping[str, nn.Parameter]  # the model's parameters by name
    parameters: Mapping[str, Tensor]
    dtype: torch.dtype | None = None
    keep: bool = True  # whether the values of all nodes are kept, or only those that sweeps read
    own_input: bool = False  # whether x is a copy, which the model may write to
    watch: bool = False  # whether to note which nodes' numbers and shapes the model looks at, for a lowering


class Diverged(Exception):  # noqa: N818 - a signal, not an error
    """The model did something else than the lowered recording that it was to follow."""


class Restart(Exception):  # noqa: N818 - a signal, not an error
    """The recording must begin again: with this module run by plain autograd, or on a copy of x."""

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__("the recording must begin again")
        self.module = module
