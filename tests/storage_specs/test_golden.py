"""Golden caches of spec version 1, in git: they read to the values they always had, and are written as they were.

Regenerate (only where the format itself is meant to change): python tests/storage_specs/golden_caches.py
"""

import json
from pathlib import Path

import golden_caches
import numpy as np
import pytest
from golden_caches import FOLDER, NAMES, PROFILES, unpack, values_of, versions

from storage_specs import open_cache, verify_cache
from storage_specs.errors import SpecVersionError
from storage_specs.sealed_json import digest_of

KNOWN = json.loads((FOLDER / "values.json").read_text(encoding="utf8"))


@pytest.mark.parametrize("name", NAMES)
def test_golden_caches_read_to_the_values_they_had(tmp_path: Path, name: str) -> None:
    cache = unpack(name, tmp_path)
    assert values_of(cache) == KNOWN["caches"][name]
    assert verify_cache(cache).problems == ()


@pytest.mark.parametrize("name", NAMES)
def test_one_document_at_a_time_reads_the_same(tmp_path: Path, name: str) -> None:
    cache = open_cache(unpack(name, tmp_path))
    streamed = list(open_cache(tmp_path))
    for number, expected in enumerate(streamed):
        found = cache[number]
        assert (found.text, found.messages, found.metadata) == (expected.text, expected.messages, expected.metadata)
        for column in ("segment", "byte_start", "byte_end", "is_end", "gold_logprob", "tail_mass", "probs"):
            assert np.array_equal(getattr(found, column), getattr(expected, column)), column


@pytest.mark.parametrize("name", NAMES)
def test_the_same_documents_are_written_to_the_same_bytes(tmp_path: Path, name: str) -> None:
    """With the libraries' versions of then; others may compress otherwise, and must still give the same values."""
    written = golden_caches.write(name, tmp_path / "written")
    assert values_of(tmp_path / "written")["values"] == KNOWN["caches"][name]["values"]
    if versions() == KNOWN["versions"]:
        assert written == golden_caches.files_of(unpack(name, tmp_path / "golden"))


def test_both_stores_hold_the_same_values() -> None:
    for profile in PROFILES:
        for ids in ("ids", "no-ids"):
            one, other = (KNOWN["caches"][f"{store}-{profile}-{ids}"]["values"] for store in ("zarr", "arrow"))
            assert one == other


def test_what_they_hold(tmp_path: Path) -> None:
    documents = list(open_cache(unpack("zarr-compact-ids", tmp_path)))
    assert {document.kind for document in documents} == {"chat", "completion", "text"}
    assert any(not document.text for document in documents)
    assert any(document.text and not len(document.segment) for document in documents)
    assert any(document.is_end.any() for document in documents)
    assert any(not document.text.isascii() for document in documents)


def test_they_are_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 200_000


def test_a_newer_spec_version_is_refused(tmp_path: Path) -> None:
    cache = unpack("arrow-compact-ids", tmp_path)
    manifest = json.loads((cache / "manifest.json").read_bytes()) | {"spec_version": 2, "anything": "new"}
    del manifest["cache_id"]
    manifest["cache_id"] = digest_of(manifest)
    (cache / "manifest.json").write_text(json.dumps(manifest))
    expected = r"manifest.json: spec_version is 2, and this teach-once reads version 1 only; install .* a newer one"
    for read in (open_cache, verify_cache):
        with pytest.raises(SpecVersionError, match=expected):
            read(cache)
