"""Small documents with random rows, and caches of them, for the tests of the format."""

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from storage_specs import CacheSettings, CacheWriter, make_plan
from storage_specs.document import (
    CachedDocument,
    Document,
    chat_document,
    completion_document,
    text_document,
)
from storage_specs.manifest import Manifest
from storage_specs.plan import Plan
from storage_specs.vocabulary import Vocabulary

STORES = ("zarr", "arrow")
ARRAYS = ("segment", "byte_start", "byte_end", "is_end", "gold_logprob", "tail_mass", "probs", "token_ids")
WORDS = ["the ", "naïve ", "日本語", "😀 ", "e\u0301 ", "\r\n", "\0", "teacher ", "a", "  ", "ﬁ", "scored once. "]


def random_document(random: np.random.Generator, *, kind: str = "text", words: int = 8) -> Document:
    """A document of that kind with texts of `words` random words each."""
    contents = ["".join(random.choice(WORDS, size=words)) for _ in range(3)]
    metadata = {"source": "test", "number": int(random.integers(1000)), "Ünï": [None, True, 0.5]}
    if kind == "text":
        return text_document(contents[0], metadata)
    if kind == "completion":
        return completion_document(contents[0], contents[1], metadata)
    roles = ("user", "assistant", "assistant")
    turns = [{"role": role, "content": text, "name": "n"} for role, text in zip(roles, contents, strict=True)]
    return chat_document(turns, metadata)


def with_rows(
    random: np.random.Generator, document: Document, *, k: int = 8, k_ids: int = 4, vocab_size: int = 300
) -> CachedDocument:
    """The document with a random distribution for every token of a random cut of its scored messages."""
    rows: list[tuple[int, int, int, bool]] = []
    for segment, message in enumerate(document.messages):
        if not message.scored:
            continue
        size = message.byte_end - message.byte_start
        inner = np.sort(random.choice(np.arange(1, max(2, size)), size=size // 4, replace=False)) if size > 4 else []
        cuts = [message.byte_start, *(message.byte_start + np.asarray(inner, dtype=int)), message.byte_end]
        rows += [(segment, start, end, False) for start, end in pairwise(cuts)]
        rows.append((segment, message.byte_end, message.byte_end, True))
    count = len(rows)
    segment, byte_start, byte_end, is_end = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    probs_TV = random.dirichlet(np.full(vocab_size, 0.05), size=count).astype(np.float32).reshape(count, vocab_size)
    order_TK = np.argsort(-probs_TV, axis=1)[:, :k]
    probs_TK = np.take_along_axis(probs_TV, order_TK, axis=1)
    return CachedDocument(
        **{item.name: getattr(document, item.name) for item in fields(Document)},
        segment=segment,
        byte_start=byte_start,
        byte_end=byte_end,
        is_end=is_end.astype(bool),
        gold_logprob=-random.exponential(2, count).astype(np.float32),
        tail_mass=np.clip(1 - probs_TK.sum(1, dtype=np.float64), 0, 1).astype(np.float32),
        probs=probs_TK,
        token_ids=order_TK[:, :k_ids].astype(np.int64) if k_ids else None,
    )


def some_documents(count: int, *, seed: int = 0, words: int = 8, **shape: int) -> list[CachedDocument]:
    """Documents of all kinds; number 1 is empty and has no rows."""
    random = np.random.default_rng(seed)
    kinds = ("chat", "text", "completion")
    documents = [random_document(random, kind=kinds[number % 3], words=words) for number in range(count)]
    cached = [with_rows(random, document, **shape) for document in documents]
    if count > 1:
        empty = with_rows(random, text_document("x" * (seed + 1)), **shape)
        cached[1] = CachedDocument(**vars(empty) | {name: rows[:0] for name, rows in arrays_of(empty).items()})
    return cached


def arrays_of(document: CachedDocument) -> dict[str, np.ndarray]:
    """The document's arrays by name, absent ones left out."""
    return {name: getattr(document, name) for name in ARRAYS if getattr(document, name) is not None}


def some_vocabulary(vocab_size: int) -> Vocabulary:
    """Words of all kinds: bytes that are no UTF-8, an empty one, a hole, special tokens."""
    words: list[bytes | None] = [hashlib.sha256(b"%d" % number).digest()[: number % 9] for number in range(vocab_size)]
    words[vocab_size // 2] = None
    return Vocabulary(token_bytes=words, special_roles={0: "bos", vocab_size - 1: "eos"})


def some_settings(
    store: str = "zarr", *, k: int = 8, k_ids: int = 4, vocab_size: int = 300, **more: Any
) -> CacheSettings:
    """Settings of an imagined teacher; `more` replaces fields."""
    values: dict[str, Any] = {
        "teacher": {"name": "tiny", "revision": None, "weights_digest": "ab" * 32, "dtype": "float32"},
        "tokenizer": {"digest": "cd" * 32},
        "chat_template": {"digest": "ef" * 32, "kwargs": {"enable_thinking": False}},
        "engine": {"name": "random", "version": "1"},
        "k": k,
        "k_ids": k_ids,
        "vocab_size": vocab_size,
        "store": store,
        "profile": "half",
        "windows": {"max_model_len": 512, "overlap": 64},
        "vocabulary": some_vocabulary(vocab_size) if k_ids else None,
    }
    return CacheSettings(**(values | more))


def write_cache(
    path: Path, documents: Sequence[CachedDocument], settings: CacheSettings, documents_per_shard: int = 3
) -> Manifest:
    """Write what is missing of a cache, and finish it."""
    plan = make_plan(documents, documents_per_shard)
    writer = CacheWriter(path, settings, plan)
    for shard in writer.missing_shards():
        writer.write_shard(shard, [documents[number] for number in plan.shards[shard]])
    return writer.finalize()


def begun(
    path: Path, store: str = "zarr", shards: int = 2
) -> tuple[CacheWriter, list[CachedDocument], CacheSettings, Plan]:
    """A cache of 7 documents in 3 shards, the first `shards` of them written."""
    documents, settings = some_documents(7), some_settings(store)
    plan = make_plan(documents, 3)
    writer = CacheWriter(path, settings, plan)
    for shard in range(shards):
        writer.write_shard(shard, [documents[number] for number in plan.shards[shard]])
    return writer, documents, settings, plan


def files_of(path: Path) -> dict[str, bytes]:
    """Every file below a folder: {relative name: bytes}."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def assert_stored(written: CachedDocument, read: CachedDocument, *, ids: bool = True) -> None:
    """`read` is what a cache of profile `half` must give back for `written`.

    Everything exactly, but values within half a float16 step, gold log-probabilities within half a step of 2^-10, and
    no ids where the probability is 0.
    """
    for item in fields(Document):
        assert getattr(read, item.name) == getattr(written, item.name), item.name
    assert read.doc_id == written.doc_id
    for name, expected in arrays_of(written).items():
        found = getattr(read, name)
        if name == "token_ids" and not ids:
            assert found is None
            continue
        assert found.dtype == expected.dtype, name
        assert found.shape == expected.shape, name
        if name in ("probs", "tail_mass", "gold_logprob"):
            assert np.abs(found - expected).max(initial=0) < 2**-10
        elif name == "token_ids":
            kept = read.probs[:, : found.shape[1]] > 0
            assert np.array_equal(found, np.where(kept, expected, found[:, :1]))
        else:
            assert np.array_equal(found, expected), name
    assert read.tail_bins is None
    assert np.array_equal(read.probs.sum(1, dtype=np.float64) + read.tail_mass, np.ones(len(read.probs)))
