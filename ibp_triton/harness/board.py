"""Epoch metrics for TensorBoard (extra `tensorboard`): one event file a run, beside its other files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ibp_triton.errors import BoardError

Listener = Callable[[dict[str, Any]], None]
METRICS = ("loss", "test_error", "validation_error", "seconds", "cosine", "norm_ratio")


def with_board(listen: Listener, root: Path) -> Listener:
    """A listener that logs every epoch under root/<run>/tensorboard and then calls `listen`; raises BoardError."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BoardError(
            "--tensorboard needs tensorboard; install it with: pip install 'ibp-triton[tensorboard]'"
        ) from error

    def log(event: dict[str, Any]) -> None:
        if event["kind"] == "epoch":
            with SummaryWriter(str(root / event["run"] / "tensorboard")) as writer:
                for name in METRICS:
                    if event.get(name) is not None:
                        writer.add_scalar(name, event[name], event["epoch"])
        listen(event)

    return log
