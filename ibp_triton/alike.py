"""Whether what was made for one step serves another, and how far two ways to the same gradients are apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ibp_triton.compiling import distance


def with_latest(kept: dict[Any, Any], key: Any, value: Any, most: int) -> dict[Any, Any]:
    """The latest entries, at most so many, and this one."""
    return {**dict(list(kept.items())[1 - most :]), key: value}


def in_short(error: Exception) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference of any tensor, relative to its own largest entry or a thousandth of the largest of all."""
    if not expected:
        return 0.0
    least = 1e-3 * max(float(value.double().abs().max()) for value in expected.values() if value.numel())
    return max(distance(found.get(name, torch.zeros(())), value, least) for name, value in expected.items())


def rounded(p: Tensor, by: float, generator: torch.Generator) -> Tensor:
    """Every number moved by up to so much of itself, at random: a few last bits tell what rounding does to a step."""
    return p.detach().clone().mul_(1 + by * (2 * torch.rand(p.shape, generator=generator) - 1).to(p))


def kind_of(a: Any) -> Any:
    """Of an argument: a tensor's shape, dtype, device and strides, of anything else what it is."""
    if isinstance(a, Tensor):
        return tuple(a.shape), a.dtype, a.device, a.stride()
    return type(a), plain(a)


def settings(module: Any) -> tuple[Any, ...]:
    """The modes and plain attributes of a module and those inside it, and whether it has hooks."""
    if not isinstance(module, nn.Module):
        return ()
    return tuple(
        (id(m), *((k, plain(v)) for k, v in vars(m).items() if k not in ("_parameters", "_buffers", "_modules")))
        for m in module.modules()
    )


def flags() -> tuple[Any, ...]:
    """torch's switches that choose between kernels."""
    cudnn: Any = torch.backends.cudnn  # its settings are made at run time
    precisions = (torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)
    return *precisions, cudnn.enabled, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()


def plain(value: Any) -> Any:
    """A number, a flag, a string or a tuple of them as it is, of anything else which object it is."""
    if isinstance(value, (int, float, str, bool, type(None), torch.dtype, torch.device)):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(plain(v) for v in value)
    if isinstance(value, dict):
        return tuple((k if isinstance(k, (int, str)) else id(k), plain(v)) for k, v in value.items())
    return id(value)
