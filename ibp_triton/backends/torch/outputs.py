"""The outputs of a function, one tensor or several in a tuple or list, and derivatives of them.

Of several the derivatives are ``Pieces`` by position in the output; what carries none (integers, None) is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ibp_triton.layer import Layer, Names, Pieces, Tangents
from ibp_triton.recording.arguments import rebuilt


class Part(Layer):
    """One tensor of the tuple that a function returned."""

    label = "part"

    def forward(self, input: Tensor, position: int) -> Tensor:
        """The tensor as it is."""
        self.position = position
        return input

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Any]:
        """d at this position of the tuple's derivative."""
        return {"input": Pieces({self.position: d})}

    def jvp(self, t: Tangents) -> Any:
        """The tuple's tangent at this position, None where it has none."""
        pieces: Any = t["input"]
        return pieces.get(self.position)


def continuous(y: Any) -> bool:
    """Whether it is a tensor of real or complex numbers."""
    return isinstance(y, Tensor) and (y.is_floating_point() or y.is_complex())


def tensors(output: Any) -> list[Tensor]:
    """What can carry a derivative, in order."""
    parts = output if isinstance(output, (tuple, list)) else [output]
    return [y for y in parts if continuous(y)]


def mapped(output: Any, function: Callable[[Any], Any]) -> Any:
    """Of a tensor, or of each part of a tuple or list."""
    if isinstance(output, (tuple, list)):
        return rebuilt(output, [function(part) for part in output])
    return function(output)


def positions(output: Any, parts: dict[int, Tensor]) -> dict[int, Tensor]:
    """The parts by their position in the output, from their position among its differentiable tensors."""
    places = [i for i, y in enumerate(output) if continuous(y)]
    return Pieces({places[i]: part for i, part in parts.items()})


def ranks(output: Any, d: Any) -> dict[int, Tensor]:
    """The parts of a tuple's derivative by their position among the differentiable tensors."""
    places = [i for i, y in enumerate(output) if continuous(y)]
    return {rank: d[i] for rank, i in enumerate(places) if d.get(i) is not None}


def paired(graphed: Any, d: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs that depend on something, with their derivatives."""
    pairs = [(graphed, d)] if isinstance(graphed, Tensor) else [(graphed[i], part) for i, part in d.items()]
    pairs = [(y, part) for y, part in pairs if part is not None and y.requires_grad]
    return [y for y, _ in pairs], [part for _, part in pairs]


def unbound(d: Any) -> list[Any]:
    """A derivative with an axis of tangents as one derivative a tangent."""
    if not isinstance(d, Pieces):
        return list(d.unbind(0))
    parts = {i: part.unbind(0) for i, part in d.items()}
    return [Pieces({i: part[k] for i, part in parts.items()}) for k in range(len(next(iter(parts.values()))))]


def stacked(found: list[Any]) -> Any:
    """One derivative a tangent as a derivative with an axis of tangents."""
    if isinstance(found[0], Tensor):
        return torch.stack(found)
    return Pieces({i: torch.stack([one[i] for one in found]) for i in found[0]})


def carries_tangents(d: Any, output: Any) -> bool:
    """Whether d carries an axis of tangents."""
    if isinstance(d, Pieces):
        position = next(iter(d))
        d, output = d[position], output[position]
    return bool(d.dim() > output.dim())


def plain(d: Any) -> Any:
    """Pieces as the plain dictionaries that torch.func knows."""
    return dict(d) if isinstance(d, Pieces) else d


def parts(output: Any) -> Any:
    """What can carry a derivative: the tensor, or {position: part} of a tuple without its None and integer entries."""
    if isinstance(output, (tuple, list)):
        return {i: part for i, part in enumerate(output) if continuous(part)}
    return output


def complete(parts: Any, d: Any) -> Any:
    """A derivative for each of ``parts``, zeros where nothing came back."""
    if isinstance(parts, Tensor):
        return torch.zeros_like(parts) if d is None else d
    return {i: complete(part, (d or {}).get(i)) for i, part in parts.items()}
