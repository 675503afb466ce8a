"""GELU and SiLU behind a linear layer: its epilogue, whose slopes are kept for both sweeps.

The layer's own linear sweep multiplies by the slope, and in the reverse sweep the layer that reads the activation, or
where there is none the activation itself. Curvature wants derivative and tangent before they were multiplied: passes
that have it run by torch's rules, and the curvature itself is one launch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ibp_triton.backends import KERNEL_DTYPES
from ibp_triton.backends.torch import pointwise
from ibp_triton.backends.triton.kernel_rules import ACTIVATION, TritonLinear, steep
from ibp_triton.errors import MethodError
from ibp_triton.graph import Graph, Node
from ibp_triton.kernels.smooth import Activation
from ibp_triton.layer import Layer, Names, Tangents, matched
from ibp_triton.ops import straight as ops


class TritonActivation(Layer):
    """An activation that the linear layer before it applies."""

    label = "activation"

    def forward(self, input: Tensor, *_: Any, **__: Any) -> Tensor:
        """What the linear layer gave."""
        return input

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d σ'(z), by the layer behind it where that reads nothing else."""
        return {"input": d if self.sloped_by is None else pointwise.times(d, steep(self.sloped_by))}

    def jvp(self, t: Tangents) -> Tensor:
        """t σ'(z) came from the linear layer."""
        return t["input"]

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """Not after the sweeps have multiplied by the slope.

        Raises:
            MethodError: always.
        """
        raise MethodError(f"{self.node.where}: curvature of a pass that was recorded without it: frugal=False")


_GELUS = {"none": Activation.GELU, "tanh": Activation.GELU_TANH}  # by torch's ``approximate``


class _Bent(pointwise.Pointwise):
    """Curvature in one launch; the sweeps, which it wants apart, by torch's operators."""

    smooth: Activation

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """d t σ''(z), summed over tangents."""
        z = self.input
        d, t = matched(d, z.dim(), t, {"input": z})
        sides = [side if side.dim() > z.dim() else side[None] for side in (d, t["input"])]
        if not all(x.is_contiguous() and x.dtype == z.dtype for x in (*sides, z)) or z.dtype not in KERNEL_DTYPES:
            return super().curvature(d, t, wanted)
        return {"input": ops.activation_curvature(*sides, z, self.smooth)}


class TritonGELU(_Bent, pointwise.GELU):
    """In passes with curvature."""

    @property
    def smooth(self) -> Activation:  # type: ignore[override]
        """Which of the two."""
        return _GELUS[self.approximate]


class TritonSiLU(_Bent, pointwise.SiLU):
    """In passes with curvature."""

    smooth = Activation.SILU


BENT: dict[type[Layer], type[Layer]] = {pointwise.GELU: TritonGELU, pointwise.SiLU: TritonSiLU}


def fuse_activation(graph: Graph, node: Node) -> None:
    """Into the linear layer before it, if that one computes for it alone; dropouts behind it commute with slopes."""
    smooth, producer = _smooth(node), graph.nodes[node.operands["input"]]
    if smooth is None or producer.rule is not TritonLinear or graph.only_consumer(producer) is not node:
        return
    producer.settings[ACTIVATION], node.rule = smooth, TritonActivation
    reader = graph.only_consumer(node)
    while reader is not None and reader.rule is pointwise.Dropout:
        reader = graph.only_consumer(reader)
    multiplies = reader if reader is not None and reader.rule is TritonLinear else node
    multiplies.sloped_by = producer.index


def _smooth(node: Node) -> Activation | None:
    if node.rule is pointwise.SiLU:
        return Activation.SILU
    if node.rule is not pointwise.GELU:
        return None
    approximate = dict(zip(("input", "approximate"), node.args, strict=False)) | node.kwargs
    return _GELUS.get(approximate.get("approximate", "none"))
