"""What one training step must launch, move and compute: the kernels' counts beside those of eager autograd.

Nothing here is timed. The kernels of a step are recorded without being run; eager autograd runs on the meta device
under a dispatch mode that counts its operators. The roofline floor is a model of an H100 from its data sheet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ibp_triton import Method, Network
from ibp_triton.harness import eager
from ibp_triton.harness.models import paper_cifar10, paper_mnist
from ibp_triton.methods import PAPER

NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, int, int]]] = {
    "mnist": (paper_mnist, (1, 28, 28)),
    "cifar10": (paper_cifar10, (3, 32, 32)),
}
KINDS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}  # how a step computes
# H100 SXM5 data sheet: HBM3 bandwidth in bytes/s, dense FLOP/s of float32 without matrix units (ieee products)
BANDWIDTH, PEAK = 3.35e12, 67e12


@dataclass(frozen=True)
class StepCount:
    """One training step before the optimizer, by the kernels and by eager autograd."""

    network: str
    method: str
    semantics: str
    batch: int
    launches: int  # kernels and torch operators that are not views or allocations
    bytes: int  # loaded and stored, each as often as it happens
    unique_bytes: int  # each address once per launch
    flops: int
    floor_us: float  # roofline model of an H100: the sum over launches of the larger of its two bounds
    eager_operators: int
    eager_bytes: int  # inputs and outputs of every operator
    eager_flops: int

    @property
    def fraction_of_operators(self) -> float:
        """Launches over eager autograd's operators."""
        return self.launches / self.eager_operators

    @property
    def fraction_of_bytes(self) -> float:
        """Unique bytes over eager autograd's inputs and outputs."""
        return self.unique_bytes / self.eager_bytes


class Operators(TorchDispatchMode):
    """Counts the operators that run on numbers: neither views nor allocations, nor checks of the labels."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = self.bytes = self.flops = 0
        self.costs: list[tuple[int, int]] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        floats = any(t.is_floating_point() for t in (*inputs, *outputs))
        ours = func.namespace == "ibp_triton"  # its launches are recorded one by one
        if ours or func.is_view or not floats or any(word in str(func) for word in _FREE):
            return out
        self.count += 1
        self.names.append(str(func))
        moved = sum(_size(t) for t in (*inputs, *outputs))
        self.bytes += moved
        flops = _flops(str(func), inputs, outputs)
        self.flops += flops
        self.costs.append((moved, flops))
        return out


_FREE = ("empty", "detach", "alias", "_local_scalar_dense", "_unsafe_view", "lift_fresh")


def _size(t: Tensor) -> int:
    """Bytes of the distinct elements: an expanded axis is read once."""
    return t.element_size() * (
        0 if t.numel() == 0 else _product(n for n, s in zip(t.shape, t.stride(), strict=True) if s)
    )


def _product(numbers: Any) -> int:
    result = 1
    for n in numbers:
        result *= int(n)
    return result


def _flops(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Of matrix products and convolutions, two for a multiply-add; other operators count none."""
    if "convolution_backward" in name:
        gradient, _, weight = inputs[:3]
        wanted = sum(t.dim() == 4 for t in outputs)
        return wanted * 2 * gradient.numel() * _product(weight.shape[1:])
    if "convolution" in name:
        return 2 * outputs[0].numel() * _product(inputs[1].shape[1:])
    if any(word in name for word in ("aten.mm", "aten.addmm", "aten.bmm")):
        return 2 * outputs[0].numel() * inputs[-1].shape[-2]
    return 0


def steps(batches: tuple[int, ...] = (32, 256), networks: tuple[str, ...] = tuple(NETWORKS)) -> list[StepCount]:
    """One row for each network, batch size, method and semantics."""
    return [count(network, method, batch) for network in networks for batch in batches for method in all_methods()]


def all_methods() -> list[Method]:
    """The seven methods, those with two semantics twice, at an arbitrary strength."""
    result: list[Method] = []
    for kind in PAPER.values():
        strength = {} if kind.parameter is None else {kind.parameter: 0.1}
        semantics = ("paper", "exact") if "semantics" in kind.__dataclass_fields__ else (None,)
        result += [kind(**strength, **({} if s is None else {"semantics": s})) for s in semantics]
    return result


def count(network: str, method: Method, batch: int, tangents: int = 5) -> StepCount:
    """The counts of one step of a paper network; channels-last weights and images, float32 with ieee products."""
    launches, others = recorded(network, method, batch, tangents)
    costs = [(record.unique_bytes, record.cost.flops) for record in launches] + others.costs
    plain = eager_counts(network, method, batch, tangents)
    return StepCount(
        network=network,
        method=method.key,
        semantics=getattr(method, "semantics", ""),
        batch=batch,
        launches=len(launches) + others.count,
        bytes=sum(record.cost.loaded + record.cost.stored for record in launches) + others.bytes,
        unique_bytes=sum(moved for moved, _ in costs),
        flops=sum(flops for _, flops in costs),
        floor_us=1e6 * sum(max(moved / BANDWIDTH, flops / PEAK) for moved, flops in costs),
        eager_operators=plain.count,
        eager_bytes=plain.bytes,
        eager_flops=plain.flops,
    )


def recorded(
    network: str, method: Method, batch: int, tangents: int = 5, kind: str = "float32", family: str = "sm_90"
) -> tuple[list[Any], Operators]:
    """The launches of one step by the Triton backend, none of them run, and the torch operators between them.

    In a kind of `KINDS` and with the tiles of a chip family, whatever torch's settings are.
    """
    from ibp_triton.kernels.launcher import recording  # here, so that the harness does without triton
    from ibp_triton.kernels.tiles import on_chip
    from ibp_triton.kernels.workbench.cases import allowing_tf32

    wrapped, x, labels, tau = on_kernels(network, method, batch, tangents, kind)
    with on_chip(family), allowing_tf32(kind == "tf32"):
        with recording(execute=False):
            wrapped.forward(x, {})  # finds the kernels; the step itself follows
        with recording(execute=False) as launches:
            method.gradients(wrapped, x, labels, tau)
        with recording(execute=False), Operators() as others:  # under a mode sums wait for no other
            method.gradients(wrapped, x, labels, tau)
    return launches, others


def on_kernels(network: str, method: Method, batch: int, tangents: int = 5, kind: str = "float32") -> Any:
    """A paper network for the Triton backend, images, labels and tangents: on the CPU, channels last."""
    model, x, labels, tau = _setting(network, method, batch, tangents, "cpu")
    wrapped = Network(model.to(memory_format=torch.channels_last), backend="triton", dtype=KINDS[kind])
    return wrapped, x.contiguous(memory_format=torch.channels_last), labels, tau


def eager_counts(network: str, method: Method, batch: int, tangents: int = 5) -> Operators:
    """Operators of eager autograd for the same gradient, on the meta device: see ``harness.eager``."""
    model, x, labels, tau = _setting(network, method, batch, tangents, "meta")
    with Operators() as operators:
        eager.gradients(model, method, x, labels, tau)
    return operators  # type: ignore[no-any-return]


def _setting(network: str, method: Method, batch: int, tangents: int, device: str) -> Any:
    build, shape = NETWORKS[network]
    model = build(shape).to(device)
    tau = torch.zeros(tangents, batch, *shape, device=device) if method.needs_tangents else None
    if tau is not None and device == "cpu":
        tau = tau.movedim(2, -1).contiguous().movedim(-1, 2)
    return model, torch.zeros(batch, *shape, device=device), torch.zeros(batch, dtype=torch.int64, device=device), tau
