"""What a process is told before it trains: one thread of the CPU, and to keep the memory that a step frees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ibp_triton.allocator import keep_freed_memory


@contextmanager
def one_thread() -> Iterator[None]:
    """Each run computes on one thread of the CPU, whatever the process has; freed memory is kept."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
