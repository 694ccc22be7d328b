"""Opens caches in a child process and says how each was refused, in how much time and additional memory.

    measure([Path("bad-cache"), ...], warm_up=[Path("good-cache"), ...]) -> [Refusal, ...]

The child imports everything and reads good caches of both stores first. Memory is the peak of the resident set (VmHWM,
reset before every cache) above what was resident after that warm-up; time is the processor time of the whole process,
which a busy machine stretches little, and then not in all of several readings: the shortest counts.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

REPEATS = 5
TIME_LIMIT = 60.0  # seconds of the wall clock for one cache: a reader that hangs is killed and not refused


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """errors: {way of reading: class of what it raised}, for those of WAYS that raised. message: of the first.

    milliseconds: all ways together. mib: additional peak memory.
    """

    errors: dict[str, str]
    typed: bool
    message: str
    milliseconds: float
    mib: float


def measure(caches: Sequence[Path], warm_up: Sequence[Path]) -> list[Refusal]:
    """Each cache read in one child process, in order. Raises TimeoutExpired where reading hangs."""
    done = subprocess.run(
        [sys.executable, __file__, str(len(warm_up)), *map(str, warm_up), *map(str, caches)],
        capture_output=True,
        text=True,
        timeout=30 + TIME_LIMIT * len(caches),
    )
    if done.returncode:
        raise RuntimeError(f"the reading process ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return [Refusal(**json.loads(line)) for line in done.stdout.splitlines()]


def _one_by_one(path: str) -> None:
    """Random access: some documents, each of a cache opened anew."""
    from storage_specs import open_cache

    for number in range(0, len(open_cache(path)), 2):
        cache = open_cache(path)
        _ = cache[number], cache.vocabulary


def _streamed(path: str) -> None:
    """All documents in order, and the vocabulary."""
    from storage_specs import open_cache

    cache = open_cache(path)
    _ = list(cache), cache.vocabulary, cache.doc_ids


def _verified(path: str) -> None:
    """`cache-builder verify`, whose report must name a problem."""
    from storage_specs import verify_cache
    from storage_specs.errors import CorruptCacheError

    report = verify_cache(path)
    if not report.ok:
        raise CorruptCacheError(report.problems[0])


WAYS = {"one by one": _one_by_one, "streamed": _streamed, "verified": _verified}


def _resident(field: str) -> int:
    """A figure of /proc/self/status in KiB."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def _refusal(path: str, resident: int) -> Refusal:
    from storage_specs.errors import TeachOnceError

    errors: dict[str, Exception] = {}
    taken = []
    _reset_peak()
    for _ in range(REPEATS):
        started = time.process_time()
        for way, read in WAYS.items():
            try:
                read(path)
            except Exception as error:  # what is not typed is a finding, not a crash of the measurement
                errors[way] = error
        taken.append(time.process_time() - started)
    return Refusal(
        errors={way: type(error).__name__ for way, error in errors.items()},
        typed=all(isinstance(error, TeachOnceError) for error in errors.values()),
        message=next((str(error) for error in errors.values()), "")[:400],
        milliseconds=1000 * min(taken),
        mib=max(0, _resident("VmHWM") - resident) / 1024,
    )


def _main(warm_up: list[str], caches: list[str]) -> None:
    for path in warm_up * 2:
        for read in WAYS.values():
            read(path)
    resident = _resident("VmRSS")
    for path in caches:
        print(json.dumps(asdict(_refusal(path, resident))), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    good = int(sys.argv[1])
    _main(sys.argv[2 : 2 + good], sys.argv[2 + good :])
