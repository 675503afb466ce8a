"""What is refused, each with a smallest model that shows it: the message says what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ibp_triton as ibp

Code = Callable[[Tensor], Tensor]


class Body(nn.Module):
    """x [N, 6] → logits around a piece of code."""

    def __init__(self, code: Code) -> None:
        super().__init__()
        self.one, self.two, self.code = nn.Linear(6, 6), nn.Linear(6, 5), code

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.code(self.one(x)))


class Doubling(torch.autograd.Function):
    """Ours, with the parameter itself among its arguments."""

    @staticmethod
    def forward(ctx, x, w):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        x, w = ctx.saved_tensors
        return g * w, g * x


class Dirty(torch.autograd.Function):
    """In place."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return 2 * g


class Custom(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.two(Doubling.apply(self.one(x), self.one.bias))


@dataclass(frozen=True)
class Refusal:
    """What, and the call that is refused."""

    what: str
    run: Callable[[], object]

    def message(self) -> str:
        """What the user reads."""
        try:
            self.run()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        raise AssertionError(f"{self.what} is not refused any more")


def _step(model: nn.Module, method: ibp.Method | None = None, **settings: object) -> Callable[[], object]:
    def run() -> object:
        torch.manual_seed(0)
        x, labels = torch.randn(3, 6), torch.tensor([0, 4, 2])
        return (method or ibp.LossIBP(0.1)).gradients(ibp.Network(model, **settings), x, labels)  # type: ignore[arg-type]

    return run


def _hooked(x: Tensor) -> Tensor:
    x.register_hook(lambda g: 2 * g)
    return x


def _distances(x: Tensor) -> Tensor:
    return torch.cdist(x, torch.ones(6, 6), p=3.0)


def _cast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return (x @ torch.eye(6)).float()


class Detached(Body):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Pair(Body):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x


REFUSALS = [
    Refusal("a model wrapped for data parallelism", lambda: ibp.Network(nn.DataParallel(Body(torch.tanh)))),
    Refusal("a compiled model", lambda: ibp.Network(torch.compile(Body(torch.tanh)))),  # type: ignore[arg-type]
    Refusal("autocast inside forward", _step(Body(_cast))),
    Refusal("a hook on an activation", _step(Body(_hooked))),
    Refusal("memory of an activation given another shape", _step(Body(lambda x: x.clone().resize_(3, 6)))),
    Refusal("logits without history", _step(Detached(torch.tanh))),
    Refusal("several results, of which none is called logits", _step(Pair(torch.tanh))),
    Refusal(
        "a custom function that takes a parameter, in another dtype", _step(Custom(torch.tanh), dtype=torch.bfloat16)
    ),
    Refusal("a custom function in place", _step(Body(Dirty.apply))),
    Refusal("a function without a second derivative, but in BP, AT and Fast AT", _step(Body(_distances))),
]
