"""What readers would refuse for its size or depth is not written in the first place."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_caches import STORES, some_documents, some_settings, write_cache

from storage_specs import CacheSettings, open_cache, plan, stored_shard, writer, zarr_store
from storage_specs import arrow_store as arrow
from storage_specs.errors import CorpusError, InvalidDocumentError
from storage_specs.strict_json import MAX_DEPTH


def nested(depth: int) -> dict:
    value: dict = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


@pytest.mark.parametrize("store", STORES)
def test_metadata_as_deep_as_readers_bear(tmp_path: Path, store: str) -> None:
    document = some_documents(1)[0]
    most = MAX_DEPTH - 5
    deep = replace(document, metadata=nested(most))
    write_cache(tmp_path / "deep", [deep], some_settings(store))
    assert open_cache(tmp_path / "deep")[0].metadata == deep.metadata
    for value in ({"metadata": nested(most + 1)}, {"metadata": nested(600)}):
        with pytest.raises(InvalidDocumentError, match="nested deeper than 60"):
            write_cache(tmp_path / "deeper", [replace(document, **value)], some_settings(store))


@pytest.mark.parametrize("store", STORES)
def test_messages_and_metadata_of_a_shard(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stored_shard.MAX_HEADER_BYTES == 1 << 28
    for module in (zarr_store, arrow):
        monkeypatch.setattr(module, "MAX_HEADER_BYTES", 100)
    with pytest.raises(InvalidDocumentError, match=r"messages and metadata have .* use smaller shards"):
        write_cache(tmp_path, some_documents(3), some_settings(store))


def test_commit_records_and_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(writer, "MAX_BYTES", 1000)
        with pytest.raises(InvalidDocumentError, match="too many for one commit record; use smaller shards"):
            write_cache(tmp_path / "record", some_documents(3), some_settings())
    monkeypatch.setattr(plan, "MAX_BYTES", 1000)
    with pytest.raises(CorpusError, match=r"too many for one cache .* merge them"):
        write_cache(tmp_path / "plan", some_documents(3), some_settings())


def test_large_shards_have_few_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A footer must stay small, so row groups grow with the shard."""
    monkeypatch.setattr(arrow, "ROWS_PER_GROUP", 1)
    monkeypatch.setattr(arrow, "MOST_GROUPS", 4)
    settings: CacheSettings = some_settings("arrow")
    documents = some_documents(40)
    write_cache(tmp_path, documents, settings, documents_per_shard=40)
    groups = pq.read_metadata(tmp_path / "shards/000000.parquet").num_row_groups
    assert 2 <= groups <= 5
    assert len(list(open_cache(tmp_path))) == 40
