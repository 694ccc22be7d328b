"""Real `cache-builder build` processes, and what their folders hold, for tests of several workers on one cache."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).parents[2]
SLOW = """
import os, time
from glob import glob
sync = os.fsync
def slow(descriptor):
    time.sleep({seconds})
    while len(glob({records!r})) >= {most} and not os.path.exists({gate!r}):
        time.sleep(0.005)
    return sync(descriptor)
os.fsync = slow
"""
LATE = """
import os, signal, sys, time
change = signal.pthread_sigmask
def late(how, mask):
    while how == signal.SIG_UNBLOCK and not os.path.exists({gate!r}):
        time.sleep(0.005)
    return change(how, mask)
if "spawn_main" in " ".join(sys.orig_argv):
    signal.pthread_sigmask = late
"""


@dataclass(frozen=True)
class Gate:
    """Holds up Python processes with this environment, and those that they start, until it is opened.

    So whoever waits for something finds it so, however late it is told.
    """

    folder: Path
    environment: Mapping[str, str]

    def open(self) -> None:
        (self.folder / "open").touch()


def slow_disk(folder: Path, seconds: float, output: Path, most: int) -> Gate:
    """Every sync takes that much longer, and where the cache at `output` has `most` commit records none ends."""
    return _gate(folder, SLOW, seconds=seconds, records=str(output / "shards" / "*.json"), most=most)


def late_replicas(folder: Path) -> Gate:
    """Processes that multiprocessing spawns stand still before they let interrupts through."""
    return _gate(folder, LATE)


def _gate(folder: Path, code: str, **values: Any) -> Gate:
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code.format(gate=str(folder / "open"), **values))
    return Gate(folder, {"PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT)))})


def start_build(
    flags: list[str], output: Path, environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen[str]:
    """A build of its own process, on the CPU."""
    own = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "cache_builder", "build", *flags, "--output", str(output)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | own | dict(environment),
    )


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by name."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def records(folder: Path) -> list[str]:
    """The commit records that are there."""
    return sorted(file.name for file in folder.glob("shards/*.json"))


def children(process: int) -> dict[int, str]:
    """{process id: command line} of a process's children (Linux)."""
    found = {}
    for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        with suppress(OSError):  # it has ended meanwhile
            found[int(child)] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[str] | None = None, patience: float = 300
) -> None:
    """Poll until the condition holds or the process has ended."""
    deadline = time.monotonic() + patience
    while not condition() and (process is None or process.poll() is None) and time.monotonic() < deadline:
        time.sleep(0.002)
