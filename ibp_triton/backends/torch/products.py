"""Products of two tensors along axes: matmul, bmm, addmm, baddbmm, einsum. Each side may be active or parametric.

C = A B: vjp (d Bᵀ, Aᵀ d), jvp t_A B + A t_B, and what is left of each when both move: (d t_Bᵀ, t_Aᵀ d).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ibp_triton.layer import HALF, Layer, Names, Tangents, matched, product, sum_to, wide, without


class MatMul(Layer):
    """input @ other, with torch's broadcasting; vectors are rows on the left and columns on the right."""

    label = "matmul"
    sides: ClassVar[tuple[str, str]] = ("input", "other")

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        """[..., n, k] @ [..., k, m] → [..., n, m]."""
        self._keep(input, other)
        return torch.matmul(input, other)

    def _keep(self, left: Tensor, right: Tensor) -> None:
        """The two as matrices: axes of one number that torch drops from the product."""
        self.values = dict(zip(self.sides, (left, right), strict=True))
        self.left = left[None] if left.dim() == 1 else left
        self.right = right[:, None] if right.dim() == 1 else right
        self.row, self.column = left.dim() == 1, right.dim() == 1
        self.rank = max(self.left.dim(), self.right.dim())
        self.output_rank = self.rank - self.row - self.column

    def _matrices(self, t: Tensor, name: str) -> Tensor:
        """A side's tangent [T, *S], shaped to multiply the other side."""
        first = name == self.sides[0]
        if first and self.row:
            t = t.unsqueeze(-2)
        elif not first and self.column:
            t = t.unsqueeze(-1)
        value = self.left if first else self.right
        missing = self.rank - value.dim()
        return t.reshape(t.shape[0], *[1] * missing, *t.shape[1:]) if t.dim() > value.dim() and missing else t

    def _derivative(self, d: Tensor) -> Tensor:
        """Of the output, as a matrix."""
        d = d.unsqueeze(-1) if self.column else d
        return d.unsqueeze(-2) if self.row else d

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d Bᵀ and Aᵀ d."""
        return self._back(self._derivative(d), {self.sides[0]: self.left, self.sides[1]: self.right}, wanted)

    def _back(self, d: Tensor, at: Mapping[str, Tensor], wanted: Names) -> dict[str, Tensor]:
        """d Bᵀ for A and Aᵀ d for B, with the A and B that ``at`` has."""
        out, (left, right) = {}, self.sides
        if left in wanted and right in at:
            out[left] = sum_to(d @ at[right].mT, self.left, self.rank)
        if right in wanted and left in at:
            out[right] = self._for_right(at[left], d)
        return {name: self._fitting(part, name) for name, part in out.items()}

    def _fitting(self, part: Tensor, name: str) -> Tensor:
        """In the shape of the operand, a vector perhaps."""
        lead = part.dim() - (self.left if name == self.sides[0] else self.right).dim()
        return part.reshape((*part.shape[:lead], *self.values[name].shape))

    def _for_right(self, a: Tensor, d: Tensor) -> Tensor:
        """Aᵀ d; for one matrix B of all samples as one product over all their rows."""
        if self.right.dim() > 2 or self.left.dim() == 2 or a.dim() > d.dim():
            return sum_to(a.mT @ d, self.right, self.rank)
        lead = d.shape[: d.dim() - self.rank]
        d = d.reshape((*lead, -1, d.shape[-1]))
        a = a.reshape((*(lead if a.dim() > self.rank else ()), -1, a.shape[-1]))
        return a.mT @ d

    def jvp(self, t: Tangents) -> Tensor:
        """t_A B + A t_B."""
        left, right = self.sides
        parts = [self._matrices(t[left], left) @ self.right] if left in t else []
        parts += [self.left @ self._matrices(t[right], right)] if right in t else []
        total = sum(parts[1:], parts[0])
        total = total.squeeze(-1) if self.column else total
        return total.squeeze(-2 + self.column) if self.row else total

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """d t_Bᵀ for A and t_Aᵀ d for B."""
        t = {name: part for name, part in t.items() if name in self.sides}
        d, t = matched(d, self.output_rank, t, self.values)
        moved = {name: self._matrices(part, name) for name, part in t.items()}
        found = self._back(self._derivative(d), moved, wanted)
        return {name: without(part, self.values[name].dim()) for name, part in found.items()}

    def tangent_param_vjp(self, t: Tangents, r: Tensor, wanted: Names) -> dict[str, Tensor]:
        """The same, in float32 for half precision."""
        if r.dtype in HALF:
            r, t = wide(r), {name: wide(part) for name, part in t.items()}
        return self.curvature(r, t, wanted)

    def multiply_adds(self) -> int:
        """n k m for each product."""
        lead = torch.broadcast_shapes(self.left.shape[:-2], self.right.shape[:-2])
        return product(lead) * product(self.left.shape[-2:]) * self.right.shape[-1]


class BMM(MatMul):
    """torch.bmm and torch.mm, whose second argument has a name of its own."""

    sides = ("input", "mat2")

    def forward(self, input: Tensor, mat2: Tensor) -> Tensor:
        """[B, n, k] @ [B, k, m], or without B."""
        self._keep(input, mat2)
        return input @ mat2


class AddMM(MatMul):
    """beta · input + alpha · mat1 @ mat2."""

    label, sides = "addmm", ("mat1", "mat2")

    def forward(  # type: ignore[override]
        self, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1
    ) -> Tensor:
        """[n, m]; input broadcasts."""
        return self._sum(input, mat1, mat2, beta, alpha)

    def _sum(self, input: Tensor, left: Tensor, right: Tensor, beta: Any, alpha: Any) -> Tensor:
        self._keep(left, right)
        self.input, self.beta, self.alpha = input, beta, alpha
        result: Tensor = self.node.function(input, left, right, beta=beta, alpha=alpha)
        return result

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """beta d, alpha d Bᵀ and alpha Aᵀ d."""
        out = {"input": self.beta * sum_to(d, self.input, self.output_rank)} if "input" in wanted else {}
        sides = [name for name in wanted if name != "input"]
        return out | (super().vjp(self.alpha * d, sides) if sides else {})

    def jvp(self, t: Tangents) -> Tensor:
        """beta t + alpha (t_A B + A t_B)."""
        sides = {name: part for name, part in t.items() if name != "input"}
        parts: list[Tensor] = [self.alpha * super().jvp(sides)] if sides else []
        if "input" in t:
            extra = t["input"].dim() - self.input.dim()
            lead, missing = t["input"].shape[:extra], self.output_rank - self.input.dim()
            shape = self._output_shape
            parts.append(
                self.beta * t["input"].reshape((*lead, *[1] * missing, *self.input.shape)).expand((*lead, *shape))
            )
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    @property
    def _output_shape(self) -> tuple[int, ...]:
        return (*self.left.shape[:-1], self.right.shape[-1])

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """alpha times the product's."""
        sides = {name: part for name, part in t.items() if name != "input"}
        return super().curvature(self.alpha * d, sides, wanted) if sides else {}


class BAddBMM(AddMM):
    """beta · input + alpha · batch1 @ batch2."""

    label, sides = "baddbmm", ("batch1", "batch2")

    def forward(  # type: ignore[override]
        self, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: Any = 1, alpha: Any = 1
    ) -> Tensor:
        """[B, n, m]; input broadcasts."""
        return self._sum(input, batch1, batch2, beta, alpha)


class Einsum(Layer):
    """One or two operands, letters only: each derivative is an einsum of its own."""

    label = "einsum"

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """No ellipsis, no letter twice in one operand, no letter that only one operand has and the output has not."""
        equation = arguments.get("equation")
        if not isinstance(equation, str):
            return False
        inputs, output = _letters(equation)
        operands = arguments.get("operands", ())
        listed = any(isinstance(operand, (tuple, list)) for operand in operands)
        plain = "." not in equation and 1 <= len(inputs) <= 2 and len(inputs) == len(operands) and not listed
        return plain and all(
            len(set(own)) == len(own) and set(own) <= set(output).union(*inputs[:i], *inputs[i + 1 :])
            for i, own in enumerate(inputs)
        )

    def forward(self, equation: str, *operands: Tensor) -> Tensor:
        """The output's letters."""
        self.values = {f"operands.{i}": operand for i, operand in enumerate(operands)}
        self.letters, self.output = _letters(equation)
        self.axis = next(letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in equation)
        return torch.einsum(equation, *operands)

    def _of(self, name: str, x: Tensor) -> tuple[str, Tensor]:
        """An operand's letters, with the axis of tangents if x has it."""
        own = self.letters[int(name.split(".")[1])]
        return (self.axis + own if x.dim() > len(own) else own), x

    def _call(self, parts: list[tuple[str, Tensor]], output: str) -> Tensor:
        lead = self.axis if any(letters.startswith(self.axis) for letters, _ in parts) else ""
        return torch.einsum(f"{','.join(letters for letters, _ in parts)}->{lead}{output}", *(x for _, x in parts))

    def _back(self, d: Tensor, at: Mapping[str, Tensor], wanted: Names) -> dict[str, Tensor]:
        """The derivatives of the wanted operands, the others being those of ``at``."""
        side = (self.axis + self.output if d.dim() > len(self.output) else self.output), d
        out = {}
        for name in wanted:
            others = [other for other in self.values if other != name]
            if all(other in at for other in others):
                parts = [side, *(self._of(other, at[other]) for other in others)]
                out[name] = self._call(parts, self.letters[int(name.split(".")[1])])
        return out

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d with the other operand, to the operand's letters."""
        return self._back(d, self.values, wanted)

    def jvp(self, t: Tangents) -> Tensor:
        """Each operand's tangent in its place, added up."""
        parts = [
            self._call([self._of(n, tangent if n == name else x) for n, x in self.values.items()], self.output)
            for name, tangent in t.items()
        ]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """d with the other operand's tangent."""
        if len(self.values) == 1:
            return {}
        d, t = matched(d, len(self.output), t, self.values)
        found = self._back(d, t, wanted)
        return {name: without(part, self.values[name].dim()) for name, part in found.items()}

    def tangent_param_vjp(self, t: Tangents, r: Tensor, wanted: Names) -> dict[str, Tensor]:
        """The same, in float32 for half precision."""
        if r.dtype in HALF:
            r, t = wide(r), {name: wide(part) for name, part in t.items()}
        return self.curvature(r, t, wanted)

    def multiply_adds(self) -> int:
        """The product of all letters' sizes."""
        sizes: dict[str, int] = {}
        for own, x in zip(self.letters, self.values.values(), strict=True):
            sizes |= dict(zip(own, x.shape, strict=True))
        return product(sizes.values()) if len(self.values) > 1 else 0


def _letters(equation: str) -> tuple[list[str], str]:
    """The operands' letters and the output's (in alphabetical order, those that occur once, where it is implied)."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    if not arrow:
        right = "".join(sorted(letter for letter in set(left) - {","} if left.count(letter) == 1))
    return left.split(","), right
