"""The interface of a layer: one torch operation, evaluated once, and its derivatives.

Notation (METHODS section of the README): ``a`` activations, ``d`` derivatives of the summed loss with respect to them,
``t`` tangents (the linearised forward sweep), ``r`` any reverse derivative (``d`` or ``e``).

Shape law: an operand or output of shape S has derivatives and tangents of shape S, or [T, *S] when T tangent vectors
travel together. Every derivative is per sample: nothing here divides by the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ibp_triton.graph import Node

Tangents = Mapping[str, Tensor]
Names = Collection[str]
HALF = (torch.bfloat16, torch.float16)


class Uncovered(Exception):  # noqa: N818 - a signal, not an error
    """What a rule's ``forward`` raises for a call that shows by its numbers' shape that it is none of the rule's."""


class Pieces(dict[int, Any]):
    """The derivative or tangent of a tuple: {position: derivative}, zero where absent."""


class Layer:
    """One evaluated operation f(operands). A new object each time: what a sweep saves belongs to the sweep's trace.

    Operands are called by the names of ``forward``'s arguments, the entries of a list argument ``name.0``, ``name.1``…
    """

    forward: Any  # forward(*args, **kwargs) -> Tensor, with the argument names of the torch function it stands for
    label: ClassVar[str] = ""
    shapes_only: ClassVar[tuple[str, ...]] = ()  # attributes of whose numbers nothing is read after ``forward``
    spared: str | None = None  # the operand whose numbers weight gradients alone read, so that ``spare`` can be asked
    heavy = False  # whether it keeps what is larger than its operands and result, and BP does not
    input: Any  # its first operand, of a layer that keeps it
    dear = False  # whether ``again`` makes later sweeps over the layer dearer, so that no more than one is to come
    watched = False  # whether a model's hooks shall see the derivative that comes back here
    sloped_by: Layer | None = None  # the layer by whose slope ``vjp`` multiplies besides: see ``Node.sloped_by``
    follows = False  # whether ``after`` makes the output's numbers anew from those of its operand ``input``

    def __init__(self, node: Node) -> None:
        self.node = node

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """Whether this rule covers a call.

        Args:
            kinds: of each operand that is a tensor: "active" (depends on x), "parametric" (on parameters, not on x) or
                "constant".
            arguments: all arguments by ``forward``'s names, defaults included; tensors of other nodes are references.
        """
        return True

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """f~: the derivatives of ⟨d, f⟩ with respect to the wanted operands, [T, *S] for d of [T, *S_out]."""
        raise NotImplementedError

    def jvp(self, t: Tangents) -> Tensor:
        """f~~: the tangent of the output for these tangents of the operands (an operand not named has none)."""
        raise NotImplementedError

    def tangent_param_vjp(self, t: Tangents, r: Tensor, wanted: Names) -> dict[str, Tensor]:
        """∇_w ⟨r, Df(a; w)[t]⟩ for the wanted parametric operands, summed over tangents; absent where zero."""
        return {}

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """∇_a ⟨d, Df(a; w)[t]⟩ for the wanted active operands, summed over tangents; absent where zero."""
        return {}

    def let_go_of_numbers(self) -> None:
        """Keep shells of what is there for its shape alone."""
        for name in self.shapes_only:
            setattr(self, name, _shells(getattr(self, name)))

    def let_go_of_bends(self) -> None:
        """Let go, after a reverse sweep, of what only the curvature would read."""

    def again(self) -> Callable[[], Tensor] | None:
        """What makes the output's numbers anew, if there is such; from now on the layer keeps what that takes."""
        return None

    def after(self, source: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """What makes the output's numbers anew from what makes the input's; here of views, which are their own jvp."""
        return lambda: self.jvp({"input": source()})

    def spare(self, source: Callable[[], Tensor]) -> None:
        """Keep of the operand ``spared`` the shape, and where weight gradients want the numbers ask for them."""
        raise NotImplementedError

    def weight_gradient(self, shares: Sequence[Share], wanted: Names, batch: int) -> dict[str, Any]:
        """The sum of all shares divided by ``batch``, for the wanted operands; half precision adds in float32."""
        total: dict[str, Any] = {}
        for share in shares:
            for name, part in share.gradient(wanted).items():
                total[name] = summed(total.get(name), scaled(part, share.coefficient / batch))
        return total

    def condensed(self, d: Tensor, pulled: Mapping[str, Any]) -> Any:
        """What may be kept in place of d for the weight gradients that follow, where there is no curvature.

        ``pulled`` is ``vjp(d)``. ``vjp`` and ``tangent_param_vjp`` of parameters take what this returns for d.
        """
        return d

    def multiply_adds(self) -> int:
        """Multiply-adds of one forward evaluation (reverse, linear sweep and weight gradient cost the same each)."""
        return 0


@dataclass(frozen=True, eq=False)
class Share:
    """What one term of a recipe asks of a layer: coefficient · g(activations, right), or that of tangents."""

    coefficient: Any
    layer: Layer  # of the term's own pass
    right: Any
    tangents: Tangents | None  # None: the layer's activations stand on the left

    def gradient(self, wanted: Names) -> dict[str, Any]:
        """Without the coefficient."""
        if self.tangents is None:
            return self.layer.vjp(self.right, wanted)
        return self.layer.tangent_param_vjp(self.tangents, self.right, wanted)

    @property
    def product(self) -> Product:
        """Of a bilinear layer."""
        assert isinstance(self.layer, Bilinear)
        left = self.layer.left if self.tangents is None else self.tangents["input"]
        return Product(self.coefficient, left, self.right, self.tangents is None)


@dataclass(frozen=True, eq=False)
class Product:
    """coefficient · g(left, right), one term of a weight gradient; ``bias``: right counts in the bias's as well."""

    coefficient: Any
    left: Tensor  # [N, ...], or [T, N, ...] with right's T
    right: Tensor
    bias: bool


class Bilinear(Layer):
    """A layer with operands input, weight and bias that is linear in its input and in its weight.

    Its weight gradient g(left, right) is bilinear, so the paper's two terms merge: g(a, d) + β g(t, d) = g(a + βt, d).
    """

    input: Tensor
    weight: Tensor
    source: Callable[[], Tensor] | None = None

    @property
    def left(self) -> Tensor:
        """The input's numbers."""
        return self.input if self.source is None else self.source()

    def spare(self, source: Callable[[], Tensor]) -> None:
        """The input."""
        self.input, self.source = shell(self.input), source

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """The input carries the tangent; weight and bias may be anything that does not depend on x."""
        return kinds.get("input") == "active" and all(k != "active" for n, k in kinds.items() if n != "input")

    def weight_gradient(self, shares: Sequence[Share], wanted: Names, batch: int) -> dict[str, Tensor]:
        """As products, which merge."""
        return self.joint_gradient([share.product for share in shares], wanted, batch)

    def joint_gradient(self, products: Sequence[Product], wanted: Names, batch: int) -> dict[str, Tensor]:
        """The sum of all products divided by ``batch``, for the weight and the bias; half precision adds in float32."""
        out: dict[str, Tensor] = {}
        for product in self.merged(products):
            names = [name for name in wanted if name == "weight" or product.bias]
            for name, part in self.param_vjp(product.left, product.right, names, product.coefficient / batch).items():
                out[name] = out[name] + part if name in out else part
        return out

    def merged(self, products: Sequence[Product]) -> list[Product]:
        """The products with those of one right side made one: c g(a, d) + β g(t, d) = c g(a + (β/c) t, d).

        Not in half precision, where a + βt would round the penalty away (a layer that widens its operands may).
        """
        if self.input.dtype in HALF and not self.widens:
            return list(products)
        groups: dict[tuple[int, int], list[Product]] = {}
        biased: dict[int, int] = {}
        for product in products:
            right = id(product.right)
            biased[right] = biased.get(right, 0) + product.bias  # a bias's sum has one coefficient
            groups.setdefault((right, max(biased[right], 1)), []).append(product)
        return [product for group in groups.values() for product in _merge(group)]

    @property
    def widens(self) -> bool:
        """Whether ``param_vjp`` computes in float32 for half precision."""
        return False

    def param_vjp(self, left: Tensor, d: Tensor, wanted: Names, scale: Any = 1) -> dict[str, Tensor]:
        """scale · g(left, d) for the weight, scale · the sum of d for the bias; ``left`` is a, t, or a + βt.

        Half precision returns float32 where that costs nothing.
        """
        raise NotImplementedError

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """f~ for the input; g and the bias's sum for the parameters."""
        out = {"input": self.input_vjp(d)} if "input" in wanted else {}
        parameters = [name for name in wanted if name != "input"]
        return out | (self.param_vjp(self.left, d, parameters) if parameters else {})

    def input_vjp(self, d: Tensor) -> Tensor:
        """f~ for the input alone."""
        raise NotImplementedError

    def tangent_param_vjp(self, t: Tangents, r: Tensor, wanted: Names) -> dict[str, Tensor]:
        """g(t, r); a bias has no tangent term."""
        return self.param_vjp(t["input"], r, [name for name in wanted if name == "weight"])


def _merge(group: list[Product]) -> list[Product]:
    first, *rest = sorted(group, key=lambda product: not product.bias)  # whose coefficient is that of the bias's sum
    if not divides(first.coefficient):
        return group
    left = first.left if not rest else wide(first.left)
    for other in rest:
        left = plus(left, wide(other.left), over(other.coefficient, first.coefficient))
    return [Product(first.coefficient, left, first.right, first.bias)]


def plus(a: Tensor, b: Tensor, factor: Any) -> Tensor:
    """a + factor · b, for a number without a copy of b."""
    return a + factor * b if isinstance(factor, Tensor) else torch.add(a, b, alpha=factor)


def divides(coefficient: Any) -> bool:
    """Whether others can be taken relative to it: a tensor's number is not known."""
    return not isinstance(coefficient, Tensor) and coefficient != 0


def over(a: Any, b: Any) -> Any:
    """a / b; a itself where b is the number 1."""
    return a if not isinstance(b, Tensor) and b == 1 else a / b


def summed(a: Any, b: Any) -> Any:
    """a + b of derivatives or tangents, None where there is none."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, Pieces):
        return Pieces({k: summed(a.get(k), b.get(k)) for k in {**a, **b}})
    return a + b


def is_one(coefficient: Any) -> bool:
    """Whether it is the number 1, by which nothing needs to be multiplied: a tensor's number is not known."""
    return isinstance(coefficient, int) and coefficient == 1


def scaled(part: Any, scale: Any) -> Any:
    """scale · part, in float32 at least."""
    if isinstance(part, Pieces):
        return Pieces({k: scaled(v, scale) for k, v in part.items()})
    return wide(part) if is_one(scale) else scale * wide(part)


def wide(x: Tensor) -> Tensor:
    """Half precision as float32."""
    return x.float() if x.dtype in HALF else x


def stacked_like_first(parts: Sequence[Tensor]) -> Tensor:
    """[R, ...], each part in the memory format of the first, one behind the other."""
    first = parts[0]
    numel, strides = first.numel(), torch.empty_like(first).stride()
    whole = first.new_empty(len(parts) * numel).as_strided((len(parts), *first.shape), (numel, *strides))
    for own, part in zip(whole, parts, strict=True):
        own.copy_(part)
    return whole


def fold(t: Tensor, value: Tensor) -> Tensor:
    """[T, N, ...] as [T·N, ...]; [N, ...] as it is."""
    return t.flatten(0, 1) if t.dim() > value.dim() else t


def unfold(folded: Tensor, t: Tensor, value: Tensor) -> Tensor:
    """Undo ``fold(t, value)`` on the result of an operation that keeps the batch axis first."""
    return folded.unflatten(0, t.shape[:2]) if t.dim() > value.dim() else folded


def shell(x: Tensor) -> Tensor:
    """A tensor of the same shape, dtype and device without numbers, in the memory of one."""
    return x if wrapped(x) else x.new_empty_strided(x.shape, (0,) * x.dim())


def compact(x: Any) -> Any:
    """A tensor that shows less than half of the memory that it holds, as a copy; anything else as it is."""
    if not isinstance(x, Tensor) or wrapped(x) or 2 * x.numel() * x.element_size() > x.untyped_storage().nbytes():
        return x
    return x.clone()


def _shells(value: Any) -> Any:
    if isinstance(value, Tensor):
        return shell(value)
    if isinstance(value, dict):
        return {name: _shells(part) for name, part in value.items()}
    return [_shells(part) for part in value] if isinstance(value, (list, tuple)) else value


def lift(t: Tensor, value: Tensor, rank: int) -> Tensor:
    """Tangent [T, *S] of a value of shape S, given ones so that it broadcasts against [T, *S_out] of that rank."""
    if t.dim() == value.dim() or value.dim() == rank:
        return t
    return t.reshape(t.shape[0], *([1] * (rank - value.dim())), *value.shape)


def from_end(axis: int, value: Tensor) -> int:
    """An axis of a value counted from the end, as it is found in tangents too; a single number has none."""
    if value.dim() == 0:
        raise Uncovered
    return axis if axis < 0 else axis - value.dim()


def axes_from_end(axes: Any, value: Tensor) -> list[int]:
    """An axis, several, or all if none is named, counted from the end and in order."""
    some = [axes] if isinstance(axes, int) else list(axes or range(value.dim())) or [0]
    return sorted(from_end(axis, value) for axis in some)


def broadcast(t: Tensor, output: Tensor) -> Tensor:
    """The tangent of an output, from one of an operand that may have been broadcast to it in front."""
    return t.expand((*t.shape[: max(0, t.dim() - output.dim())], *output.shape))


def sum_to(d: Tensor, value: Tensor, rank: int) -> Tensor:
    """Sum [*S_out] or [T, *S_out] (output rank ``rank``) over the axes along which ``value`` was broadcast."""
    extra = d.dim() - rank
    shape = [1] * (rank - value.dim()) + list(value.shape)
    axes = [extra + i for i, n in enumerate(shape) if n == 1 and d.shape[extra + i] != 1]
    if axes:
        d = d.sum(axes, keepdim=True)
    return d.reshape((*d.shape[:extra], *value.shape))


def matched(d: Tensor, rank: int, t: Tangents, values: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """A derivative and tangents that both have an axis of tangents or both have none.

    What is bilinear in the two and summed over tangents needs of the other side only its sum.
    """
    batched = {name: part.dim() > values[name].dim() for name, part in t.items()}
    if d.dim() > rank and all(batched.values()):
        return d, dict(t)
    return without(d, rank), {name: part.sum(0) if batched[name] else part for name, part in t.items()}


def without(d: Tensor, rank: int) -> Tensor:
    """Sum away what ``d`` has in front of ``rank`` axes."""
    return d.sum(0) if d.dim() > rank else d


def each(function: Callable[[Tensor], Tensor], t: Tensor, rank: int) -> Tensor:
    """``function`` of one tangent after the other, joined along their axis in the memory format they have."""
    if t.dim() == rank:
        return function(t)
    parts = [function(one) for one in t.unbind(0)]
    return torch.cat(parts).unflatten(0, (len(parts), parts[0].shape[0])) if rank else torch.stack(parts)


def wrapped(*values: Any) -> bool:
    """Whether a value is inside torch.func.vmap, where some of torch's backward kernels have no batching rule."""
    if torch._C._functorch.maybe_current_level() is None:
        return False
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(isinstance(x, Tensor) and is_wrapped(x) for x in values)


def without_tangents(d: Tensor, value: Tensor) -> Tensor:
    """Sum a leading axis of tangents away, if there is one."""
    return d.sum(0) if d.dim() > value.dim() else d


def product(numbers: Collection[int]) -> int:
    """The product of sizes, 1 for none."""
    return math.prod(numbers)


def plus_product(fresh: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """fresh + u v, in the place of ``fresh``, which nobody else may hold; torch.func.vmap has no rule for that."""
    return torch.addcmul(fresh, u, v) if wrapped(fresh, u, v) else fresh.addcmul_(u, v)


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels last where x lies so and not otherwise; such kernels as torch has are written for one of the two."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None or wrapped(x) or x.is_contiguous() or x.stride(1) != 1:
        return torch.contiguous_format
    return last
