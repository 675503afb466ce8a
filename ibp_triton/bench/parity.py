"""Whether a gradient is the one it is timed as: against autograd by hand, or the oracle where that computes another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import ibp_triton as ibp
from ibp_triton.bench import by_hand, candidates
from ibp_triton.bench.candidates import METHODS, Case
from ibp_triton.errors import BenchError

Gradients = dict[str, torch.Tensor]
# float32 differs by rounding; bfloat16 keeps 8 bits, and a sign of d_0 or t_K near zero may flip
PARITY = {"fp32": 1e-4, "bf16": 0.2}
NOISE = 3.0  # times autograd's own distance from float64 are allowed beyond that, in networks that magnify rounding
LARGEST = {"fp32": 0.05, "bf16": 0.5}  # a distance beyond which nothing is shown, whatever the noise


def largest(gradients: Gradients) -> float:
    """The largest entry of all parameters, in absolute value."""
    return max(float(g.abs().max()) for g in gradients.values())


def minus(a: Gradients, b: Gradients) -> Gradients:
    """a − b in float64, on a's device."""
    return {name: a[name].double() - b[name].to(a[name].device).double() for name in b}


def apart(a: Gradients, b: Gradients) -> float:
    """The largest entry of a − b over that of b."""
    return largest(minus(a, b)) / largest(b)


def parity(case: Case, method: str | ibp.Method) -> float:
    """How far our gradient is off autograd's, relative to its largest entry.

    A penalty is compared on its own, at a strength that makes it as large as the loss's gradient: at the strengths
    that are trained with, an error in it would vanish beside the loss.
    """
    chosen = METHODS[method] if isinstance(method, str) else method
    return apart(*_sides(case, chosen, _hand(case) if by_hand.applies(case, chosen) else _own_oracle(case)))


@dataclass(frozen=True)
class Verdict:
    """What was found about a method: how far ours is off, what is wrong with ours, what with the one by hand."""

    off: float
    ours: str | None = None
    by_hand: str | None = None


def check(case: Case, method: ibp.Method) -> Verdict:
    """Ours against autograd by hand; where that computes another gradient, fails or disagrees, against the oracle.

    A network that magnifies rounding is compared with float64: there we may be off `NOISE` times as far as autograd,
    and where that shows nothing in bfloat16, float32 must agree too.
    """
    limit, hand, failure = PARITY[case.precision], None, None
    if by_hand.applies(case, method):
        try:
            found, hand = _sides(case, method, _hand(case))
            if apart(found, hand) <= limit:
                return Verdict(apart(found, hand))
        except (RuntimeError, NotImplementedError) as error:  # what torch can't differentiate
            failure = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]:.200}"
    return _against_oracle(case, method, hand, failure)


def _against_oracle(case: Case, method: ibp.Method, hand: Gradients | None, failure: str | None) -> Verdict:
    found, wanted = _sides(case, method, _own_oracle(case))
    off, limit = apart(found, wanted), PARITY[case.precision]
    if off <= limit and hand is None:
        return Verdict(off, by_hand=failure)
    exact = _penalty(case, method)
    noise, from_truth = apart(wanted, exact), apart(found, exact)
    allowed = max(limit, NOISE * noise)
    if hand is not None and (distance := apart(hand, exact)) > allowed:
        failure = f"by hand it is off float64's gradient by {distance:.2g} (the oracle: {noise:.2g})"
    if off <= limit or from_truth <= min(allowed, LARGEST[case.precision]):
        return Verdict(off, by_hand=failure)
    if case.dtype is not None and from_truth <= allowed:
        plain = check(replace(case, precision="fp32"), method)
        return Verdict(off, plain.ours, failure or plain.by_hand)
    text = f"off autograd's gradient by {off:.2g} and float64's by {from_truth:.2g} (autograd: {noise:.2g})"
    return Verdict(off, text, failure)


Gradient = Callable[[ibp.Method], Gradients]


def _seeded(gradient: Gradient) -> Gradient:
    """The same random numbers each time, for methods that draw some."""

    def run(method: ibp.Method) -> Gradients:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            return gradient(method)

    return run


def _ours(case: Case) -> Gradient:
    return _seeded(lambda method: candidates.ours(case, method)()[1])


def _hand(case: Case) -> Gradient:
    return _seeded(lambda method: by_hand.autograd(case, method)()[1])


def _own_oracle(case: Case) -> Gradient:
    """The oracle in the case's own precision."""
    return _seeded(lambda method: _oracle(case, method, case.dtype or torch.float32))


def _strong(method: ibp.Method, expected: Gradient) -> tuple[Any, Gradients]:
    """The method at the strength that makes its penalty as large as the loss, and the loss's gradient."""
    plain = expected(ibp.BP())
    unit = largest(minus(expected(method.at(beta=1.0)), plain))
    if unit == 0:
        raise BenchError(f"the gradient of {method}'s penalty is lost beside the loss's: it can't be compared")
    return method.at(beta=largest(plain) / unit), plain


def _sides(case: Case, method: ibp.Method, expected: Gradient) -> tuple[Gradients, Gradients]:
    """What is compared: ours and what is expected."""
    ours = _ours(case)
    if method.parameter != "beta":
        return ours(method), expected(method)
    strong, plain = _strong(method, expected)
    return minus(ours(strong), ours(ibp.BP())), minus(expected(strong), plain)


def _penalty(case: Case, method: ibp.Method) -> Gradients:
    """What the oracle finds in float64, at the strength that ``_sides`` chooses."""
    exact = _seeded(lambda one: truth(case, one))
    if method.parameter != "beta":
        return exact(method)
    strong, _ = _strong(method, _own_oracle(case))
    return minus(exact(strong), exact(ibp.BP()))


def truth(case: Case, method: str | ibp.Method) -> Gradients:
    """The gradient in float64 by the oracle."""
    chosen = METHODS[method] if isinstance(method, str) else method
    return _oracle(replace(case, device="cpu"), chosen, torch.float64)


def _oracle(case: Case, method: ibp.Method, dtype: torch.dtype) -> Gradients:
    x, labels, tau = case.data()
    tangents = tau.to(dtype) if method.needs_tangents else None
    return ibp.reference.gradients(case.model().to(dtype), method, x.to(dtype), labels, tangents)[1]
