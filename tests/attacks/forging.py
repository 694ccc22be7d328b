"""Alters the bytes of a cache and seals it again, so that every size, checksum and digest fits what a forger wrote.

A forged cache gets past every test for accidents; what refuses it are limits, types and rules. `write_bytes` and
`edit_json` alter objects; `seal_again` then describes them anew in records, shard table and manifest.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage_specs.checksum import crc32c
from storage_specs.sealed_json import seal

DIGEST_FIELDS = {"manifest.json": "cache_id", "plan.json": "plan_digest"}


def digest_field(name: str) -> str | None:
    """The field that seals a JSON object of the cache."""
    return DIGEST_FIELDS.get(name, "record_digest" if name.startswith("shards/") and name.count("/") == 1 else None)


def edit_json(cache: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the fields of a JSON object, sealed or not, in place."""
    value = json.loads((cache / name).read_bytes())
    field = digest_field(name)
    if field is not None:
        del value[field]
    change(value)
    (cache / name).write_bytes(json.dumps(value).encode() if field is None else seal(value, field))


def described(cache: Path, name: str) -> dict[str, Any]:
    """What is said of an object as it is now."""
    data = (cache / name).read_bytes()
    return {"name": name, "size": len(data), "crc32c": crc32c(data)}


def parts_of(cache: Path, name: str, parts: list[list[int]]) -> list[list[int]]:
    """The parts with the checksums of the object as it is now; one part where their sizes no longer add up."""
    data = (cache / name).read_bytes()
    sizes = [size for size, _ in parts]
    if sum(sizes) != len(data):
        sizes = [len(data)]
    ends = np.cumsum(sizes)
    return [[size, crc32c(data[end - size : end])] for size, end in zip(sizes, ends.tolist(), strict=True)]


def seal_again(cache: Path, change_table: Callable[[list[dict[str, Any]]], None] | None = None) -> None:
    """Describe all objects as they are now: in records, then in the shard table, then in the manifest."""

    def describe(value: dict[str, Any]) -> None:
        there = [item for item in value["objects"] if (cache / item["name"]).exists()]
        value["objects"] = [described(cache, item["name"]) if item in there else item for item in value["objects"]]
        names = {item["name"] for item in there}
        value["parts"] = {name: parts_of(cache, name, parts) for name, parts in value["parts"].items() if name in names}

    for record in sorted((cache / "shards").glob("*.json")):
        edit_json(cache, f"shards/{record.name}", describe)
    edit_table(cache, change_table or (lambda shards: None))


def edit_table(cache: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Bring the shard table up to its records, change its rows, and seal the manifest over it."""
    table = pq.read_table(cache / "shards.parquet")
    shards = table.to_pylist()
    for number, shard in enumerate(shards):
        name = f"shards/{number:06d}.json"
        objects = json.loads((cache / name).read_bytes())["objects"]
        shard["objects"] = [*objects, described(cache, name)]
    change(shards)
    pq.write_table(
        pa.Table.from_pylist(shards, schema=table.schema),
        cache / "shards.parquet",
        compression="zstd",
        use_dictionary=False,
    )
    seal_manifest(cache)


def seal_manifest(cache: Path, change: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Describe plan, shard table and vocabulary as they are now, and change the manifest."""

    def describe(value: dict[str, Any]) -> None:
        for key in ("plan", "shards", "documents", "vocabulary"):
            if value[key] is not None:
                value[key] = described(cache, value[key]["name"])
        if change is not None:
            change(value)

    edit_json(cache, "manifest.json", describe)


def forge_object(cache: Path, name: str, data: bytes) -> None:
    """Exchange one object of a shard, and make everything that describes it fit."""
    (cache / name).write_bytes(data)
    seal_again(cache)
