"""SPEC.md is held to what is written: its readers run, and its tables name what there is."""

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from small_caches import STORES, some_documents, some_settings, write_cache

import storage_specs
from storage_specs import open_cache
from storage_specs.checksum import crc32c

SPEC = (Path(storage_specs.__file__).parent / "SPEC.md").read_text(encoding="utf8")


def reader_of(store: str) -> Callable:
    """The `read_shard` of the spec that imports that store's library."""
    blocks = re.findall(r"(?m)(?:^    .*\n|^\n(?=    ))+", SPEC)
    library = {"zarr": "import json, numpy, zarr", "arrow": "import pyarrow.parquet"}[store]
    (shared,) = [block for block in blocks if "def read_rows" in block]
    (code,) = [block for block in blocks if library in block]
    assert (shared + code).count("\n") < 60
    module = ModuleType("spec_example")
    exec(re.sub("(?m)^    ", "", shared + code), module.__dict__)
    return module.read_shard


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    ("profile", "k", "k_ids"),
    [("exact", 8, 4), ("half", 8, 0), ("compact", 8, 4), ("compact", 40, 4), ("sketch", 8, 4)],
)
def test_the_readers_of_the_spec_read_every_shard(tmp_path: Path, store: str, profile: str, k: int, k_ids: int) -> None:
    documents = some_documents(7, k=k, k_ids=k_ids)
    parameters = {}
    if profile == "sketch":
        parameters = {"rank_edges": [k, 20, 80, 300]}
        shares = np.array([0.7, 0.3, 0], np.float32)
        documents = [replace(document, tail_bins=document.tail_mass[:, None] * shares) for document in documents]
    settings = some_settings(store, k=k, k_ids=k_ids, profile=profile, parameters=parameters)
    manifest = write_cache(tmp_path, documents, settings)
    suffix = {"zarr": ".zarr", "arrow": ".parquet"}[store]
    read_shard = reader_of(store)
    paths = [str(tmp_path / f"shards/{shard:06d}{suffix}") for shard in range(3)]
    read = [document for path in paths for document in read_shard(path, manifest.codec)]
    cached = [document for document in open_cache(tmp_path) if store == "zarr" or len(document.segment)]
    for document, expected in zip(read, cached, strict=True):
        assert (document["kind"], document["text"]) == (expected.kind, expected.text)
        assert document["metadata"] == expected.metadata
        assert [message["byte_end"] for message in document["messages"]] == [m.byte_end for m in expected.messages]
        for name in ("segment", "byte_start", "byte_end", "is_end", "gold_logprob", "tail_mass"):
            assert np.array_equal(document[name], getattr(expected, name)), name
        assert np.array_equal(document["probs"], expected.probs)
        assert profile != "sketch" or np.array_equal(np.float32(document["tail_bins"]), expected.tail_bins)
        assert k_ids == 0 or np.array_equal(document["token_ids"], expected.token_ids)


def test_every_field_of_the_json_objects_is_in_the_spec(tmp_path: Path) -> None:
    write_cache(tmp_path, some_documents(3), some_settings())
    for name in ("manifest.json", "plan.json", "shards/000000.json"):
        for field in json.loads((tmp_path / name).read_bytes()):
            assert f"`{field}`" in SPEC, f"{field} of {name}"


def test_the_checksum_is_the_one_named() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert zlib.crc32(b"123456789") != 0xE3069283
