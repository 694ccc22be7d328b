"""Which run an output folder belongs to, and which of its checkpoints are whole.

`distill.json` in the output folder says what run it is and whether it finished; `distill.json` in a checkpoint is
written after everything else in it has reached the disk, so that a checkpoint without it is never resumed from.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from storage_specs.document import canonical_json
from storage_specs.errors import CheckpointError, OutputFolderError, StorageFullError, TeachOnceError

RECORD = "distill.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# A checkpoint's optimizer: whole, in shards (FSDP), DeepSpeed's.
_OPTIMIZER = ("optimizer*", "global_step*")
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What safetensors and torch.save say when a write fails; neither passes the system's error number on.
_FAILED_WRITE = re.compile(r"I/O error|os error|PytorchStreamWriter|inline_container")


@contextmanager
def saving(target: Path) -> Iterator[None]:
    """Types the errors of writing below `target`: StorageFullError, or OutputFolderError for all but lack of space."""
    try:
        yield
    except TeachOnceError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        is_system = isinstance(error, OSError)
        if not is_system and not _FAILED_WRITE.search(str(error)):
            raise
        if is_system and error.errno not in _OUT_OF_SPACE:
            raise OutputFolderError(
                f"{target}: cannot be written ({error.strerror or error}): make it writable, or name another place"
            ) from error
        raise StorageFullError(
            f"{target}: could not be written for lack of space ({error}); whole checkpoints are kept: free space and "
            "run the same command again"
        ) from error


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record in a folder, or None. Raises CheckpointError (not JSON) and OutputFolderError (not readable)."""
    try:
        return json.loads((folder / RECORD).read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputFolderError(f"{folder / RECORD} cannot be read ({error.strerror}): name another folder") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / RECORD} is not JSON ({error}): remove {folder} and start anew") from None


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record atomically, after all files of the folder have reached the disk. Raises as `saving`."""
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f".{RECORD}"
        scratch.write_bytes(canonical_json(record))
        for path in folder.iterdir():
            if path.is_file():
                _sync(path)
        scratch.replace(folder / RECORD)
        _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin(output_dir: Path, run: dict[str, Any], replaced: Collection[str] = ()) -> bool:
    """Take the output folder for this run, or find it finished. True = there is something left to do.

    replaced: cache_ids that count as this run's, because its cache is a repair of theirs.
    Raises OutputFolderError for a folder of other things, CheckpointError for one of another run (cache, weights, ...).
    """
    record = read_record(output_dir)
    others = []
    if record is None and output_dir.is_dir():
        # A record that was being written when its writer was killed says nothing, and is no reason to refuse.
        others = sorted(path.name for path in output_dir.iterdir() if path.name != f".{RECORD}")
    if others or output_dir.is_file():
        raise OutputFolderError(
            f"--output_dir {output_dir} holds something else ({', '.join(others[:3]) or 'a file'}) and nothing was "
            "touched: name a new or empty folder"
        )
    if record is not None:
        _check_same_run(output_dir, record["run"], run, replaced)
    return record is None or not record["finished"]


def last_whole_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    numbered = checkpoints(output_dir)
    return next((path for path in reversed(numbered) if (path / RECORD).exists()), None)


def check_checkpoint(checkpoint: Path, run: dict[str, Any], replaced: Collection[str] = ()) -> None:
    """Raises CheckpointError unless the checkpoint is whole, belongs to this run and says all that a run goes on from.

    replaced: as of `begin`.
    """
    record = read_record(checkpoint)
    if record is None:
        raise CheckpointError(
            f"checkpoint {checkpoint} has no {RECORD}: it was not written to its end, or not by this Trainer; "
            "leave out --resume_from_checkpoint to resume from the last whole one"
        )
    _check_same_run(checkpoint, record["run"], run, replaced)
    if not any(path for name in _OPTIMIZER for path in checkpoint.glob(name)):
        raise CheckpointError(
            f"checkpoint {checkpoint} holds no optimizer (--save_only_model), so the run cannot go on from it as if "
            "nothing had happened: name another --output_dir, or remove this one, to start anew"
        )


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, oldest first, whole or not."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def remove_old_checkpoints(output_dir: Path, keep: int, spare: str | None) -> None:
    """Remove all but the newest `keep` checkpoints and the one to spare. Call it when the newest is whole."""
    for path in checkpoints(output_dir)[:-keep]:
        if spare is None or path.resolve() != Path(spare).resolve():
            (path / RECORD).unlink(missing_ok=True)  # no longer whole, should the removal be interrupted
            shutil.rmtree(path)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], most: int | None = None) -> str:
    """What tells settings from earlier ones, `name before, now now; ...`; empty where nothing does.

    most: characters of each value.
    """
    return "; ".join(
        f"{name} {repr(before.get(name))[:most]}, now {repr(now.get(name))[:most]}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    )


def _check_same_run(place: Path, before: dict[str, Any], now: dict[str, Any], replaced: Collection[str]) -> None:
    if before.get("cache_id") in replaced:
        before = before | {"cache_id": now["cache_id"]}
    different = differences({name: before.get(name) for name in now}, now)
    if different:
        raise CheckpointError(
            f"{place} belongs to another run ({different}): repeat that run's flags to resume it, or name "
            "another --output_dir (where only cache_id differs and the cache was repaired: --accept_repaired)"
        )
