"""How a rule is held against torch: one layer alone, as a function of its operands."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ibp_triton.backends.torch.rules import candidate, rule_for
from ibp_triton.graph import Node, Ref
from ibp_triton.layer import Bilinear, Layer, Pieces


@dataclass
class Call:
    """A call of a torch function. Its floating-point tensors are operands, of the kinds given (default: active)."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    reference: Any = None  # the same function where torch.func cannot follow torch's own

    def __post_init__(self) -> None:
        rule = candidate(self.function)
        assert rule is not None, self.function
        bound = inspect.signature(rule.forward).bind(None, *self.args, **self.kwargs)
        bound.apply_defaults()
        self.arguments = dict(list(bound.arguments.items())[1:])
        self.operands = dict(self._operands())
        self.kinds = {name: self.kinds.get(name, "active") for name in self.operands}

    def _operands(self) -> Any:
        for name, value in self.arguments.items():
            parts = enumerate(value) if isinstance(value, (tuple, list)) else ()
            for key, part in [(name, value), *((f"{name}.{i}", p) for i, p in parts)]:
                if isinstance(part, Tensor) and part.is_floating_point():
                    yield key, part

    def rule(self) -> type[Layer] | None:
        """What rule_for says, with references in place of the tensors."""
        positions = {id(value): i for i, value in enumerate(self.operands.values())}

        def refer(value: Any) -> Any:
            if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
                return type(value)(refer(part) for part in value)
            return Ref(positions.get(id(value), -1)) if isinstance(value, Tensor) else value

        return rule_for(self.function, self.kinds, {name: refer(value) for name, value in self.arguments.items()})

    def layer(self) -> tuple[Layer, Any]:
        """The layer, evaluated, and its output."""
        rule = self.rule()
        assert rule is not None, (self.function, self.kinds)
        positions = {id(value): i for i, value in enumerate(self.operands.values())}
        node = Node(0, "here", "active", self.function, rule=rule)
        node.operands = {name: positions[id(value)] for name, value in self.operands.items()}
        layer = rule(node)
        return layer, layer.forward(*self.args, **self.kwargs)

    def names(self, kind: str) -> list[str]:
        """The operands of that kind."""
        return [name for name, own in self.kinds.items() if own == kind]

    def one_of_each(self, names: list[str]) -> list[str]:
        """Without the further names of a tensor that is given twice."""
        return list({id(self.operands[name]): name for name in reversed(names)}.values())[::-1]

    def aliases(self, names: list[str]) -> list[str]:
        """All names of these tensors."""
        ids = {id(self.operands[name]) for name in names}
        return [name for name, value in self.operands.items() if id(value) in ids]

    def collected(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What was found for each tensor, under its first name."""
        out: dict[str, Tensor] = {}
        for name, part in found.items():
            first = self.aliases([name])[0]
            out[first] = out[first] + part if first in out else part
        return out

    def plain(self, names: list[str]) -> Any:
        """The torch function, of the named operands alone."""
        position = {id(self.operands[name]): i for i, name in enumerate(names)}

        def function(*values: Tensor) -> Any:
            def put(value: Any) -> Any:
                if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
                    return type(value)(put(part) for part in value)
                known = isinstance(value, Tensor) and id(value) in position
                return values[position[id(value)]] if known else value

            with sdpa_kernel(SDPBackend.MATH):
                return floating(
                    (self.reference or self.function)(*put(self.args), **{k: put(v) for k, v in self.kwargs.items()})
                )

        return function


def floating(output: Any) -> Any:
    """What can carry a derivative: the tensor, or {position: tensor}."""
    if isinstance(output, (tuple, list)):
        return {i: part for i, part in enumerate(output) if isinstance(part, Tensor) and part.is_floating_point()}
    return output


def pieces(value: Any) -> Any:
    """As a rule wants it."""
    return Pieces(value) if isinstance(value, dict) else value


def random_like(value: Any, lead: tuple[int, ...]) -> Any:
    """Noise of the value's shape behind ``lead``, laid out in memory as the value is."""
    if isinstance(value, dict):
        return {i: random_like(part, lead) for i, part in value.items()}
    parts = [torch.randn_like(value) for _ in range(lead[0] if lead else 1)]
    return torch.stack(parts) if lead else parts[0]


def agree(found: Any, expected: Any, tolerance: float = 1e-11) -> None:
    """To the largest entry expected."""
    if isinstance(expected, dict):
        assert set(found) <= set(expected)
        for key, part in expected.items():
            agree(found[key] if key in found else torch.zeros_like(part), part, tolerance)
        return
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert found.dtype == expected.dtype
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


def each_vector(function: Any, lead: tuple[int, ...], *vectors: Any) -> Any:
    """``function`` of one tangent vector after the other, stacked."""
    if not lead:
        return function(*vectors)

    def pick(value: Any, i: int) -> Any:
        if isinstance(value, dict):
            return {k: pick(v, i) for k, v in value.items()}
        return tuple(v[i] for v in value) if isinstance(value, tuple) else value[i]

    parts = [function(*(pick(v, i) for v in vectors)) for i in range(lead[0])]
    first = parts[0]
    if isinstance(first, dict):
        return {k: torch.stack([part[k] for part in parts]) for k in first}
    if isinstance(first, tuple):
        return tuple(torch.stack([part[i] for part in parts]) for i in range(len(first)))
    return torch.stack(parts)


def check(call: Call, leads: tuple[tuple[int, ...], ...] = ((), (1,), (5,)), output: bool = True) -> None:
    """All derivatives of a layer against torch.func; second ones forward over reverse."""
    layer, value = call.layer()
    names = call.one_of_each([n for n, kind in call.kinds.items() if kind != "constant"])
    along = call.one_of_each(call.names("active"))
    everything, moving = call.plain(names), call.plain(along)
    values, points = [call.operands[n] for n in names], [call.operands[n] for n in along]
    before = [v.clone() for v in values]
    if output:
        agree(floating(value), everything(*values))
    for lead in leads:
        d = random_like(floating(value), lead)
        t = tuple(random_like(p, lead) for p in points)
        pull = torch.func.vjp(everything, *values)[1]
        expected = each_vector(lambda d, pull=pull: pull(d), lead, d)
        others = [n for n in names if n not in along]
        for wanted in (names, along, others, *([n] for n in others)):
            if lead and isinstance(layer, Bilinear):
                wanted = along  # its weight gradient is one for all tangents, of a left side that has as many
            found = call.collected(layer.vjp(pieces(d), call.aliases(wanted)) if wanted else {})
            assert set(found) <= set(wanted), "a derivative that nobody asked for"
            for name in wanted:
                wants = expected[names.index(name)]
                agree(found.get(name, torch.zeros_like(wants)), wants)
        pushed = each_vector(lambda *t: torch.func.jvp(moving, tuple(points), tuple(t))[1], lead, *t)
        tangents = {n: t[along.index(call.aliases([n])[0])] for n in call.names("active")}
        agree(layer.jvp(tangents), pushed)

        def bend(t, d):
            def pulled(*moved):
                at = dict(zip(names, values, strict=True)) | dict(zip(along, moved, strict=True))
                return torch.func.vjp(everything, *at.values())[1](d)

            return torch.func.jvp(pulled, tuple(points), t)[1]

        bent = each_vector(bend, lead, t, d)
        bent = tuple(b.sum(0) if lead else b for b in bent)
        others = call.names("parametric")
        for own in (layer, call.layer()[0]):  # after other sweeps and before any
            found = call.collected(own.tangent_param_vjp(tangents, pieces(d), others) if others else {})
            found |= call.collected(own.curvature(pieces(d), tangents, call.aliases(along)))
            for name in (*along, *others):
                wants = bent[names.index(name)]
                agree(found.get(name, torch.zeros_like(wants)), wants)
        agree(layer.jvp(tangents), pushed)
    for was, now in zip(before, values, strict=True):
        assert torch.equal(was, now)


def half_agrees(make: Any, dtype: torch.dtype, tolerance: float = 0.03) -> None:
    """The penalty's terms and the derivatives in half precision against those in float64 at the same numbers.

    ``make`` gives the call for a dtype-casting function.
    """
    exact, rough = make(lambda x: x.to(dtype).double()), make(lambda x: x.to(dtype))
    (one, value), (two, _) = exact.layer(), rough.layer()
    along, others = exact.names("active"), exact.names("parametric")
    d = random_like(floating(value).to(dtype), ())
    t = {n: random_like(exact.operands[n].to(dtype), ()) for n in along}
    wide_t = {n: part.double() for n, part in t.items()}
    pairs = [
        (two.vjp(d, along), one.vjp(d.double(), along)),
        (two.vjp(d, others), one.vjp(d.double(), others)),
        ({"": two.jvp(t)}, {"": one.jvp(wide_t)}),
        (two.curvature(d, t, along), one.curvature(d.double(), wide_t, along)),
        (two.tangent_param_vjp(t, d, others), one.tangent_param_vjp(wide_t, d.double(), others)),
    ]
    for found, expected in pairs:
        for name, wants in expected.items():
            error = (found[name].double() - wants).abs().max() / wants.abs().max().clamp_min(1e-3)
            assert error < tolerance, (name, float(error))
