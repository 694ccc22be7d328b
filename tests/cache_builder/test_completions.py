"""What the teacher wrote becomes a document: spans, ends, cuts, refusals; and how prompts are read and drawn from.

Legend: G tokens of a completion, K ranks, V vocabulary.
"""

from typing import Any

import numpy as np
import pytest
import torch

from cache_builder.completions import completed
from cache_builder.engines.base import WindowScores
from cache_builder.engines.generating import Generation, StopStrings
from cache_builder.engines.transformers_generate import draw
from cache_builder.prompts import prompt_document
from cache_builder.sampling import Sampling
from storage_specs.document import Document, completion_document
from storage_specs.errors import ConfigError, CorpusError
from storage_specs.generated import generation_record, prompt_of
from storage_specs.records import Record

SMILE = "😀".encode()
WORDS: list[bytes | None] = [b"<end>", b" Paris", b".\n", SMILE[:2], SMILE[2:], b"", None, "é".encode() + SMILE[:1]]
END, PARIS, DOT, HALF, REST, EMPTY, HOLE, MIXED = range(8)


def generation(ids: list[int], finish_reason: str = "stop", ended: bool = False, stop: str | None = None) -> Generation:
    rows = len(ids)
    scores = WindowScores(
        gold_logprob=-np.arange(rows, dtype=np.float32),
        probs=np.tile(np.float32([0.5, 0.25]), (rows, 1)),
        token_ids=np.tile([[1, 2]], (rows, 1)),
        tail_mass=np.full(rows, 0.25, np.float32),
    )
    return Generation(
        ids=np.array(ids, dtype=np.int64), scores=scores, finish_reason=finish_reason, ended=ended, stop_reason=stop
    )


def prompt(text: str = "é: ") -> Document:
    return prompt_of(completion_document(text, "anything", {"source": "here"}))


@pytest.mark.parametrize(
    ("made", "text", "spans", "ends", "reason"),
    [
        (generation([PARIS, DOT, END], ended=True), " Paris.\n", [(0, 6), (6, 8), (8, 8)], 1, "stop"),
        (generation([PARIS, DOT], "length"), " Paris.\n", [(0, 6), (6, 8)], 0, "length"),
        (generation([HALF, REST], "length"), "😀", [(0, 2), (2, 4)], 0, "length"),
        (generation([PARIS, HALF], "length"), " Paris", [(0, 6)], 0, "length"),
        (generation([PARIS, MIXED, HALF], "length"), " Paris", [(0, 6)], 0, "refused"),
        (generation([PARIS, MIXED], "length"), " Paris", [(0, 6)], 0, "length"),
        (generation([HALF], "length"), "", [], 0, "length"),
        (generation([PARIS, DOT], stop="."), " Paris", [(0, 6)], 0, "stop"),
        (generation([PARIS, DOT], stop="is."), " Par", [(0, 4)], 0, "stop"),
        (generation([PARIS, DOT], stop="\n"), " Paris.", [(0, 6), (6, 7)], 0, "stop"),
        (generation([PARIS, MIXED], stop="é"), " Paris", [(0, 6)], 0, "stop"),
        (generation([PARIS, DOT], stop="?"), "", [], 0, "refused"),
        (generation([PARIS, 99], "length"), "", [], 0, "refused"),
        (generation([END], ended=True), "", [], 0, "stop"),
        (generation([PARIS, EMPTY, END], ended=True), " Paris", [(0, 6), (6, 6), (6, 6)], 1, "stop"),
        (generation([PARIS, HOLE]), "", [], 0, "refused"),
        (generation([REST, PARIS]), "", [], 0, "refused"),
        (generation([PARIS, HALF, END], ended=True), "", [], 0, "refused"),
    ],
)
def test_documents_of_completions(
    made: Generation, text: str, spans: list[tuple[int, int]], ends: int, reason: str
) -> None:
    if reason == "refused":
        text, spans = "", []
    document = completed(prompt(), made, WORDS, sample=3, k_ids=1)
    assert document.text == "é: " + text
    assert document.kind == "completion"
    assert [(m.role, m.byte_start, m.byte_end, m.scored) for m in document.messages] == [
        ("prompt", 0, 4, False),
        ("completion", 4, 4 + len(text.encode()), True),
    ]
    assert list(zip(document.byte_start - 4, document.byte_end - 4, strict=True)) == spans
    assert document.is_end.tolist() == [False] * (len(spans) - ends) + [True] * ends
    assert document.segment.tolist() == [1] * len(spans)
    assert document.gold_logprob.tolist() == [-float(row) for row in range(len(spans))]
    assert document.token_ids.shape == (len(spans), 1)
    assert document.unscored_bytes == 0
    about = document.metadata["generation"]
    assert (about["finish_reason"], about["sample"], about["tokens"]) == (reason, 3, len(made.ids))
    assert document.metadata["source"] == "here"
    assert prompt_of(document).doc_id == prompt().doc_id
    assert generation_record([document]) == {"prompt_ids": [prompt().doc_id], "refused": int(reason == "refused")}


def test_rows_of_refused_completions_are_none_and_columns_keep_their_width() -> None:
    document = completed(prompt(), generation([HOLE]), WORDS, sample=0, k_ids=0)
    assert document.probs.shape == (0, 2)
    assert document.token_ids is None


def test_stop_strings_are_found_across_tokens() -> None:
    stop = StopStrings(("STOP", "ab"))
    assert [stop.found(piece) for piece in (b"x", b"S", b"TO", b"P!", b"a")] == [None, None, None, "STOP", None]
    assert stop.found(b"b STOP") == "ab"
    assert StopStrings(()).found(b"anything") is None


USER, OLD = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "old"}


@pytest.mark.parametrize(
    ("fields", "kind", "roles", "text"),
    [
        ({"prompt": "P", "completion": "C", "x": 1}, "completion", ["prompt"], "P"),
        ({"prompt": "P"}, "completion", ["prompt"], "P"),
        ({"messages": [USER, OLD, USER, OLD, OLD]}, "chat", ["user", "assistant", "user"], "HioldHi"),
        ({"prompt": [USER], "completion": [OLD]}, "chat", ["user"], "Hi"),
    ],
)
def test_records_as_prompts(fields: dict[str, Any], kind: str, roles: list[str], text: str) -> None:
    document = prompt_document(Record(place="here:1", fields=fields), set())
    assert (document.kind, [m.role for m in document.messages], document.text) == (kind, roles, text)
    assert not any(message.scored for message in document.messages)
    assert document.metadata == ({"x": 1} if "x" in fields else {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "t"}, "here:1: mode generate needs the field `prompt` or `messages`"),
        ({"messages": [OLD]}, "nothing that the assistant could answer"),
        ({"prompt": 3}, "prompt must be a string"),
        ({"messages": [USER], "tools": [1]}, "`tools` are not rendered"),
    ],
)
def test_records_that_are_no_prompts(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        prompt_document(Record(place="here:1", fields=fields), set())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_k": 3, "top_p": 0.4}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(values: dict[str, Any], expected: list[float]) -> None:
    """3,000 draws: 5 standard deviations of the largest variance are 0.046."""
    order_V = [2, 0, 3, 1]
    logits_V = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[torch.tensor(order_V).argsort()]
    random, counts = torch.Generator().manual_seed(0), np.zeros(4)
    for _ in range(3000):
        counts[order_V.index(draw(logits_V, Sampling(**values), random))] += 1
    np.testing.assert_allclose(counts / 3000, expected, atol=0.046)
    assert (counts[np.array(expected) == 0] == 0).all()


def test_sampling_settings_are_checked_and_seeds_are_their_own() -> None:
    for values, message in (
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"n": 0}, "n is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"n": 2, "temperature": 0.0}, "greedy samples are all the same"),
        ({"stop": ("a", "")}, "empty string"),
    ):
        with pytest.raises(ConfigError, match=message):
            Sampling(**values)
    seeds = {Sampling(seed=seed).seed_of(name, sample) for seed in (0, 1) for name in "ab" for sample in range(3)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert Sampling(seed=1).seed_of("a", 2) == Sampling(seed=1, top_p=0.5).seed_of("a", 2)
