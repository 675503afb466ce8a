"""The signals that end a command, heard wherever it is."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


@contextmanager
def ended_alike() -> Iterator[None]:
    """TERM and HUP stop a command as Ctrl-C does, unless the system has been told to ignore them (nohup).

    One that comes while Python runs a callback, whose errors it only shows, comes again until it is heard.
    """
    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # no HUP on Windows
    heard = [number for number in ends if signal.getsignal(number) == signal.SIG_DFL]
    for number in heard:
        signal.signal(number, signal.default_int_handler)
    show = sys.unraisablehook
    sys.unraisablehook = partial(_unheard, show)
    try:
        yield
    finally:
        sys.unraisablehook = show
        for number in heard:
            signal.signal(number, signal.SIG_DFL)


def _unheard(show: Callable[[Any], Any], lost: Any) -> None:
    """An error that nobody can catch: a finalizer's, or a weak reference's callback's."""
    stopping = [number for number in signal.Signals if signal.getsignal(number) is signal.default_int_handler]
    if not issubclass(lost.exc_type, KeyboardInterrupt) or not stopping:
        show(lost)
        return
    again = threading.Timer(0.1, _tell, stopping[:1])  # not at once: this is still the callback
    again.daemon = True
    again.start()


def _tell(number: int) -> None:
    """Signal the main thread, which is so woken from what it waits for."""
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, number)
    else:
        signal.raise_signal(number)
