"""What a step waits for its batch: one thread that starts anew every epoch, and several that read on across epochs.

    python scripts/bench_stream.py                    # ~5 minutes, once the real rows are made
    python scripts/bench_stream.py --documents 48 --turns 1 --output trial.csv        # a minute

Real rows of Gemma-3-270M (`real_documents.py`), their texts joined to documents of nearly 1,024 tokens of SmolLM2, 16
to a batch. Both sides run in this process, turn by turn. Three figures for each: how long a batch takes where nothing
but batches is asked for; what a step waits, where a step is `--step_ms` in which this thread sleeps, as it does while a
GPU computes; and how long a step takes that launches small operations instead, as a GPU's host does, against the same
without preparing anything: what Python's lock costs. Appends to scripts/results/stream.csv.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import demo_assets
import numpy as np
import tokenizers
import torch
from real_documents import RANKS, real_documents
from result_table import ResultTable
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill import CachedDocuments, DistillationCollator, DistillationConfig, EpochBatches
from distill.stream import Stream
from storage_specs import CacheSettings, CacheWriter, make_plan, special_roles, text_document, token_bytes
from storage_specs.document import CachedDocument
from storage_specs.vocabulary import Vocabulary, tokenizer_digest

RESULTS = Path(__file__).parent / "results" / "stream.csv"
LOSSES = ("ce:1,uld:1.5", "ce:1,mapped:1")
DOCUMENTS, MAX_LENGTH, K_IDS = 16, 1024, 16
EPOCHS = 3
Asked = Callable[[Stream, int, int], Iterator[Any]]


def anew_each_epoch(stream: Stream, steps: int, stop: int) -> Iterator[Any]:
    """The batches of a run whose threads begin with each epoch."""
    for first in range(0, stop, steps):
        ahead = stream.at(first, min(first + steps, stop))
        for _ in range(first, min(first + steps, stop)):
            yield partial(next, ahead)
        stream.close()


def across_epochs(stream: Stream, steps: int, stop: int) -> Iterator[Any]:
    """As a trainer does."""
    for step in range(stop):
        yield lambda step=step: next(stream.at(step, stop))


ARMS: dict[str, tuple[int, Asked]] = {
    "1 thread, anew each epoch": (1, anew_each_epoch),
    "1 thread": (1, across_epochs),
    "2 threads": (2, across_epochs),
    "4 threads": (4, across_epochs),
}


class Turns:
    """What the turns of one arm gave."""

    def __init__(self) -> None:
        self.batch_ms: list[float] = []
        self.waits_ms: list[float] = []
        self.seconds = 0.0
        self.launching_ms: list[float] = []


def launch() -> None:
    """Some 40 ms of small operations, each of which lets go of Python's lock for a moment."""
    values = torch.zeros(64, 64)
    for _ in range(6_000):
        values = values + 1


def timed_ms(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000


def long_documents(count: int, student: PreTrainedTokenizerBase) -> list[CachedDocument]:
    """Real documents joined in ever new orders, until each is nearly `MAX_LENGTH` tokens of the student."""
    short, random = real_documents(), np.random.default_rng(0)
    sizes = [len(student(document.text).input_ids) for document in short]
    found: dict[str, CachedDocument] = {}
    while len(found) < count:
        members, tokens = [], 0
        for number in random.permutation(len(short)):
            if tokens + sizes[number] < MAX_LENGTH - 8:  # the seams may cost a few
                members.append(short[number])
                tokens += sizes[number]
        document = joined(members)
        found[document.doc_id] = document
    return list(found.values())


def joined(members: Sequence[CachedDocument]) -> CachedDocument:
    starts = np.cumsum([0, *(len(member.text.encode()) for member in members)])
    shifted = zip(members, starts[:-1], strict=True)
    places = [(member.byte_start + start, member.byte_end + start) for member, start in shifted]
    columns = {
        name: np.concatenate([getattr(member, name) for member in members])
        for name in ("segment", "is_end", "gold_logprob", "tail_mass", "probs", "token_ids")
    }
    columns["token_ids"] = columns["token_ids"][:, :K_IDS].copy()
    byte_start, byte_end = (np.concatenate(column) for column in zip(*places, strict=True))
    document = text_document("".join(member.text for member in members))
    return CachedDocument(**vars(document), byte_start=byte_start, byte_end=byte_end, **columns)


def write_cache(folder: Path, documents: list[CachedDocument], per_shard: int) -> None:
    teacher = AutoTokenizer.from_pretrained(demo_assets.gemma_path())
    settings = CacheSettings(
        teacher={"name": "gemma-3-270m"},
        tokenizer={"digest": tokenizer_digest(teacher)},
        chat_template=None,
        engine={"name": "transformers"},
        k=RANKS,
        k_ids=K_IDS,
        vocab_size=len(words := token_bytes(teacher)),
        windows={},
        vocabulary=Vocabulary(token_bytes=words, special_roles=special_roles(teacher)),
    )
    plan = make_plan(documents, per_shard)
    writer = CacheWriter(folder, settings, plan)
    for shard, members in enumerate(plan.shards):
        writer.write_shard(shard, [documents[number] for number in members])
    writer.finalize()


def turn(arm: str, bench: "Bench", found: Turns, step_ms: float) -> None:
    """Three runs of all epochs: as fast as it goes, beside steps that sleep, beside steps that launch."""
    threads, batches_of = ARMS[arm]
    steps, stop = bench.batches.steps, EPOCHS * bench.batches.steps

    def run() -> Iterator[Callable[[], Any]]:
        stream = Stream(CachedDocuments(bench.cache, ids=bench.ids), bench.batches, bench.collator, threads=threads)
        try:
            yield from batches_of(stream, steps, stop)
        finally:
            stream.close()

    found.batch_ms.append(timed_ms(lambda: [ask() for ask in run()]) / stop)
    began = time.perf_counter()
    for step, ask in enumerate(run()):
        waited = timed_ms(ask)
        if step:  # the very first batch of a run is waited for by either
            found.waits_ms.append(waited)
        else:
            began = time.perf_counter()
        time.sleep(step_ms / 1000)
    found.seconds += time.perf_counter() - began
    for ask in run():
        ask()
        found.launching_ms.append(timed_ms(launch))


@contextmanager
def long_cache(documents: int, per_shard: int) -> Iterator[tuple[Path, PreTrainedTokenizerBase]]:
    """A cache of `long_documents`, gone afterwards, and the student's tokenizer."""
    student = AutoTokenizer.from_pretrained(demo_assets.smollm2_path())
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "cache"
        write_cache(cache, long_documents(documents, student), per_shard)
        yield cache, student


class Bench:
    """One mixture on one cache."""

    def __init__(self, cache: Path, loss: str, student: PreTrainedTokenizerBase) -> None:
        config = DistillationConfig(output_dir=str(cache / "out"), loss=loss, max_length=MAX_LENGTH, use_cpu=True)
        self.cache, self.loss, self.ids = cache, loss, config.mixture.needs_ids
        documents = CachedDocuments(cache, ids=self.ids)
        self.batches = EpochBatches(documents.documents_per_shard, documents=DOCUMENTS, drop_last=True)
        self.collator = DistillationCollator(student, config, documents.cache)
        sizes = [self.collator(documents.__getitems__(batch))["tokens"] for batch in self.batches]
        self.tokens = statistics.mean(sizes)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--documents", type=int, default=200, help="of which a tenth is held out (200)")
    add("--documents_per_shard", type=int, default=32)
    add("--step_ms", type=float, default=80, help="of a step on the GPU (80: SmolLM2-135M, 16 x 1,024 tokens, an H100)")
    add("--turns", type=int, default=3)
    add("--losses", nargs="+", default=LOSSES)
    add("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    table, rows = ResultTable(options.output), []
    with long_cache(options.documents, options.documents_per_shard) as (cache, student):
        for loss in options.losses:
            bench = Bench(cache, loss, student)
            alone = [timed_ms(launch) for _ in range(20)]
            found = {arm: Turns() for arm in ARMS}
            for _ in range(options.turns):
                for arm, turns in found.items():
                    turn(arm, bench, turns, options.step_ms)
                alone += [timed_ms(launch) for _ in range(20)]
            rows += measured(bench, found, statistics.median(alone), options)
            table.write(rows)
    return 0


def measured(
    bench: Bench, found: dict[str, Turns], alone_ms: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A CSV row for each arm, printed too."""
    rows = []
    for arm, turns in found.items():
        p10, p90 = (float(np.percentile(turns.batch_ms, q)) for q in (10, 90))
        batches = {"ms_per_batch": statistics.median(turns.batch_ms), "ms_per_batch_p10": p10, "ms_per_batch_p90": p90}
        waits = {
            "wait_ms_median": statistics.median(turns.waits_ms),
            "wait_ms_p99": float(np.percentile(turns.waits_ms, 99)),
            "wait_ms": statistics.mean(turns.waits_ms),
            "data_wait": sum(turns.waits_ms) / 1000 / turns.seconds,
            "launching_ms_alone": alone_ms,
            "launching_ms": statistics.median(turns.launching_ms),
        }
        numbers = batches | waits
        print(f"{bench.loss} {arm}: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
        rows.append(
            {
                "arm": arm,
                "loss": bench.loss,
                "threads": ARMS[arm][0],
                "epochs": EPOCHS,
                "batches_per_epoch": bench.batches.steps,
                "tokens_per_batch": f"{bench.tokens:.0f}",
                "documents_per_shard": options.documents_per_shard,
                **{name: f"{value:.4g}" for name, value in batches.items()},
                "step_ms": f"{options.step_ms:g}",
                **{name: f"{value:.4g}" for name, value in waits.items()},
                "load": f"{os.getloadavg()[0]:.1f}",  # of others too: waits are on the wall clock
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "python": platform.python_version(),
                "torch": torch.__version__,
                "tokenizers": tokenizers.__version__,
                "date": time.strftime("%Y-%m-%d"),
            }
        )
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
