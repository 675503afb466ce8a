"""The derivatives of one function by torch.func's transforms: forward mode, and all where no graph can be kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from ibp_triton.backends.torch.outputs import complete, parts, plain
from ibp_triton.layer import Names, Tangents


class Functional:
    """A function of operands that are named "0", "1", … in their order, and may be called as often as needed."""

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
        self.function, self.inputs = function, inputs

    def _of(self, names: Names) -> tuple[Callable[..., Any], list[Tensor]]:
        """The function of the named operands alone, and their values."""
        positions = [int(name) for name in names]

        def function(*values: Tensor) -> Any:
            inputs = list(self.inputs)
            for position, value in zip(positions, values, strict=True):
                inputs[position] = value
            with sdpa_kernel(SDPBackend.MATH):  # the only attention kernel with forward AD on the CPU
                return parts(self.function(*inputs))

        return function, [self.inputs[p] for p in positions]

    def jvp(self, names: Names, tangents: Sequence[Tensor]) -> Any:
        """J t, by forward mode."""
        function, values = self._of(names)
        return torch.func.jvp(function, tuple(values), tuple(tangents))[1]

    def jvp_by_reverse(self, names: Names, tangents: Sequence[Tensor]) -> Any:
        """J t as the derivative of Jᵀu by u, which that is linear in."""
        function, values = self._of(names)
        zeros = tree_map(torch.zeros_like, function(*values))
        with torch.enable_grad():
            return torch.func.vjp(lambda u: torch.func.vjp(function, *values)[1](u), zeros)[1](tuple(tangents))[0]

    def vjp(self, d: Any, wanted: Names, batched: bool) -> dict[str, Tensor]:
        """Jᵀ d; ``batched``: d carries an axis of tangents."""
        names = sorted(wanted)
        function, values = self._of(names)

        def pull(d: Any) -> dict[str, Tensor]:
            output, back = torch.func.vjp(function, *values)  # type: ignore[misc]
            return dict(zip(names, back(complete(output, d)), strict=True))

        return torch.func.vmap(pull, randomness="same")(plain(d)) if batched else pull(d)

    def bend(self, t: Tangents, d: Any, wanted: Names, *, forward: bool) -> dict[str, Tensor]:
        """∇_wanted ⟨Jᵀ d, t⟩, summed over tangents: forward over reverse, or reverse over reverse."""
        along, names = sorted(t), sorted(wanted)
        places = [*along, *(name for name in names if name not in along)]
        function, values = self._of(places)

        def one(tangents: tuple[Tensor, ...], d: Any) -> dict[str, Tensor]:
            def pulled(*moved: Tensor) -> dict[str, Tensor]:
                current = dict(zip(places, moved, strict=True))

                def at(*inputs: Tensor) -> Any:
                    return function(*(current | dict(zip(names, inputs, strict=True))).values())

                output, back = torch.func.vjp(at, *[current[name] for name in names])  # type: ignore[misc]
                return dict(zip(names, back(complete(output, d)), strict=True))

            still = [torch.zeros_like(value) for value in values[len(along) :]]
            with torch.enable_grad():
                if not forward:
                    return self._bent(function, dict(zip(places, values, strict=True)), along, names, tangents, d)
                return torch.func.jvp(pulled, tuple(values), (*tangents, *still))[1]  # type: ignore[no-any-return]

        tangents = tuple(t[name] for name in along)
        if tangents[0].dim() == values[0].dim():
            return one(tangents, d)
        per_tangent = torch.func.vmap(one, randomness="same")(tangents, plain(d))
        return {name: value.sum(0) for name, value in per_tangent.items()}

    @staticmethod
    def _bent(
        function: Callable[..., Any], values: dict[str, Tensor], along: list[str], names: list[str], t: Any, d: Any
    ) -> dict[str, Tensor]:
        def pulled(*inputs: Tensor) -> Any:
            current = values | dict(zip(names, inputs, strict=True))

            def at(*moved: Tensor) -> Any:
                return function(*(current | dict(zip(along, moved, strict=True))).values())

            output, back = torch.func.vjp(at, *[current[name] for name in along])  # type: ignore[misc]
            return back(complete(output, d))

        back = torch.func.vjp(pulled, *[values[name] for name in names])[1]
        return dict(zip(names, back(tuple(t)), strict=True))
