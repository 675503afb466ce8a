"""Where the time of a gradient or an eager step goes, by kind of operator."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

KINDS = ("products", "norms", "softmax", "pools", "copies", "elementwise")
_WORDS = {  # in the name of an operator, tried in turn; what has none is elementwise, sums among them
    "products": ("convolution", "addmm", "mm", "bmm", "dot_product", "linear"),
    "norms": ("batch_norm", "layer_norm", "group_norm"),
    "softmax": ("softmax",),
    "pools": ("pool", "gather", "upsample"),
    "copies": ("clone", "copy", "cat", "stack"),
}
Spent = dict[str, float]  # seconds by kind


class Clock(TorchDispatchMode):
    """CPU seconds of torch's operators by kind."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.process_time()
        result = func(*args, **(kwargs or {}))
        self.seconds[kind(func.overloadpacket.__name__)] += time.process_time() - start
        return result


def kind(name: str) -> str:
    """Of an operator by its name."""
    return next((key for key, words in _WORDS.items() if any(word in name for word in words)), "elementwise")


def spent(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Spent]:
    """Seconds of each call by kind, the median over rounds, in turn."""
    found: dict[str, list[Spent]] = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            with Clock() as clock:
                run()
            found[label].append(clock.seconds)
    return {label: {k: statistics.median(row[k] for row in rows) for k in KINDS} for label, rows in found.items()}
