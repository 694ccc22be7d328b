"""The stream of a run: decoded once, few shards held, prepared ahead, broken shards stopped at or left out."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cache_making import write_cache
from test_trainer import recorded, stop_at, weights
from training import trainer

from distill import CachedDocuments, EpochBatches
from distill.checkpoint import RECORD, last_whole_checkpoint
from distill.main import main
from distill.prefetch import Prefetched
from distill.quarantine import HELD_OUT, NAME, Quarantine
from distill.stream import Stream
from storage_specs import open_cache, text_document
from storage_specs.errors import CorruptCacheError, StoreUnavailableError
from storage_specs.shard_reading import ShardReader

ROOT = Path(__file__).parents[2]
MIXED = 3


@pytest.fixture(scope="session")
def many_shards_path(wiki_texts, gemma_tokenizer, tmp_path_factory):
    """96 short documents in 12 shards."""
    texts = [text_document(text[n * 60 : n * 60 + 60] or text[:50]) for text in wiki_texts[:16] for n in range(6)]
    path = tmp_path_factory.mktemp("caches") / "many"
    return write_cache(path, texts, gemma_tokenizer, documents_per_shard=8)


@pytest.fixture
def decoded(monkeypatch):
    """The shards that were decoded, in order."""
    seen, real = [], ShardReader.columns
    monkeypatch.setattr(ShardReader, "columns", lambda self, shard: (seen.append(shard), real(self, shard))[1])
    return seen


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_process_decodes_a_shard_once_an_epoch(many_shards_path, decoded, ranks, grouped):
    documents = CachedDocuments(many_shards_path)
    lengths = documents.text_bytes if grouped else None
    served = []
    for rank in range(ranks):
        batches = EpochBatches(
            documents.documents_per_shard, documents=4 // ranks, ranks=ranks, rank=rank, seed=3, lengths=lengths
        )
        for epoch in range(2):
            batches.set_epoch(epoch)
            decoded.clear()
            kept = set(documents._open)  # by the epoch before
            for micro_batch in batches:
                served += [document.doc_id for document in documents.__getitems__(micro_batch)]
                assert len(documents._open) <= MIXED + 1
            assert len(decoded) == len(set(decoded))
            assert kept | set(decoded) == set(range(12))
    assert sorted(served) == sorted(2 * [documents[n].doc_id for n in range(len(documents))])


def test_an_epoch_opens_with_a_window_of_shards_read_side_by_side(many_shards_path, monkeypatch):
    """They meet at a barrier; every later one is read alone, when the window comes to it."""
    documents = CachedDocuments(many_shards_path)
    ids = doc_ids_of(documents)
    batches = list(EpochBatches(documents.documents_per_shard, documents=4, seed=3))
    window, real = threading.Barrier(MIXED), type(documents.cache).read_columns
    names, started = set(), []

    def read_columns(self, shard):
        started.append(shard)
        names.add(threading.current_thread().name.partition("_")[0])
        if shard in batches[0].open_shards:
            window.wait(timeout=300)
        assert len(documents._open) <= MIXED + 1
        return real(self, shard)

    assert len(batches[0].open_shards) == MIXED
    monkeypatch.setattr(type(documents.cache), "read_columns", read_columns)
    for batch in batches:
        assert doc_ids_of(documents.__getitems__(batch)) == [ids[index] for index in batch]
        assert set(started) >= set(batch.open_shards)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("shard-reader")]
    assert sorted(started) == list(range(12))
    assert names == {"shard-reader"}


def test_a_shard_that_cannot_be_read_fails_the_first_batch_that_needs_it(many_shards_path, monkeypatch):
    """It is read ahead, again when it is needed, and once more when that is asked for again."""
    documents = CachedDocuments(many_shards_path)
    batches = list(EpochBatches(documents.documents_per_shard, documents=2, seed=3))
    needed = [{documents.place_of(index)[0] for index in batch} for batch in batches]
    shard = next(shard for shard in batches[0].open_shards if shard not in needed[0])
    first = next(number for number, shards in enumerate(needed) if shard in shards)
    real, tries = type(documents.cache).read_columns, []

    def read_columns(self, number):
        tries.append(number)
        if number == shard and tries.count(shard) <= 2:
            raise StoreUnavailableError("no answer")
        return real(self, number)

    monkeypatch.setattr(type(documents.cache), "read_columns", read_columns)
    for batch in batches[:first]:
        assert len(documents.__getitems__(batch)) == len(batch)
    with pytest.raises(StoreUnavailableError, match="no answer"):
        documents.__getitems__(batches[first])
    assert all(len(documents.__getitems__(batch)) == len(batch) for batch in batches[first:])
    assert tries.count(shard) == 3


def test_a_store_that_is_back_when_a_shard_is_needed_fails_no_batch(many_shards_path, monkeypatch):
    """Though no shard of the window with which the epoch opens could be read, but those of the first batch."""
    documents = CachedDocuments(many_shards_path)
    ids = doc_ids_of(documents)
    batches = list(EpochBatches(documents.documents_per_shard, documents=1, seed=3))
    away = set(batches[0].open_shards) - {documents.place_of(batches[0][0])[0]}
    real, tries = type(documents.cache).read_columns, []

    def read_columns(self, shard):
        tries.append(shard)
        if shard in away and tries.count(shard) == 1:
            raise StoreUnavailableError("no answer")
        return real(self, shard)

    monkeypatch.setattr(type(documents.cache), "read_columns", read_columns)
    assert len(away) == MIXED - 1
    for batch in batches:
        assert doc_ids_of(documents.__getitems__(batch)) == [ids[index] for index in batch]
    assert Counter(tries) == {shard: 1 + (shard in away) for shard in range(12)}


def test_training_decodes_no_more_than_the_stream(many_shards_path, student_path, tmp_path, decoded):
    one = trainer(many_shards_path, student_path, tmp_path, max_steps=-1, num_train_epochs=2, loss="ce:1")
    decoded.clear()
    one.train()
    assert one.state.global_step == 2 * one.batches.steps
    assert set(decoded) == set(range(12))
    # What is still open when an epoch ends may open the next one.
    assert 2 * 12 - (MIXED + 1) <= len(decoded) <= 2 * 12
    assert max(Counter(decoded).values()) <= 2


def test_documents_are_the_same_by_any_way(many_shards_path):
    documents, held_out = CachedDocuments(many_shards_path), CachedDocuments(many_shards_path, held_out=True)
    cache = open_cache(many_shards_path)
    assert len(documents) + len(held_out) == len(cache)
    ids = [document.doc_id for document in documents.__getitems__(range(len(documents)))]
    assert ids == [cache.doc_ids[n] for n in range(len(cache)) if not cache.held_out_D[n]]
    assert [document.doc_id for document in documents.sample(5)] == ids[:5]
    assert documents[-1].doc_id == ids[-1]
    first = CachedDocuments(many_shards_path, documents=3)
    assert [first[n].doc_id for n in range(len(first))] == ids[:3]
    with pytest.raises(IndexError):
        documents[len(documents)]


# ---- prepared ahead


def test_prefetching_is_bounded_ordered_and_ends():
    made = []

    def source():
        for number in range(20):
            made.append(number)
            yield number

    ahead = Prefetched(source(), lambda item: item, ahead=3)
    time.sleep(0.3)
    assert len(made) <= 4  # three ready, one waiting for room
    assert list(ahead) == list(range(20))
    with pytest.raises(StopIteration):
        next(ahead)
    for thread in ahead._threads:  # by themselves
        thread.join(timeout=300)
    assert not any(thread.is_alive() for thread in ahead._threads)
    ahead.close()
    endless = Prefetched(iter(int, 1), lambda item: item, ahead=2)
    assert next(endless) == 0
    endless.close()
    assert not any(thread.is_alive() for thread in endless._threads)


def test_what_was_looked_at_comes_all_the_same():
    def source():
        yield from range(6)
        raise CorruptCacheError("shard 6")

    ahead = Prefetched(source(), str, threads=2)
    assert next(ahead) == "0"
    assert ahead.peek(3) == ["1", "2", "3"]
    assert next(ahead) == "1"
    assert ahead.peek(2) == ["2", "3"]
    for _ in range(2):
        with pytest.raises(CorruptCacheError):
            ahead.peek(6)
    assert [next(ahead) for _ in range(4)] == ["2", "3", "4", "5"]
    with pytest.raises(CorruptCacheError):
        next(ahead)
    ahead.close()
    ended = Prefetched(iter(range(3)), str)
    assert ended.peek(9) == list(ended) == ["0", "1", "2"]
    ended.close()


def test_steps_are_looked_at_without_being_taken(many_shards_path):
    documents = CachedDocuments(many_shards_path)
    batches = EpochBatches(documents.documents_per_shard, documents=2, micro_batches=3)

    def collate(documents):
        return {"doc_ids": [document.doc_id for document in documents]}

    last = batches.steps + 2  # in the second epoch
    stream, plain = (Stream(documents, batches, collate) for _ in range(2))
    expected = [list(islice(plain.at(step, last), 3)) for step in range(last)]
    for step in range(last):
        if step % 2:
            assert stream.peek(step, last, 2) == expected[step : step + 2]
        assert list(islice(stream.at(step, last), 3)) == expected[step]
    assert stream.peek(last, last, 2) == []
    assert stream.peek(3, last, 1) == expected[3:4], "another place"
    assert list(islice(stream.at(3, last), 3)) == expected[3]
    for each in (stream, plain):
        each.close()


def test_prefetching_raises_in_turn_and_tells_how_long_it_was_waited_for(monkeypatch):
    """By a clock that moves only while the asker, who has looked at it, waits for what comes second."""
    clock, go, asked = SimpleNamespace(now=0.0), threading.Event(), threading.Event()

    def look():
        now = clock.now
        asked.set()
        return now

    def source():
        yield 1
        go.wait()
        asked.wait()
        clock.now += 0.25
        raise CorruptCacheError("broken")

    clock.perf_counter = look
    monkeypatch.setattr("distill.prefetch.time", clock)
    ahead = Prefetched(source(), lambda item: item)
    assert next(ahead) == 1
    asked.clear()
    go.set()
    for _ in range(2):
        with pytest.raises(CorruptCacheError, match="broken"):
            next(ahead)
    assert ahead.waited == 0.25
    ahead.close()


def test_batches_are_made_side_by_side_and_given_in_order():
    """Two makers meet at a barrier, and the first waits for the second to be done; no order is lost by that."""
    both, second_done = threading.Barrier(2), threading.Event()

    def make(number):
        if number < 2:
            both.wait(timeout=300)
        if number == 0:
            assert second_done.wait(timeout=300)
        elif number == 1:
            second_done.set()
        return number

    ahead = Prefetched(iter(range(10)), make, threads=2)
    assert list(ahead) == list(range(10))
    ahead.close()


def test_closing_does_not_wait_for_a_store_that_hangs(monkeypatch):
    monkeypatch.setattr("distill.prefetch.PATIENCE", 0.05)
    answer = threading.Event()
    ahead = Prefetched(iter(range(3)), lambda item: answer.wait(300), threads=2)
    ahead.close()
    assert all(thread.is_alive() for thread in ahead._threads)
    answer.set()
    for thread in ahead._threads:
        thread.join(timeout=300)
    assert not any(thread.is_alive() for thread in ahead._threads)


def test_an_error_of_a_batch_is_raised_in_its_turn():
    failed = threading.Event()

    def make(number):
        if number == 3:
            failed.set()
            raise CorruptCacheError("broken")
        if number == 2:
            assert failed.wait(timeout=300)  # later than the one that fails, and still whole
        return number

    ahead = Prefetched(iter(range(20)), make, threads=2)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(CorruptCacheError, match="broken"):
            next(ahead)
    ahead.close()
    assert not any(thread.is_alive() for thread in ahead._threads)


@pytest.fixture
def read(monkeypatch):
    """The epochs and documents of the micro-batches that were read, in order."""
    seen, real = [], CachedDocuments.__getitems__
    monkeypatch.setattr(
        CachedDocuments, "__getitems__", lambda self, batch: (seen.append((batch.epoch, *batch)), real(self, batch))[1]
    )
    return seen


def doc_ids_of(documents):
    return [document.doc_id for document in documents]


def test_a_stream_reads_on_into_the_next_epoch_and_holds_few_shards(many_shards_path, monkeypatch, read):
    documents = CachedDocuments(many_shards_path)
    batches = EpochBatches(documents.documents_per_shard, documents=4, seed=3)
    expected = [(batch.epoch, *batch) for batch in batches.of_steps(0, 2 * batches.steps)]
    ids = doc_ids_of(documents)
    decoded, real = [], type(documents.cache).read_columns

    def read_columns(self, shard):
        assert len(documents._open) <= MIXED + 1  # with this one
        decoded.append((read[-1][0], shard))
        return real(self, shard)

    monkeypatch.setattr(type(documents.cache), "read_columns", read_columns)
    stream = Stream(documents, batches, doc_ids_of, threads=3)
    for step in range(batches.steps):
        assert next(stream.at(step, 2 * batches.steps)) == [ids[n] for n in expected[step][1:]]
    until = time.monotonic() + 300
    while len(read) < batches.steps + 2 and time.monotonic() < until:  # not asked for yet
        time.sleep(0.01)
    assert len(read) >= batches.steps + 2
    for step in range(batches.steps, 2 * batches.steps):
        assert next(stream.at(step, 2 * batches.steps)) == [ids[n] for n in expected[step][1:]]
    with pytest.raises(StopIteration):
        next(stream.at(2 * batches.steps, 2 * batches.steps))
    stream.close()
    assert read == expected  # and nothing behind the last step
    assert len(decoded) == len(set(decoded))  # once an epoch


def test_a_stream_that_is_asked_for_another_step_begins_there(many_shards_path):
    documents = CachedDocuments(many_shards_path)
    batches = EpochBatches(documents.documents_per_shard, documents=4, seed=3)
    stream = Stream(documents, batches, doc_ids_of, threads=2)
    first = [next(stream.at(step, 30)) for step in range(30)]
    assert [next(stream.at(step, 30)) for step in (7, 8, 25, 0)] == [first[step] for step in (7, 8, 25, 0)]
    stream.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_no_thread_outlives_a_run(many_shards_path, student_path, tmp_path, monkeypatch, error):
    one = trainer(many_shards_path, student_path, tmp_path, max_steps=9, loss="ce:1")
    before = set(threading.enumerate())

    def fails(*_):
        raise error("stop")

    monkeypatch.setattr(one.step_loss, "terms", fails)
    with pytest.raises(error):
        one.train()
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name.startswith(("prefetch", "shard-reader"))]


@pytest.mark.parametrize(("waiting", "share"), [(0.0, 0.0), (3.0, 0.75)])
def test_the_log_tells_what_waiting_for_data_costs(cache_path, student_path, tmp_path, monkeypatch, waiting, share):
    """By a clock that only waiting and computing move: so many seconds for each batch, and one for each step."""
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now

    class Waited(Prefetched):
        def __next__(self):
            item = super().__next__()
            clock.now += waiting
            self.waited += waiting
            return item

    for module in ("prefetch", "step_log"):
        monkeypatch.setattr(f"distill.{module}.time", clock)
    monkeypatch.setattr("distill.stream.Prefetched", Waited)
    one = trainer(cache_path, student_path, tmp_path, max_steps=5, loss="ce:1", logging_steps=5)
    compute_loss = one.compute_loss

    def computed(*arguments, **options):
        clock.now += 1
        return compute_loss(*arguments, **options)

    one.compute_loss = computed
    one.train()
    assert [line["data_wait"] for line in one.state.log_history if "data_wait" in line] == [pytest.approx(share)]


# ---- broken shards


def break_shard(path, shard):
    """Flip a byte in the middle of the largest file of a shard."""
    files = [file for file in (path / "shards").rglob("*") if file.is_file() and f"{shard:06d}" in str(file)]
    largest = max((file for file in files if file.suffix != ".json"), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    largest.chmod(0o644)
    largest.write_bytes(bytes(data))


def later_shard(path, step):
    """A shard that is first needed at or after a step of batches of 4."""
    documents = CachedDocuments(path)
    batches = EpochBatches(documents.documents_per_shard, documents=4, seed=42)
    needed = [{documents.place_of(index)[0] for index in micro_batch} for micro_batch in batches]
    return next(iter(needed[step] - set().union(*needed[:step])), None) or later_shard(path, step + 1)


OPTIONS = {"max_steps": 16, "loss": "ce:1,uld:1.5", "save_strategy": "steps", "save_steps": 1000}


def test_a_shard_that_breaks_stops_with_a_checkpoint(many_shards_path, student_path, tmp_path):
    path = shutil.copytree(many_shards_path, tmp_path / "cache")
    whole = trainer(path, student_path, tmp_path / "whole", **OPTIONS)
    expected = recorded(whole)
    whole.train()
    shard = later_shard(path, 5)
    backup = shutil.copytree(path, tmp_path / "backup")
    break_shard(path, shard)
    out = tmp_path / "broken"
    one = trainer(path, student_path, out, **OPTIONS)
    seen = recorded(one)
    with pytest.raises(CorruptCacheError, match=r"after step \d+.*--on_corrupt quarantine"):
        one.train()
    assert last_whole_checkpoint(out).name == f"checkpoint-{one.state.global_step}"
    assert 5 <= one.state.global_step < 16
    # Repaired, the same run goes on as if nothing had happened.
    shutil.rmtree(path)
    shutil.copytree(backup, path)
    again = trainer(path, student_path, out, **OPTIONS)
    seen += recorded(again)
    more = recorded(again)
    again.train(resume_from_checkpoint=True)
    assert [doc_ids for _, doc_ids in [*seen, *more]] == [doc_ids for _, doc_ids in expected]
    for name, value in weights(whole).items():
        assert torch.equal(weights(again)[name], value), name


def test_quarantine_leaves_out_exactly_one_shard(many_shards_path, student_path, tmp_path):
    path = shutil.copytree(many_shards_path, tmp_path / "cache")
    shard = later_shard(path, 5)
    documents = CachedDocuments(path)
    numbers = [n for n in range(len(documents)) if documents.place_of(n)[0] == shard]
    lost = {documents[n].doc_id: len(documents[n].segment) for n in numbers}
    whole = trainer(path, student_path, tmp_path / "whole", **OPTIONS)
    expected = recorded(whole)
    whole.train()
    break_shard(path, shard)
    options = OPTIONS | {"on_corrupt": "quarantine"}
    out = tmp_path / "out"
    one = trainer(path, student_path, out, **options)
    seen = recorded(one)
    one.train()
    left = [[doc_id for doc_id in doc_ids if doc_id not in lost] for _, doc_ids in expected]
    assert [doc_ids for _, doc_ids in seen] == left
    assert left != [doc_ids for _, doc_ids in expected]
    (line,) = (out / NAME).read_text().splitlines()
    said = json.loads(line)
    assert (said["shard"], said["epoch"], dict(said["documents"])) == (shard, 0, lost)
    assert "ChecksumMismatchError" in said["error"]
    summary = one.train_dataset.quarantine.summary()
    assert summary == {"file": NAME, "shards": [shard], "documents": len(lost), "rows": sum(lost.values())}
    # Stopped and resumed, even where the shard is whole again: the same documents are missing.
    resumed = tmp_path / "resumed"
    first = trainer(path, student_path, resumed, **options | {"save_steps": 1})
    seen = recorded(first)
    first.add_callback(stop_at(9))
    first.train()
    second = trainer(path, student_path, resumed, **options | {"save_steps": 1})
    more = recorded(second)
    second.train(resume_from_checkpoint=True)
    assert [doc_ids for _, doc_ids in [*seen, *more]] == left


def test_a_shard_lost_to_the_next_epoch_is_not_lost_to_this_one(tmp_path):
    """Batches of the next epoch are prepared ahead: a run that is resumed before it reads the shard again for this."""
    quarantine = Quarantine(tmp_path)
    quarantine.add(5, 1, CorruptCacheError("broken"), [("a", 3), ("b", 4)])
    resumed = Quarantine(tmp_path)
    assert [resumed.covers(5, epoch) for epoch in range(3)] == [False, True, True]
    assert not resumed.covers(4, 1)
    resumed.add(5, 0, CorruptCacheError("broken"), [("a", 3), ("b", 4)])
    assert Quarantine(tmp_path).covers(5, 0)
    assert Quarantine(tmp_path).summary() == {"file": NAME, "shards": [5], "documents": 2, "rows": 7}


def test_the_record_of_a_run_names_what_was_lost(many_shards_path, student_path, tmp_path, capsys):
    from test_command import command

    path = shutil.copytree(many_shards_path, tmp_path / "cache")
    break_shard(path, 7)
    flags = command(path, student_path, tmp_path / "out", "--num_train_epochs", "1", "--max_steps", "-1")
    with pytest.raises(CorruptCacheError, match="crc32c"):
        main(flags)
    assert main([*flags, "--on_corrupt", "quarantine"]) == 0
    record = json.loads((tmp_path / "out" / RECORD).read_bytes())
    assert record["finished"]
    assert record["quarantined"]["shards"] == [7]
    assert "left out as broken: 1 shards" in capsys.readouterr().err


def broken_held_out(many_shards_path, tmp_path):
    """A copy of the cache in which a shard with held-out documents is broken, that shard, and their rows."""
    path = shutil.copytree(many_shards_path, tmp_path / "cache")
    held_out = CachedDocuments(path, held_out=True)
    shard = held_out.place_of(0)[0]
    members = [held_out[n] for n in range(len(held_out)) if held_out.place_of(n)[0] == shard]
    lost = {document.doc_id: len(document.segment) for document in members}
    break_shard(path, shard)
    return path, shard, lost, len(held_out)


EVALUATED = {"max_steps": 4, "loss": "ce:1", "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
EVALUATED |= {"save_steps": 1000}


def test_evaluations_go_without_a_broken_shard_in_quarantine(many_shards_path, student_path, tmp_path):
    """And so do probes; what they lost is told apart from what training lost."""
    path, shard, lost, count = broken_held_out(many_shards_path, tmp_path)
    options = EVALUATED | {"on_corrupt": "quarantine", "probe_steps": 1, "loss": "ce:1,uld:1"}
    one = trainer(path, student_path, tmp_path / "out", **options)
    one.train()
    told = [line["eval_documents"] for line in one.state.log_history if "eval_documents" in line]
    assert told == [count - len(lost)] * 2
    (line,) = map(json.loads, (tmp_path / "out" / HELD_OUT).read_text().splitlines())
    assert (line["shard"], dict(line["documents"])) == (shard, lost)
    rows = sum(lost.values())
    expected = {"file": HELD_OUT, "shards": [shard], "documents": len(lost), "rows": rows}
    assert one.eval_dataset.quarantine.summary() == expected
    assert not one.train_dataset.cache._held, "no shard is kept beside the window"


def test_an_evaluation_that_cannot_read_stops_with_a_checkpoint(many_shards_path, student_path, tmp_path, monkeypatch):
    one = trainer(many_shards_path, student_path, tmp_path / "out", **EVALUATED)

    def readable(*_):
        raise StoreUnavailableError("no answer")

    monkeypatch.setattr(one.eval_dataset, "readable", readable)
    with pytest.raises(StoreUnavailableError, match="no answer; training stopped after step 2, from which"):
        one.train()
    assert last_whole_checkpoint(tmp_path / "out").name == "checkpoint-2"
    again = trainer(many_shards_path, student_path, tmp_path / "out", **EVALUATED)
    again.train(resume_from_checkpoint=True)
    straight = trainer(many_shards_path, student_path, tmp_path / "straight", **EVALUATED)
    straight.train()
    for name, value in weights(straight).items():
        assert torch.equal(weights(again)[name], value), name


# ---- growth


def test_growth_is_planned_in_seconds(tmp_path):
    """10^4 shards here; scripts/results/plan_growth.csv holds 10^5 shards and 10^10 rows."""
    words = [sys.executable, "scripts/plan_growth.py", "--shards", "10000", "--results", str(tmp_path / "g.csv")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "at most 4 shards open" in done.stdout
    rows = [line.split(",") for line in (tmp_path / "g.csv").read_text().splitlines()[1:]]
    assert [row[3] for row in rows][1:] == ["dataset", "sampler and first batch", "a whole epoch's batches"]
    assert all(float(row[5]) < 50 for row in rows[1:])  # MiB beside the cache's own arrays
