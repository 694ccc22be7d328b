"""An object store's client in a process of its own: for forked children, in which the parent's client is dead.

obstore's threads live in Rust, once per process, and do not survive a fork: in the child every call would wait for
ever. So there the work is handed to a fresh interpreter (`client_process_main`). Spawned processes and threads need
none of this.
"""

import functools
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from storage_specs.errors import StoreUnavailableError

_started_in: int | None = None  # the process whose threads obstore uses


def starting() -> None:
    """Note that this process uses a client, before it opens its first one."""
    global _started_in
    if _started_in is None:
        _started_in = os.getpid()


def in_living_process(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of Objects that runs here, or in a forked child by `ClientProcess`."""

    @functools.wraps(method)
    def call(self: Any, *arguments: Any) -> Any:
        if _started_in == os.getpid():
            return method(self, *arguments)
        if self.client_process is None or self.client_process.owner != os.getpid():
            self.client_process = ClientProcess(self.root)
        return self.client_process.call(method.__name__, arguments)

    return call


class ClientProcess:
    """Another interpreter that opens the same URL. Threads take turns."""

    def __init__(self, url: str) -> None:
        self.url, self.owner = url, os.getpid()
        self._lock = threading.Lock()
        home = str(Path(__file__).parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "storage_specs.client_process_main", url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))},
        )
        weakref.finalize(self, _end, self._process)

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """What the method returns there. Raises what it raises there, StoreUnavailableError if the process died."""
        try:
            with self._lock:
                send(self._process.stdin, (method, arguments))
                done, answer = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise StoreUnavailableError(
                f"{self.url}: the process that reads for this forked one ended; start workers by spawn, not by fork"
            ) from None
        if done:
            return answer
        raise answer


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.stdin.close()
    process.wait()
    process.stdout.close()


def send(pipe: IO[bytes], message: Any) -> None:
    """Pickle: both ends are this program, and nothing else holds the pipe."""
    pickle.dump(message, pipe, pickle.HIGHEST_PROTOCOL)
    pipe.flush()
