"""What starts an extra pass: values that say what they are, so that no recipe can mistake one for plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

from ibp_triton.errors import MethodError


@dataclass(frozen=True, eq=False)
class Seed:
    """ψ(u), the start of a sweep. With ``signed`` the numbers are u's own, and stand for sign(u) to their readers."""

    numbers: Tensor
    signed: bool = False

    @property
    def tensor(self) -> Tensor:
        """The seed's numbers as they are meant."""
        return self.numbers.sign() if self.signed else self.numbers

    def _refuse(self, *_: Any) -> NoReturn:
        raise MethodError(
            "a seed is no number to reckon with: a backend may hold it as its sign alone. Scale the coefficient of the "
            "terms instead, beta * g(t, d)"
        )

    __mul__ = __rmul__ = __truediv__ = __add__ = __radd__ = __sub__ = __rsub__ = __neg__ = __getitem__ = _refuse


@dataclass(frozen=True, eq=False)
class Absolute:
    """Numbers of which the absolute values are to be added up."""

    numbers: Tensor


def numbers(seed: Any) -> Any:
    """What a sweep starts with: a signed seed itself, which the layers that read it know, else its tensor."""
    return seed.numbers if isinstance(seed, Seed) and not seed.signed else seed
