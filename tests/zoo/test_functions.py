"""Each function in torch's own table of operators, on its own samples: exact Loss IBP beside ``create_graph=True``."""

import sys
import unittest
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ibp_triton as ibp
from tests.library.comparing import double_backprop, ours

NUMBERS, PARTS, SAMPLES = 300, 12, {"constant": 5, "active": 2, "parametric": 2}
EXACT, TANGENTS = ibp.LossIBP(0.1, 2, "exact"), ibp.TangentBP(0.1, 2)
REFUSED = {  # with a sentence
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), "needs input [N, C, ...]"),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "needs input [N, C, ...]"),
    "embedding": "in place|no right second derivative",
}
WRONG = {"as_strided_scatter"}  # torch's reverse mode, so that tangents one by one and together are wrong otherwise


def _operators() -> list[Any]:
    """torch's table; its module wants a package for expected texts, of which nothing here is used."""
    if "expecttest" not in sys.modules:
        stand_in = ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stand_in
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return [op for op in op_db if op.supports_autograd and op.supports_dtype(torch.float64, "cpu")]


class Around(nn.Module):
    """A function between parameters: ``kind`` says what its tensors besides the first are."""

    def __init__(self, function: Any, sample: Any, kind: str) -> None:
        super().__init__()
        count = sample.input.numel()
        self.function, self.sample, self.kind, self.heads = function, sample, kind, nn.ParameterDict()
        self.scale, self.shift = nn.Parameter(torch.rand(count) + 0.5), nn.Parameter(torch.zeros(count))
        self.second = nn.Parameter(torch.tensor(0.9))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """[1, numbers] → [1, 3]."""
        h = (x * self.scale + self.shift).reshape(self.sample.input.shape)
        args = [self._other(a, h) for a in self.sample.args]
        named = {name: self._other(a, h) for name, a in self.sample.kwargs.items()}
        found = self.function(h, *args, **named)
        parts = [y for y in (found if isinstance(found, (tuple, list)) else [found]) if _continuous(y)]
        total = torch.zeros(1, 3, dtype=torch.float64)
        for number, y in enumerate(parts):
            flat = (torch.view_as_real(y.resolve_conj()) if y.is_complex() else y).reshape(1, -1)
            if str(number) not in self.heads:
                self.heads[str(number)] = nn.Parameter(torch.randn(flat.shape[1], 3, dtype=torch.float64))
            total = total + torch.tanh(0.05 * flat) @ self.heads[str(number)]
        return total

    def _other(self, a: Any, h: Tensor) -> Any:
        if not _continuous(a) or a.is_complex() or self.kind == "constant":
            return a
        return a * (1 + 0.1 * torch.tanh(0.1 * h.sum()) if self.kind == "active" else self.second)


def _continuous(y: Any) -> bool:
    return isinstance(y, Tensor) and (y.dtype == torch.float64 or y.is_complex()) and y.layout == torch.strided


def _samples(op: Any, count: int) -> Iterator[Any]:
    torch.manual_seed(0)
    every = [s for s in op.sample_inputs("cpu", torch.float64, requires_grad=False) if _continuous(s.input)]
    every = [s for s in every if s.input.dtype == torch.float64 and 0 < s.input.numel() <= NUMBERS]
    return iter(every[:: max(1, len(every) // count)])


def _by_hand(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor] | None:
    """The gradient, None where torch has none that is finite."""
    try:
        parts = double_backprop(model, x, labels, EXACT.beta)
    except (RuntimeError, NotImplementedError):
        return None
    return parts if all(bool(g.isfinite().all()) for g in parts.values()) else None


def _off(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference over the largest entry; a parameter that takes no part has no gradient, or zero."""
    parts = [(found.get(name, torch.zeros_like(g)), g) for name, g in expected.items() if g.numel()]
    size = max(float(g.abs().max()) for _, g in parts)
    return max(float((own - g).abs().max()) for own, g in parts) / (size or 1.0)


def _wrong(op: Any, sample: Any, kind: str) -> str | None:
    """What is wrong with our gradients around a function, if torch has one."""
    torch.manual_seed(1)
    model, x, labels = Around(op, sample, kind), sample.input.reshape(1, -1).clone(), torch.tensor([1])
    try:
        model(x)
    except (RuntimeError, IndexError, TypeError, ValueError):  # another kind of tensor than its samples
        return None
    expected = _by_hand(model, x, labels)
    if expected is None:
        return None
    try:
        off = _off(ours(EXACT, ibp.Network(model), x, labels)[1], expected)
        if not off < 1e-7:
            return f"exact Loss IBP is off by {off:.1e}"
        tau, plain = torch.randn(2, *x.shape, dtype=torch.float64), ours(ibp.BP(), ibp.Network(model), x, labels)[1]
        first, second, both = (ours(TANGENTS, ibp.Network(model), x, labels, t)[1] for t in (tau[:1], tau[1:], tau))
        off = _off(both, {name: first[name] + second[name] - plain[name] for name in both})
        return None if off < 1e-7 else f"two tangents are off by {off:.1e}"
    except (RuntimeError, ValueError) as problem:
        return str(problem)


@pytest.mark.parametrize("kind", ["constant", "active", "parametric"])
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.filterwarnings("ignore")
def test_functions_of_torchs_table(part: int, kind: str) -> None:
    """A twelfth of them; an operator that torch itself can't differentiate twice says nothing."""
    wrong, judged = [], 0
    for op in _operators()[part::PARTS]:
        name = op.name.rpartition(".")[2]
        for sample in _samples(op, SAMPLES[kind]):
            found = _wrong(op, sample, kind)
            judged += 1
            if found is not None and not (name in WRONG or _refused(name, found)):
                wrong.append(f"{op.name} {op.variant_test_name} {tuple(sample.input.shape)} {sample.kwargs}: {found}")
    assert judged > 50
    assert not wrong, "\n".join(wrong)


def _refused(name: str, found: str) -> bool:
    return name in REFUSED and any(words in found for words in REFUSED[name].split("|"))
