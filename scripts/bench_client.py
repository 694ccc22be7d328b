"""What the client's side of a capture can take: rows a second from the engine's arrays to committed shards on disk.

    python scripts/bench_client.py --encoders 0 2 8 --k 64

No engine: rows are made beforehand and handed over as fast as they are taken, so that the figures bound what a GPU may
score before client, codec, checksums or disk hold it up. `encoders` 0: the writer's threads encode, N: N processes do
(`cache_builder/encoders.py`). Beside the throughput, the client's own work on one prompt of 2,048 tokens (reading its
rows, opening the next request) is timed while shards are written: `step_ms_p50`, `step_ms_p99`; and alone, in the arm
`client` (nothing is encoded or written). Arms take turns; a CSV row each goes to scripts/results/client.csv.
"""

import argparse
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from bench_capture import BINS, RandomPrompts
from result_table import ResultTable

from cache_builder.encoders import ShardEncoders
from cache_builder.engines.base import EngineConfig, WindowScores
from cache_builder.engines.vllm import captured_scores
from cache_builder.pipeline import WRITERS
from cache_builder.progress import Progress
from cache_builder.shard_worker import Recipe, ShardWorker
from storage_specs.plan import make_plan
from storage_specs.settings import CacheSettings
from storage_specs.sketch import log_rank_edges
from storage_specs.vocabulary import Vocabulary
from storage_specs.windows import Window

DISTINCT = 8  # prompts' rows that are made; they come again and again


class ReadyRows:
    """Stands for the vllm engine: rows that are there already, read as those that a worker captured."""

    def __init__(self, config: EngineConfig, length: int) -> None:
        self.config, self.seconds = config, list[float]()
        self.rows = [fake_rows(np.random.default_rng(seed), config, length) for seed in range(DISTINCT)]

    def score(self, windows: Iterable[Window]) -> Iterator[WindowScores]:
        for number, window in enumerate(windows):
            started = time.perf_counter()
            scores = captured_scores(self.rows[number % DISTINCT], window, self.config)
            self.seconds.append(time.perf_counter() - started)
            yield scores


def fake_rows(generator: np.random.Generator, config: EngineConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(values (L-1, 1 + K + J), ids (L-1, K)) like a language model's: a few likely words, and a tail of 8 %."""
    rows, k = length - 1, config.k
    logits_RK = np.sort(3 * generator.gumbel(size=(rows, k)), axis=1)[:, ::-1]
    probs_RK = np.exp(logits_RK - logits_RK.max(axis=1, keepdims=True))
    probs_RK *= 0.92 / probs_RK.sum(axis=1, keepdims=True)
    bins = config.bins
    parts = [np.full((rows, 1), -2.5), np.log(probs_RK), np.full((rows, bins), 0.08 / max(1, bins))]
    ids_RK = generator.integers(0, config.vocab_size, (rows, k), dtype=np.int32)
    return np.concatenate(parts, axis=1, dtype=np.float32), ids_RK


class Bench:
    """The settings, and prompts without a tokenizer."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder = given, folder
        edges = log_rank_edges(given.k, given.vocabulary, BINS).tolist() if given.profile == "sketch" else None
        self.config = EngineConfig(
            model="none",
            dtype="bfloat16",
            max_model_len=given.length + 1,
            k=given.k,
            vocab_size=given.vocabulary,
            rank_edges=None if edges is None else tuple(edges),
        )
        self.settings = CacheSettings(
            teacher={}, tokenizer={}, chat_template=None, engine={}, windows={}, k=given.k, k_ids=min(16, given.k),
            vocab_size=given.vocabulary, profile=given.profile, store=given.store,
            parameters={} if edges is None else {"rank_edges": edges},
            vocabulary=Vocabulary(token_bytes=[b"%d" % word for word in range(given.vocabulary)], special_roles={}),
        )  # fmt: skip
        self.prompts = RandomPrompts(given.prompts, given.length, given.vocabulary)
        self.encoders = {size: ShardEncoders(self.settings, size) for size in given.encoders if size}

    def arm(self, encoders: int | None) -> tuple[float, np.ndarray]:
        """Seconds of a whole build, and of every prompt's reading. encoders None: rows are read, nothing more."""
        engine = ReadyRows(self.config, self.given.length)
        plan = make_plan(self.prompts.documents, self.given.documents_per_shard)
        recipe = Recipe(
            output=self.folder / "cache", settings=self.settings, plan=plan, engine="vllm",
            engine_config=self.config, cutter=self.prompts, encoders=encoders or 0,
        )  # fmt: skip
        worker = ShardWorker(recipe, engine)
        worker.encoders = self.encoders.get(encoders)  # started before: a build starts them while its teacher loads
        jobs = ((shard, [self.prompts.documents[n] for n in members]) for shard, members in enumerate(plan.shards))
        started = time.perf_counter()
        if encoders is None:
            for _ in worker.finished(jobs, Progress(0, 0, 0)):
                pass
        else:
            worker.run(jobs, lambda *_: None, Progress(0, 0, 0))
        seconds = time.perf_counter() - started
        shutil.rmtree(recipe.output, ignore_errors=True)
        return seconds, np.array(engine.seconds)


def measure(given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    bench = Bench(given, folder)
    arms: dict[str, int | None] = {"client": None} | {
        f"{size} processes" if size else f"{WRITERS} threads": size for size in given.encoders
    }
    found: dict[str, list[tuple[float, np.ndarray]]] = {name: [] for name in arms}
    for repeat in range(given.repeats + 1):
        for name, encoders in arms.items():
            result = bench.arm(encoders)
            if repeat:  # the first round imports and compiles
                found[name].append(result)
    for encoders in bench.encoders.values():
        encoders.close()
    rows = given.prompts * (given.length - 1)
    return [
        {
            "arm": name,
            "profile": given.profile,
            "store": given.store,
            "k": given.k,
            "rows": rows,
            "repeats": given.repeats,
            "rows_per_second": round(rows / float(np.median([seconds for seconds, _ in results]))),
            "slowest": round(rows / max(seconds for seconds, _ in results)),
            "fastest": round(rows / min(seconds for seconds, _ in results)),
            "step_ms_p50": round(1e3 * float(np.percentile(np.concatenate([steps for _, steps in results]), 50)), 2),
            "step_ms_p99": round(1e3 * float(np.percentile(np.concatenate([steps for _, steps in results]), 99)), 2),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "versions": f"numpy {np.__version__}, zarr {zarr.__version__}",
        }
        for name, results in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--profile", default="compact")
    parser.add_argument("--store", default="zarr")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--documents-per-shard", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "client.csv")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(given, Path(folder))
    ResultTable(given.output).write(rows)
    for row in rows:
        print(
            f"{row['arm']:12} {row['rows_per_second']:>10,} rows/s   reading a prompt {row['step_ms_p50']:.2f} ms, "
            f"p99 {row['step_ms_p99']:.2f} ms"
        )


if __name__ == "__main__":
    main()
