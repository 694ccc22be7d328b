"""Every field of every JSON object replaced by values of other types, under digests that fit: typed errors, or none."""

import json
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_caches import some_documents, some_settings, write_cache

sys.path.insert(0, str(Path(__file__).parents[1] / "attacks"))

from forging import described, digest_field, seal_manifest

from storage_specs import open_cache, verify_cache
from storage_specs.errors import TeachOnceError
from storage_specs.sealed_json import seal

VALUES = (None, "x", -1, 2**70, 1.5, [], {}, True, [None], {"a": 1}, [[1, 2]], "9" * 5000)


def places(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """The way to every field, and to the first entry of every list."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*place, key)
        yield from places(item, (*place, key))


def replaced(value: Any, place: tuple, new: Any) -> Any:
    value = deepcopy(value)
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = new
    return value


def read(cache: Path) -> None:
    """One document, all of them, the vocabulary, the ids; then verify, whose own way must be typed too."""
    for way in (lambda: open_cache(cache)[0], lambda: list(open_cache(cache)), lambda: verify_cache(cache)):
        try:
            way()
        except TeachOnceError:
            continue


@pytest.mark.parametrize("name", ["manifest.json", "plan.json", "shards/000000.json"])
def test_no_value_of_another_type_escapes(tmp_path: Path, name: str) -> None:
    write_cache(tmp_path, some_documents(2), some_settings("arrow", k_ids=0))
    value = json.loads((tmp_path / name).read_bytes())
    field = digest_field(name)
    del value[field], value["spec_version"]
    tried = 0
    for place in places(value):
        for new in VALUES:
            (tmp_path / name).write_bytes(seal(replaced(value, place, new), field))
            if name.startswith("shards/"):
                _describe_record(tmp_path, name)
            elif name == "plan.json":
                seal_manifest(tmp_path)
            read(tmp_path)
            tried += 1
    assert tried > 100


def _describe_record(cache: Path, name: str) -> None:
    """Make the shard table and the manifest fit the record as it is now."""
    table = pq.read_table(cache / "shards.parquet")
    shards = table.to_pylist()
    shards[0]["objects"][-1] = described(cache, name)
    changed = pa.Table.from_pylist(shards, schema=table.schema)
    pq.write_table(changed, cache / "shards.parquet", compression="zstd", use_dictionary=False)
    seal_manifest(cache)
