"""What torch computed out of sight: rules over a graph that autograd made."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ibp_triton.backends.torch.generic import Generic
from ibp_triton.backends.torch.outputs import carries_tangents, stacked
from ibp_triton.layer import Names, Tangents


class Leaf(Generic):
    """What torch computed out of sight: a custom autograd.Function, a scripted module. Its graph is autograd's own.

    ``forward(output, *inputs)`` takes what was found: the tensor and the activations and parameters it hangs on.
    """

    label, unseen = "autograd", True

    def forward(self, output: Tensor, *inputs: Tensor) -> Tensor:
        """The output as it is."""
        self.graphed, self.sources, self.wrapped = output, list(inputs), False
        self.bendable = self.meeting = None
        self.output, self.inputs = output.detach(), [x.detach() for x in inputs]
        return output.detach()

    def jvp(self, t: Tangents) -> Any:
        """Reverse mode twice: a function with a backward of its own has no other."""
        names = sorted(t)
        try:
            if self._can_meet(names, [t[name] for name in names]):
                return self._met(names, [t[name] for name in names], self._last[0]).pushed
            if t[names[0]].dim() == self.inputs[int(names[0])].dim():
                return self._walk(names, [t[name] for name in names], None, [])[0]
            rows = zip(*(t[name].unbind(0) for name in names), strict=True)
            return stacked([self._walk(names, row, None, [])[0] for row in rows])
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.node.where}: {self.node.label} has a backward that can't be differentiated again, which the "
                f"penalties need ({error}); bp, at and fast_at work, or write its backward in differentiable operations"
            ) from error

    def multiply_adds(self) -> int:
        """Unknown."""
        return 0


class Hooked(Leaf):
    """Where full backward hooks sit: the identity, whose first reverse sweep calls the hooks."""

    label, watched = "backward hook", True

    def vjp(self, d: Any, wanted: Names) -> dict[str, Tensor]:
        """d, after the hooks have seen it, once a pass; they are not made for several derivatives at a time."""
        if getattr(self, "called", False) or carries_tangents(d, self.output):
            return {"0": d}
        self.called = True
        return super().vjp(d, wanted)

    def jvp(self, t: Tangents) -> Any:
        """t."""
        return t["0"]

    def _bend(self, t: Tangents, d: Any, wanted: Names) -> dict[str, Tensor]:
        return {}
