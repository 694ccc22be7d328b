"""Small caches with random rows, and windows and documents from bare lists of rows, for this room's tests."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from random_teacher import save_random_llama

from storage_specs import CacheSettings, CacheWriter, Window, make_plan, render, special_roles, token_bytes
from storage_specs.document import CachedDocument, Message
from storage_specs.reader import Cache
from storage_specs.vocabulary import Vocabulary, tokenizer_digest

Row = tuple[int, int, int, int, bool]  # segment, byte_start, token_start, byte_end, is_end


def _columns(rows: Sequence[Row]) -> list[np.ndarray]:
    numbers = np.array([row[:4] for row in rows], dtype=np.int64).reshape(-1, 4)
    return [*numbers.T, np.array([row[4] for row in rows], dtype=bool)]


def window_of(rows: Sequence[Row], first: int = 0, count: int | None = None) -> Window:
    """Rows `first`..`first + count` as one window whose i-th logits predict its i-th row."""
    segment, byte_start, token_start, byte_end, is_end = _columns(rows)
    part = slice(first, len(rows) if count is None else first + count)
    row_in_segment = np.arange(len(rows)) - np.searchsorted(segment, segment)
    size = len(segment[part])
    return Window(
        ids=np.arange(size + 1),
        logits_index=np.arange(size),
        target_ids=np.arange(1, size + 1),
        segment=segment[part],
        token_start=token_start[part],
        byte_start=byte_start[part],
        byte_end=byte_end[part],
        is_end=is_end[part],
        row_in_segment=row_in_segment[part],
        first_row=first,
    )


def cached_document(rows: Sequence[Row], **more: Any) -> CachedDocument:
    """Teacher rows at these coordinates, in a text of x's; `more` replaces fields."""
    segment, byte_start, _, byte_end, is_end = _columns(rows)
    count, size = len(rows), int(byte_end.max(initial=0))
    fields: dict[str, Any] = {
        "kind": "text",
        "text": "x" * size,
        "messages": (Message(role="text", byte_start=0, byte_end=size, scored=True),),
        "segment": segment,
        "byte_start": byte_start,
        "byte_end": byte_end,
        "is_end": is_end,
        "gold_logprob": np.full(count, -1.0, dtype=np.float32),
        "tail_mass": np.full(count, 0.25, dtype=np.float32),
        "probs": np.tile(np.array([[0.5, 0.25]], dtype=np.float32), (count, 1)),
    }
    return CachedDocument(**(fields | more))


def random_rows_for(sequence: Any, document: Any, k: int, k_ids: int, vocab_size: int, seed: int) -> CachedDocument:
    """A document with random distributions at the coordinates of `sequence`'s scored tokens (those with a prefix)."""
    random = np.random.default_rng(seed)
    scored = sequence.scored.copy()
    if not len(sequence.prefix_ids):
        scored[0] = False
    rows = int(scored.sum())
    probs_TU = random.dirichlet(np.full(vocab_size, 0.05), size=rows).astype(np.float32)
    order_TU = np.argsort(-probs_TU, axis=1)
    probs_TK = np.take_along_axis(probs_TU, order_TU, axis=1)[:, :k]
    return CachedDocument(
        kind=document.kind,
        text=document.text,
        messages=document.messages,
        metadata=document.metadata,
        segment=sequence.segment[scored],
        byte_start=sequence.byte_start[scored],
        byte_end=sequence.byte_end[scored],
        is_end=sequence.is_end[scored],
        gold_logprob=np.log(random.uniform(0.01, 0.9, rows)).astype(np.float32),
        tail_mass=np.clip(1 - probs_TK.sum(1), 0, 1).astype(np.float32),
        probs=probs_TK,
        token_ids=order_TU[:, :k_ids].astype(np.int64) if k_ids else None,
    )


COUNTED = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def counting_text(seed: int, words: int = 24) -> str:
    """Counts up in a circle, by one with probability 0.7, else by two."""
    random = np.random.default_rng(seed)
    steps = np.where(random.random(words) < 0.7, 1, 2)
    return " ".join(COUNTED[place] for place in (random.integers(10) + np.cumsum(steps)) % 10)


def write_counting_cache(path: Path, documents: Sequence[Any], tokenizer: Any, knows: str = "odds") -> Path:
    """A cache of `counting_text`s whose teacher has the student's tokenizer and knows the odds; `shuffled`: the same
    rows at other places of their document; `text`: it is sure of what comes."""
    words = token_bytes(tokenizer)
    numbers = [tokenizer(f"x {word}").input_ids[-1] for word in COUNTED]
    probs_2 = np.array([1, 0] if knows == "text" else [0.69, 0.30], dtype=np.float32)
    cached = []
    for document in documents:
        sequence = render(tokenizer, document)
        likely_T2 = []
        for before, gold in zip(sequence.ids[:-1].tolist(), sequence.ids[1:].tolist(), strict=True):
            place = numbers.index(before) if before in numbers and knows != "text" else None
            likely_T2.append([gold, 0] if place is None else [numbers[(place + step) % 10] for step in (1, 2)])
        ids_T2 = np.array(likely_T2, dtype=np.int64)
        if knows == "shuffled":
            ids_T2 = ids_T2[np.random.default_rng(0).permutation(len(ids_T2))]
        rows = len(ids_T2)
        cached.append(
            CachedDocument(
                kind=document.kind,
                text=document.text,
                messages=document.messages,
                segment=sequence.segment[1:],
                byte_start=sequence.byte_start[1:],
                byte_end=sequence.byte_end[1:],
                is_end=sequence.is_end[1:],
                gold_logprob=np.full(rows, -0.6, dtype=np.float32),
                tail_mass=np.full(rows, 1 - probs_2.sum(), dtype=np.float32),
                probs=np.tile(probs_2, (rows, 1)),
                token_ids=ids_T2,
            )
        )
    vocabulary = Vocabulary(token_bytes=words, special_roles=special_roles(tokenizer))
    shape = {"k": 2, "vocab_size": len(words), "vocabulary": vocabulary, "documents_per_shard": 40}
    return write_rows(path, cached, tokenizer, **shape)


def write_cache(
    path: Path,
    documents: Sequence[Any],
    teacher_tokenizer: Any,
    *,
    k: int = 8,
    k_ids: int = 4,
    vocab_size: int = 300,
    documents_per_shard: int = 4,
    teacher_name: str = "tiny-teacher",
    text: bool = True,
) -> Path:
    """A finished cache of these documents: coordinates of `teacher_tokenizer`, random rows over 300 words."""
    cached = [
        random_rows_for(render(teacher_tokenizer, document), document, k, k_ids, vocab_size, seed)
        for seed, document in enumerate(documents)
    ]
    # Words from the middle of the vocabulary, so that most have a student word; id 0 plays EOS.
    words = [b"<eos>", *token_bytes(teacher_tokenizer)[5000 : 5000 + vocab_size - 1]]
    vocabulary = Vocabulary(token_bytes=words, special_roles={0: "eos"}) if k_ids else None
    return write_rows(
        path,
        cached,
        teacher_tokenizer,
        k=k,
        vocab_size=vocab_size,
        vocabulary=vocabulary,
        documents_per_shard=documents_per_shard,
        teacher_name=teacher_name,
        text=text,
    )


def write_rows(
    path: Path,
    cached: Sequence[CachedDocument],
    teacher_tokenizer: Any,
    *,
    k: int,
    vocab_size: int,
    vocabulary: Vocabulary | None,
    documents_per_shard: int = 4,
    teacher_name: str = "tiny-teacher",
    text: bool = True,
) -> Path:
    """A finished cache of these rows; ids are theirs."""
    first_ids = next((document.token_ids for document in cached), None)
    settings = CacheSettings(
        teacher={"name": teacher_name},
        tokenizer={"digest": tokenizer_digest(teacher_tokenizer)},
        chat_template=None,
        engine={"name": "random"},
        k=k,
        k_ids=0 if first_ids is None else first_ids.shape[1],
        vocab_size=vocab_size,
        windows={"max_model_len": 512, "overlap": 64},
        vocabulary=vocabulary,
        text=text,
    )
    plan = make_plan(cached, documents_per_shard)
    writer = CacheWriter(path, settings, plan)
    for shard, members in enumerate(plan.shards):
        writer.write_shard(shard, [cached[number] for number in members])
    writer.finalize()
    return path


class WithSketch(Cache):
    """An open cache that also holds tail bins: its tail masses, spread over three bins."""

    RANK_EDGES = (8, 20, 80, 300)
    SHARES = np.array([0.5, 0.3, 0.2], dtype=np.float32)

    def __init__(self, cache: Cache) -> None:
        vars(self).update(vars(cache))
        self.manifest = replace(cache.manifest, rank_edges=list(self.RANK_EDGES))
        self.reader = SimpleNamespace(columns=lambda shard: self._with_bins(cache.reader.columns(shard)))

    def _with_bins(self, plain: Any) -> SimpleNamespace:
        def document(number: int) -> CachedDocument:
            found = plain.document(number)
            return replace(found, tail_bins=found.tail_mass[:, None] * self.SHARES)

        return SimpleNamespace(document=document, documents=plain.documents)


def tiny_student(path: Path, tokenizer: Any, seed: int = 0) -> Path:
    """A random two-layer Llama with `tokenizer`, as a Hugging Face folder."""
    save_random_llama(path, tokenizer, seed, pad_token_id=tokenizer.pad_token_id)
    tokenizer.save_pretrained(path)
    return path
