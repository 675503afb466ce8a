"""Random streams that depend on a seed and a name alone, so that every method sees the same draws."""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *names: object) -> int:
    """63-bit seed of the stream called `names`: independent of every other name and of when it is asked for."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, *names: object) -> torch.Generator:
    """Generator on the CPU for the stream called `names`; drawing on the CPU gives every device the same numbers."""
    return torch.Generator().manual_seed(derive(seed, *names))
