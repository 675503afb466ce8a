"""Smooth activations behind a linear layer: their values, and their slopes, by which the later sweeps multiply."""

# Device code under @triton.jit has no Python types:
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from enum import IntEnum

import triton
import triton.language as tl


class Activation(IntEnum):
    """As operators and kernels take it."""

    NONE = 0
    GELU = 1  # z Φ(z)
    GELU_TANH = 2  # its tanh approximation
    SILU = 3  # z sigmoid(z)


_GELU = tl.constexpr(int(Activation.GELU))
_GELU_TANH = tl.constexpr(int(Activation.GELU_TANH))


@triton.jit
def _sigmoid(z):
    small = tl.exp(-tl.abs(z))  # overflows nowhere
    return tl.where(z < 0, small, 1.0) / (1 + small)


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """σ(z) and σ'(z) of a float32 tile."""
    if ACTIVATION == _GELU:
        gate = 0.5 + 0.5 * tl.math.erf(z * 0.7071067811865476)
        y = z * gate
        slope = gate + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    elif ACTIVATION == _GELU_TANH:  # 1/2 + tanh(u)/2 = sigmoid(2u), u = √(2/π)(z + 0.044715 z³)
        square = z * z
        gate = _sigmoid(z * (1.5957691216057308 + 0.07135481627260025 * square))
        y = z * gate
        slope = gate + y * (1 - gate) * (1.5957691216057308 + 0.21406444881780076 * square)
    else:
        gate = _sigmoid(z)
        y = z * gate
        slope = gate + y * (1 - gate)
    return y, slope


@triton.jit
def _bell(z):
    """sigmoid(z)(1 − sigmoid(z)), whose second factor would lose its digits where z is large."""
    small = tl.exp(-tl.abs(z))
    return small / ((1 + small) * (1 + small))


@triton.jit
def bent(z, ACTIVATION: tl.constexpr):
    """σ''(z) of a float32 tile."""
    if ACTIVATION == _GELU:
        second = 0.3989422804014327 * tl.exp(-0.5 * z * z) * (2 - z * z)
    elif ACTIVATION == _GELU_TANH:
        square = z * z
        twice = z * (1.5957691216057308 + 0.07135481627260025 * square)  # 2u
        rise = 1.5957691216057308 + 0.21406444881780076 * square  # (2u)', and 0.428… z is (2u)''
        second = _bell(twice) * (2 * rise + z * ((1 - 2 * _sigmoid(twice)) * rise * rise + 0.4281288976356015 * z))
    else:
        second = _bell(z) * (2 + z * (1 - 2 * _sigmoid(z)))
    return second
