"""Caches without text: nothing of it is stored, and the corpus gives exactly what was scored, or a typed error."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_caches import (
    STORES,
    assert_stored,
    files_of,
    random_document,
    some_documents,
    some_settings,
    with_rows,
    write_cache,
)

from storage_specs import open_cache, verify_cache
from storage_specs.conversion import convert_cache
from storage_specs.corpus import read_corpus
from storage_specs.diagnosis import diagnose
from storage_specs.document import CachedDocument, Document
from storage_specs.errors import CacheMismatchError, ConfigError, CorpusError
from storage_specs.merging import merge_caches
from storage_specs.repairing import lost_documents, restore
from storage_specs.textless import CorpusTexts, restored, stripped

SECRET = "Grüezi mitenand, a licensed sentence"


def secret_documents() -> list[CachedDocument]:
    """One document of each kind whose text, extra and metadata all hold the same words."""
    random = np.random.default_rng(0)
    documents = []
    for kind in ("text", "completion", "chat"):
        plain = random_document(random, kind=kind)
        text = SECRET + plain.text
        shift = len(SECRET.encode())
        messages = tuple(
            replace(
                message,
                byte_start=message.byte_start + (shift if number else 0),
                byte_end=message.byte_end + shift,
                extra={"name": SECRET} if kind == "chat" else {},
            )
            for number, message in enumerate(plain.messages)
        )
        document = Document(kind=plain.kind, text=text, messages=messages, metadata={"source": SECRET})
        documents.append(with_rows(random, document))
    return documents


def textless(store: str = "zarr"):
    return replace(some_settings(store), text=False)


@pytest.mark.parametrize("store", STORES)
def test_no_byte_of_the_text_is_stored(tmp_path: Path, store: str) -> None:
    documents = secret_documents()
    assert all(SECRET in document.text for document in documents)
    manifest = write_cache(tmp_path / "without", documents, textless(store), documents_per_shard=2)
    assert not manifest.text
    assert manifest.counts["text_bytes"] == 0
    assert manifest.counts["rows"] == sum(len(document.segment) for document in documents)
    write_cache(tmp_path / "with", documents, some_settings(store), documents_per_shard=2)
    assert files_of(tmp_path / "without").keys() <= files_of(tmp_path / "with").keys()
    cache = open_cache(tmp_path / "without")
    for shard in range(2):
        columns = cache.reader.columns(shard)
        assert [document.text for document in columns.documents] == [""] * len(columns.documents)
        assert SECRET not in repr(columns.documents)
    assert verify_cache(tmp_path / "without").ok


@pytest.mark.parametrize("store", STORES)
def test_a_corpus_gives_the_documents_again(tmp_path: Path, store: str) -> None:
    documents = some_documents(7)
    write_cache(tmp_path, documents, textless(store))
    plain = [Document(kind=d.kind, text=d.text, messages=d.messages, metadata=d.metadata) for d in documents]
    cache = open_cache(tmp_path, corpus=[*reversed(plain), random_document(np.random.default_rng(9))])
    for number, written in enumerate(documents):
        assert_stored(written, cache[number])
    for written, read in zip(documents, cache, strict=True):
        assert_stored(written, read)
    copy = pickle.loads(pickle.dumps(cache))
    assert copy[3].text == documents[3].text


def test_a_corpus_file_in_another_order_and_with_more_in_it(tmp_path: Path) -> None:
    """Kinds that the build was told to see in records that allow several; `scored` is the cache's own."""
    records = [
        {"text": "plain", "prompt": "Q", "completion": "A", "id": 1},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "name": "n"}]},
        {"text": "naïve 😀"},
    ]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    corpus = list(read_corpus(str(tmp_path / "corpus.jsonl"), score_roles=("user", "assistant")))
    forced = next(read_corpus(str(tmp_path / "corpus.jsonl"), kind="text", max_documents=1))
    random = np.random.default_rng(0)
    documents = [with_rows(random, document) for document in (forced, *corpus[1:])]
    write_cache(tmp_path / "cache", documents, textless())
    more = [{"text": "another"}, *reversed(records)]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(record) + "\n" for record in more))
    for written, read in zip(documents, open_cache(tmp_path / "cache", corpus=tmp_path / "more.jsonl"), strict=True):
        assert (read.text, read.messages, read.metadata) == (written.text, written.messages, written.metadata)
        assert read.doc_id == written.doc_id
    records[2]["text"] = "naive 😀"
    (tmp_path / "altered.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(CorpusError, match=r"altered\.jsonl: 1 of the cache's 3 documents are not in it"):
        open_cache(tmp_path / "cache", corpus=tmp_path / "altered.jsonl")


def test_without_the_corpus_no_document_is_read(tmp_path: Path) -> None:
    write_cache(tmp_path, some_documents(3), textless())
    cache = open_cache(tmp_path)
    for read in (lambda: cache[0], lambda: cache.shard(0), lambda: next(iter(cache))):
        with pytest.raises(CorpusError, match=r"keeps no texts .*--corpus"):
            read()


@pytest.mark.parametrize("store", STORES)
def test_the_life_of_a_cache_without_text(tmp_path: Path, store: str) -> None:
    """Converted, merged and repaired like any other; never mixed with one that keeps its texts."""
    documents = some_documents(7)
    write_cache(tmp_path / "cache", documents, textless(store))
    before = files_of(tmp_path / "cache")
    other = next(name for name in STORES if name != store)
    convert_cache(tmp_path / "cache", tmp_path / "converted", other)
    convert_cache(tmp_path / "converted", tmp_path / "back", store)
    assert files_of(tmp_path / "back") == before
    write_cache(tmp_path / "more", some_documents(3, seed=1), textless(store))
    merge_caches([tmp_path / "cache", tmp_path / "more"], tmp_path / "merged")
    assert verify_cache(tmp_path / "merged").ok
    write_cache(tmp_path / "texts", some_documents(3, seed=2), some_settings(store))
    with pytest.raises(CacheMismatchError, match="text: False, not True"):
        merge_caches([tmp_path / "cache", tmp_path / "texts"], tmp_path / "mixed")
    for name in ("shards/000001.json", "plan.json"):
        (tmp_path / "cache" / name).unlink()
        restore(diagnose(tmp_path / "cache"))
        assert files_of(tmp_path / "cache") == before
    data = [file for file in (tmp_path / "cache/shards").rglob("*") if file.is_file() and file.suffix != ".json"]
    victim = max(data, key=lambda file: file.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    diagnosis = diagnose(tmp_path / "cache")
    (shard,) = diagnosis.lost_shards
    assert [text for _, text in lost_documents(diagnosis, shard)] == [None] * len(diagnosis.plan.shards[shard])


def test_what_the_teacher_wrote_must_be_kept() -> None:
    with pytest.raises(ConfigError, match="text must be kept where the teacher writes it"):
        replace(some_settings(), text=False, generation={"seed": 0})


def test_stripping_and_restoring() -> None:
    for document in secret_documents():
        plain = Document(kind=document.kind, text=document.text, messages=document.messages, metadata=document.metadata)
        assert restored(stripped(plain), plain) == plain
        assert CorpusTexts([plain], [plain.doc_id])[plain.doc_id] == plain
