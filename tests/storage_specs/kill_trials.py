"""Kill a cache's writer at every step that touches the disk, resume, and compare with an uninterrupted build.

    python kill_trials.py zarr FOLDER 9        every 9th step; prints {"steps", "killed", "different"} as JSON

Each trial is a forked process that sends itself SIGKILL right before or right after its n-th fsync, rename, link or
unlink; a second process resumes.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from small_caches import files_of, some_documents, some_settings, write_cache

STEPS = ("fsync", "replace", "link", "unlink")


def build(path: Path, store: str, kill_at: int | None = None, *, after: bool = False) -> int:
    """Build or resume; returns the number of steps. With `kill_at` the process dies at that step."""
    steps = 0

    def counted(real):
        def step(*arguments, **options):
            nonlocal steps
            steps += 1
            if steps == kill_at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*arguments, **options)
            finally:
                if steps == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        return step

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    write_cache(path, some_documents(4), some_settings(store, vocab_size=300), documents_per_shard=2)
    return steps


def in_child(path: Path, store: str, *kill: int, after: bool = False) -> bool:
    """Run `build` in a forked process: whether it was killed."""
    process = os.fork()
    if process == 0:
        try:
            build(path, store, *kill, after=after)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        raise RuntimeError(f"build failed with kill {kill}, after {after}")
    return False


def main(store: str, folder: Path, every: int) -> dict:
    in_child(folder / "whole", store)
    whole = files_of(folder / "whole")
    killed, different, step = 0, [], 1
    finished = False
    while not finished:
        for after in (False, True):
            trial = folder / "trial"
            if in_child(trial, store, step, after=after):
                killed += 1
            else:
                finished = True
            in_child(trial, store)
            if files_of(trial) != whole or (trial / ".writing").exists():
                different.append([step, after])
            shutil.rmtree(trial)
        step += every
    return {"steps": step, "killed": killed, "different": different}


if __name__ == "__main__":
    import pyarrow.parquet  # noqa: F401  loaded once, not in every trial
    import zarr  # noqa: F401

    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
