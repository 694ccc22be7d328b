"""Ctrl-C while other processes are being started, and in these."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until this is left, and in a process that is started inside until that takes it.

    So one that is interrupted while it still imports says nothing of it. The mask is for them, who inherit it; here
    another thread may be given the signal, for which Python interrupts the main one all the same.
    """
    resource_tracker.ensure_running()  # multiprocessing's own process: starting it would let interrupts through
    came: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    if in_main:
        signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if in_main:
            signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def interrupted_once() -> Iterator[None]:
    """For all that a process does which was started with interrupts held: they come from here on.

    The first one is a KeyboardInterrupt; any other, and all that come behind this, are nothing. A process that is at
    its end would answer them with a traceback: the terminal's, or its parent's, who waits for it no longer.
    """

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, _nothing)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        yield
    finally:
        signal.signal(signal.SIGINT, _nothing)


def _nothing(number: int, frame: object) -> None:
    """Not SIG_IGN: Python complains of an interrupt that it has taken and finds ignored."""
