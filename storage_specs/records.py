"""Where records come from: files, folders, saved `datasets` folders and `datasets` hub names.

A record is a flat mapping of a line, a row or a whole text file, with the place it came from, for error messages.
What the fields mean is `storage_specs.corpus`'s business.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage_specs.errors import CorpusError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
PARQUET_SUFFIXES = (".parquet",)
TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = JSON_SUFFIXES + PARQUET_SUFFIXES + TEXT_SUFFIXES
ROWS_PER_BATCH = 1024


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line, row or text file. `place` is `file:line`, `file:row N` or the file."""

    place: str
    fields: dict[str, Any]


def read_records(corpus: str, split: str | None = None, subset: str | None = None) -> Iterator[Record]:
    """The records of a file, a folder (recursive, in sorted order), a saved `datasets` folder or a hub name.

    Inside a folder, hidden names and other suffixes than `SUFFIXES` are passed over. `split` (train where None) and
    `subset` choose inside `datasets` sources. Raises CorpusError with the place, and for a choice that the source has
    not.
    """
    path = Path(corpus)
    if (path / "dataset_dict.json").is_file():
        _refuse(corpus, "a saved dataset", subset=subset)
        yield from _saved_splits(path, split or "train")
    elif (path / "state.json").is_file():
        _refuse(corpus, "one split of a saved dataset", split=split, subset=subset)
        yield from _saved_dataset(path)
    elif path.exists():
        _refuse(corpus, "a folder of files" if path.is_dir() else "a file", split=split, subset=subset)
        for file in _files_below(path) if path.is_dir() else [path]:
            yield from _file(file)
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", corpus) and not corpus.endswith(SUFFIXES):
        yield from _hub_dataset(corpus, split or "train", subset)
    else:
        raise CorpusError(f"corpus {corpus}: no such file or folder")


def _refuse(corpus: str, what: str, **choices: str | None) -> None:
    """Raises CorpusError where something is chosen."""
    chosen = " and ".join(f"--{name}" for name, value in choices.items() if value)
    if chosen:
        raise CorpusError(f"corpus {corpus}: {what} has nothing for {chosen} to choose: leave it out")


def _files_below(folder: Path) -> list[Path]:
    found = [
        file
        for file in folder.rglob("*")
        if file.name.endswith(SUFFIXES)
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not found:
        raise CorpusError(f"corpus {folder}: no file in this folder ends in one of {', '.join(SUFFIXES)}")
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def _file(path: Path) -> Iterator[Record]:
    try:
        if path.name.endswith(JSON_SUFFIXES):
            yield from _json_file(path)
        elif path.name.endswith(PARQUET_SUFFIXES):
            yield from _parquet_file(path)
        elif path.name.endswith(TEXT_SUFFIXES):
            yield Record(place=str(path), fields={"text": _decode(path.read_bytes(), str(path))})
        else:
            raise CorpusError(f"corpus {path}: its name must end in one of {', '.join(SUFFIXES)}")
    except (OSError, EOFError, zlib.error) as error:  # all three come from damaged .gz files
        raise CorpusError(f"corpus {path}: cannot be read: {error}") from None


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"corpus {place}: invalid UTF-8 at byte {error.start} ({data[error.start : error.start + 1]!r}); "
            "convert the file to UTF-8 (iconv -f latin1 -t utf8 ...)"
        ) from None


def _json_file(path: Path) -> Iterator[Record]:
    first = True
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}:{number}"
            text = _decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, place)
            if not text.strip():
                continue
            if first and text.lstrip().startswith("["):
                yield from _json_array(path, text + _decode(lines.read(), str(path)))
                return
            first = False
            yield Record(place=place, fields=_fields(_json(text, place), place))


def _json_array(path: Path, text: str) -> Iterator[Record]:
    for number, value in enumerate(_json(text, str(path)), start=1):
        place = f"{path}: record {number}"
        yield Record(place=place, fields=_fields(value, place))


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"corpus {place}: not JSON: {error}") from None


def _fields(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CorpusError(f"corpus {place}: expected an object with fields, found {type(value).__name__}")
    return value


def _parquet_file(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _arrow_rows(file.iter_batches(batch_size=ROWS_PER_BATCH), str(path))
    except pa.ArrowException as error:
        raise CorpusError(f"corpus {path}: not a readable Parquet file: {error}") from None


def _arrow_rows(batches: Any, place: str) -> Iterator[Record]:
    row = 0
    for batch in batches:
        try:
            values = batch.to_pylist()
        except UnicodeDecodeError as error:
            raise CorpusError(f"corpus {place}: invalid UTF-8 in rows {row} to {row + len(batch)}: {error}") from None
        for fields in values:
            yield Record(place=f"{place}: row {row}", fields=fields)
            row += 1


def _saved_splits(folder: Path, split: str) -> Iterator[Record]:
    """`DatasetDict.save_to_disk`: one saved dataset per split."""
    splits = _json(_decode((folder / "dataset_dict.json").read_bytes(), str(folder)), str(folder))["splits"]
    if split not in splits:
        raise CorpusError(f"corpus {folder}: no split {split!r}; choose with --split one of {', '.join(splits)}")
    yield from _saved_dataset(folder / split)


def _saved_dataset(folder: Path) -> Iterator[Record]:
    """`Dataset.save_to_disk`: Arrow stream files named by state.json. Read without the `datasets` package."""
    import pyarrow as pa

    try:
        state = _json(_decode((folder / "state.json").read_bytes(), str(folder)), str(folder))
        if state.get("_indices_files"):
            raise CorpusError(f"corpus {folder}: saved with indices; save dataset.flatten_indices() instead")
        for file in state["_data_files"]:
            with pa.OSFile(str(folder / file["filename"])) as source, pa.ipc.open_stream(source) as batches:
                yield from _arrow_rows(batches, str(folder / file["filename"]))
    except (OSError, KeyError, pa.ArrowException) as error:
        raise CorpusError(f"corpus {folder}: not a readable saved dataset: {error}") from None


def _hub_dataset(name: str, split: str, subset: str | None) -> Iterator[Record]:
    try:
        import datasets
    except ImportError:
        raise CorpusError(
            f"corpus {name}: no such file or folder; to read it as a dataset's hub name: pip install datasets"
        ) from None
    try:
        loaded = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # hub, network and format errors of many libraries
        raise CorpusError(f"corpus {name}: no such file or folder, and datasets cannot load it: {error}") from error
    for row, fields in enumerate(loaded):
        yield Record(place=f"{name}[{split}]: row {row}", fields=fields)
