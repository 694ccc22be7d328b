"""Scoring and writing overlapped: order, documents without windows, look-ahead, and what happens when either fails."""

import threading
import types
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from cache_builder.engines.base import EngineConfig, WindowScores
from cache_builder.pipeline import SHARDS_WAITING, WRITERS, BackgroundWriter, finished_shards, windows_of_shard
from cache_builder.progress import Progress
from storage_specs.document import text_document
from storage_specs.errors import StorageFullError
from storage_specs.windows import Window

K = 2
MOST = WRITERS + SHARDS_WAITING


class Echo:
    """An engine that reads `ahead` windows before it answers the first, with a window's token as its gold value."""

    def __init__(self, ahead: int) -> None:
        self.config = EngineConfig(model="m", dtype="float32", max_model_len=9, k=K, vocab_size=100)
        self.ahead, self.read = ahead, 0

    def score(self, windows: Iterable[Window]) -> Iterator[WindowScores]:
        held = []
        for window in windows:
            self.read += 1
            held.append(window)
            if len(held) > self.ahead:
                yield self.answer(held.pop(0))
        yield from map(self.answer, held)

    def answer(self, window: Window) -> WindowScores:
        return WindowScores(
            gold_logprob=-window.target_ids.astype(np.float32),
            probs=np.full((1, K), 0.5, np.float32),
            token_ids=np.zeros((1, K), np.int64),
            tail_mass=np.zeros(1, np.float32),
        )


def windows_of(document: Any) -> list[Any]:
    """One window, of one row, per digit of the text."""
    one = np.zeros(1, np.int64)
    coordinates = {name: one for name in ("logits_index", "segment", "byte_start", "byte_end")}
    return [
        types.SimpleNamespace(ids=np.zeros(2), target_ids=one + int(digit), is_end=one > 0, **coordinates)
        for digit in document.text
    ]


def scored(jobs: list[Any], engine: Echo, progress: Progress) -> Iterator[Any]:
    cutter = types.SimpleNamespace(windows=windows_of)
    opening = partial(windows_of_shard, cutter=cutter, k=K, k_ids=1, bins=None)
    return finished_shards(jobs, opening, engine.score, progress)


@pytest.mark.parametrize("ahead", [0, 1, 3, 100])
def test_rows_come_back_to_their_documents(ahead: int) -> None:
    texts = [["", "12", ""], ["3"], ["", ""], ["", "456", "7", ""]]
    jobs = [(10 + number, [text_document(text) for text in shard]) for number, shard in enumerate(texts)]
    with Progress(1, 0, len(jobs)) as progress:
        found = list(scored(jobs, Echo(ahead), progress))
        assert list(progress.scored) == [4, 2, 0, 8]
    assert [opened.shard for opened, _ in found] == [10, 11, 12, 13]
    for (_, documents), shard in zip(found, texts, strict=True):
        assert [document.text for document in documents] == shard
        assert [(-document.gold_logprob).tolist() for document in documents] == [
            list(map(float, text)) for text in shard
        ]
    assert sum(opened.work.tokens for opened, _ in found) == 14
    assert sum(opened.work.windows_cut for opened, _ in found) == 3


def test_the_next_shards_windows_are_queued_before_a_shard_is_complete() -> None:
    jobs = [(number, [text_document("1")]) for number in range(4)]
    engine = Echo(2)
    with Progress(1, 0, 4) as progress:
        next(scored(jobs, engine, progress))
    assert engine.read == 3


def test_shards_are_written_beside_scoring_and_told_of_in_order() -> None:
    gate, written, told = threading.Event(), [], []

    def write(shard: int, documents: list[Any]) -> None:
        if shard == 0:
            gate.wait(timeout=60)
        written.append(shard)

    with BackgroundWriter(write, lambda: told.append(len(told))) as writing:
        for shard in range(MOST):
            writing.put(shard, [])
        assert not told  # the first is still being written, and nothing has waited for it
        gate.set()
        writing.put(MOST, [])
        assert told
    assert sorted(written) == told == list(range(MOST + 1))


def test_what_was_scored_is_written_when_scoring_fails() -> None:
    written: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        _put_all([1, 2], lambda shard, _: written.append(shard), KeyboardInterrupt)
    assert sorted(written) == [1, 2]


@pytest.mark.parametrize("shards", [1, 3 * MOST])
def test_a_writer_that_fails_stops_the_build(shards: int) -> None:
    def write(shard: int, documents: list[Any]) -> None:
        raise StorageFullError("no space left")

    with pytest.raises(StorageFullError, match="no space"):
        _put_all(range(shards), write)


def _put_all(shards: Iterable[int], write: Any, error: type[BaseException] | None = None) -> None:
    with BackgroundWriter(write, lambda: None) as writing:
        for shard in shards:
            writing.put(shard, [])
        if error is not None:
            raise error
