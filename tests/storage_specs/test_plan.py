"""plan.json: which documents each shard holds, and whose build it is."""

import hashlib
import json

import pytest
from small_caches import some_documents, some_settings

from storage_specs.document import canonical_json, text_document
from storage_specs.errors import (
    ChecksumMismatchError,
    ConfigError,
    CorpusError,
    CorruptCacheError,
    MalformedObjectError,
    SpecVersionError,
    TeachOnceError,
)
from storage_specs.plan import differences, make_plan, plan_from_bytes, plan_to_bytes
from storage_specs.sealed_json import seal


def test_documents_are_cut_in_order() -> None:
    documents = [text_document(f"text {number}") for number in range(7)]
    plan = make_plan(documents, 3)
    assert [list(shard) for shard in plan.shards] == [[0, 1, 2], [3, 4, 5], [6]]
    assert plan.doc_ids == tuple(document.doc_id for document in documents)
    assert plan.doc_ids_of(1) == plan.doc_ids[3:6]


def test_a_document_may_occur_twice() -> None:
    plan = make_plan([text_document("same"), text_document("same")], 1)
    assert plan.doc_ids_of(0) == plan.doc_ids_of(1)


def test_corpus_digest_is_sha256_of_the_json_list_of_ids() -> None:
    plan = make_plan([text_document("a"), text_document("b")], 2)
    expected = '["' + '","'.join(plan.doc_ids) + '"]'
    assert plan.corpus_digest == hashlib.sha256(expected.encode()).hexdigest()
    assert plan.corpus_digest != make_plan([text_document("b"), text_document("a")], 2).corpus_digest


def test_nothing_to_plan() -> None:
    with pytest.raises(CorpusError, match="no documents"):
        make_plan([], 3)
    with pytest.raises(ConfigError, match="documents_per_shard is 0"):
        make_plan([text_document("a")], 0)


def test_plan_survives_its_bytes() -> None:
    plan = make_plan(some_documents(5), 2)
    config = some_settings().config
    data = plan_to_bytes(plan, config)
    assert plan_from_bytes(data) == (plan, config)
    value = json.loads(data)
    assert canonical_json(value) == data
    assert value["documents_per_shard"] == [2, 2, 1]
    # The recipe for readers without our JSON library: cut the digest out of the bytes and hash the rest.
    cut = data.replace(b'"plan_digest":"' + value["plan_digest"].encode() + b'",', b"")
    assert len(cut) < len(data)
    assert hashlib.sha256(cut).hexdigest() == value["plan_digest"]


def test_every_flipped_bit_is_detected() -> None:
    data = plan_to_bytes(make_plan(some_documents(2), 1), some_settings(k_ids=0).config)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(TeachOnceError):
            plan_from_bytes(bytes(damaged))


def test_other_spelling_of_the_same_json_is_refused() -> None:
    data = plan_to_bytes(make_plan(some_documents(2), 1), some_settings().config)
    with pytest.raises(ChecksumMismatchError, match="canonical"):
        plan_from_bytes(json.dumps(json.loads(data)).encode())


@pytest.mark.parametrize("version", [2, 0])
def test_other_versions_are_refused_before_anything_else(version: object) -> None:
    value = json.loads(plan_to_bytes(make_plan(some_documents(2), 1), some_settings().config))
    with pytest.raises(SpecVersionError, match="reads version 1 only"):
        plan_from_bytes(canonical_json(value | {"spec_version": version}))


@pytest.mark.parametrize("version", ["1", None, True])
def test_versions_that_are_none_are_damage(version: object) -> None:
    value = json.loads(plan_to_bytes(make_plan(some_documents(2), 1), some_settings().config))
    with pytest.raises(MalformedObjectError, match="no spec_version"):
        plan_from_bytes(canonical_json(value | {"spec_version": version}))


@pytest.mark.parametrize(
    "change",
    [
        {"documents_per_shard": [2, 2, 2]},
        {"documents_per_shard": [5, 0]},
        {"documents_per_shard": []},
        {"documents_per_shard": "5"},
        {"corpus_digest": "0" * 64},
        {"config": {}},
        {"doc_ids": None},
    ],
)
def test_contradictions_are_refused(change: dict) -> None:
    value = json.loads(plan_to_bytes(make_plan(some_documents(5), 2), some_settings().config)) | change
    del value["plan_digest"]
    with pytest.raises(MalformedObjectError, match=r"plan\.json"):
        plan_from_bytes(seal(value, "plan_digest"))


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"\xff", b'{"a":1e999}', b'{"a":"\\ud800"}', b"[" * 5000])
def test_what_is_no_plan_is_refused(data: bytes) -> None:
    with pytest.raises((CorruptCacheError, SpecVersionError)):
        plan_from_bytes(data)


def test_differences_are_named() -> None:
    documents = some_documents(4)
    first, second = some_settings(k=8), some_settings(k=7, teacher={"name": "tiny", "dtype": "bfloat16"})
    told = differences(make_plan(documents, 2), first.config, make_plan(documents[:3], 1), second.config)
    for part in ("4 documents, not these 3", "per shard: 2, not 1", "k: 8, not 7", "teacher.dtype: 'float32', not 'bf"):
        assert part in told
    assert "tokenizer" not in told
