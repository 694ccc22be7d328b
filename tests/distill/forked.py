"""`distill` in processes that can be killed, forked from one that has imported everything: a start costs no imports."""

import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "distill.commands.train",
        "distill.evaluation.evaluate",
        "distill.train",
        "transformers.models.llama.modeling_llama",
        "transformers.models.llama.configuration_llama",
        "transformers.models.auto.modeling_auto",
    ]
)


class Held:
    """A place where a process stops and waits, so that it is still there, and known where, when a signal comes.

    method: `module:Class.method`; the process stops behind its `calls`-th call, until it is killed or `release`d.
    """

    def __init__(self, method: str, calls: int) -> None:
        self.method, self.calls = method, calls
        self._reached, self._released = CONTEXT.Event(), CONTEXT.Event()

    def wait_until_reached(self, process: ForkServerProcess) -> None:
        while not self._reached.wait(0.1):
            assert process.is_alive(), "ended before it was held"

    def release(self) -> None:
        self._released.set()

    def stand_still(self) -> None:
        """In the process."""
        self._reached.set()
        self._released.wait()

    def install(self) -> None:
        """In the process."""
        module, _, names = self.method.partition(":")
        kind, name = names.split(".")
        owner = getattr(importlib.import_module(module), kind)
        real: Callable[..., Any] = getattr(owner, name)
        left = self.calls

        def held(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            result = real(*arguments, **options)
            left -= 1
            if left == 0:
                self.stand_still()
            return result

        setattr(owner, name, held)


def _distill(arguments: Sequence[str], said: Path, held: Held | None) -> None:
    from distill.main import main
    from storage_specs.command_line import run

    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    if held is not None:
        held.install()
    run(main, arguments)


@contextmanager
def distill(arguments: Sequence[str], said: Path, held: Held | None = None) -> Iterator[ForkServerProcess]:
    """A process of `distill ARGUMENTS`; what it says is appended to the file `said`."""
    with forked(_distill, list(arguments), said, held) as process:
        yield process


@contextmanager
def forked(target: Callable[..., None], *arguments: Any) -> Iterator[ForkServerProcess]:
    """A process of `target(*arguments)`, which must have ended (joined or killed) when this is left."""
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
        process.close()
