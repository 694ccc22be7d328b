"""Real `cache-builder build` processes, and what their folders hold, for tests of several workers on one cache."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).parents[2]
SITECUSTOMIZE = """
import os, time
sync = os.fsync
os.fsync = lambda descriptor: (time.sleep({seconds}), sync(descriptor))[1]
"""


def slow_disk(folder: Path, seconds: float) -> dict[str, str]:
    """Environment of Python processes, and of those that they start, for which every sync takes that much longer.

    A shard takes many: whoever waits for the n-th one finds the build still at work, however late it is told.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE.format(seconds=seconds))
    return {"PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT)))}


def start_build(
    flags: list[str], output: Path, environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen[str]:
    """A build of its own process, on the CPU, with one thread."""
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
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
    listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return {int(child): Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode() for child in listed}


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[str] | None = None, patience: float = 300
) -> None:
    """Poll until the condition holds or the process has ended."""
    deadline = time.monotonic() + patience
    while not condition() and (process is None or process.poll() is None) and time.monotonic() < deadline:
        time.sleep(0.002)
