"""What capture costs: tokens a second of the vllm engine's routes as a ratio to the same engine doing prefill only.

    python scripts/bench_capture.py --shape qwen3-8b --k 64 128
    python scripts/bench_capture.py --shape qwen3-1.7b --vocabulary 262144 --k 256 --routes prefill,disk,sketch

Any model shape with dummy weights, one engine, one process, prompts of random ids. Routes, interleaved in every
repetition: `prefill` (one token is sampled, nothing kept), `rows` (rows reach the builder as arrays), `disk` (the
builder's own pipeline: scoring, reduction, transfer, codec, checksum, write and sync to a local disk, manifest),
`sketch` and `sketch-disk` (the same with 16 tail bins, and the codec of that profile). `flat` and `dicts` are vLLM's
own prompt log-probabilities, measured on fewer prompts. The CSV is rewritten after every measurement, so that a time
limit loses none. The head and the reduction alone are in scripts/bench_reduction.py, the client in bench_client.py.

    python scripts/bench_capture.py --show      # the ratio table of README.md, from the CSV
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from result_table import ResultTable, markdown, read_rows

from cache_builder.encoders import ShardEncoders, encoder_count
from cache_builder.engines.base import EngineConfig
from cache_builder.engines.vllm import VllmEngine
from cache_builder.progress import Progress
from cache_builder.shard_worker import Recipe, ShardWorker
from storage_specs.document import Document, text_document
from storage_specs.plan import make_plan
from storage_specs.settings import DEFAULT_PROFILE, CacheSettings
from storage_specs.sketch import log_rank_edges
from storage_specs.vocabulary import Vocabulary
from storage_specs.windows import Window

SHAPES = {
    "qwen3-8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "qwen3-1.7b": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
BINS = 16
NAMES = {
    "prefill": "prefill only",
    "dicts": "vLLM's `prompt_logprobs`, dicts",
    "flat": "vLLM's `prompt_logprobs`, flat",
    "rows": "ours, rows in memory",
    "disk": "ours, to disk",
    "sketch": "ours, rows with tail bins in memory",
    "sketch-disk": "ours with sketch, to disk",
}
ROUTES = ("prefill", "rows", "disk", "sketch-disk", "flat", "dicts")
ONCE = ("prefill", "flat", "dicts")  # for the first k only
FEWER_PROMPTS = {"flat": 4, "dicts": 12}  # a share of the prompts: these routes are slow, and only compared
BYTES_PER_TOKEN = 4


class RandomPrompts:
    """Documents whose tokens are random ids of four bytes each; stands where the builder has its `Cutter`."""

    def __init__(self, count: int, length: int, vocabulary: int) -> None:
        self.generator, self.length, self.vocabulary = np.random.default_rng(0), length, vocabulary
        letters = self.generator.integers(97, 123, (count, length * BYTES_PER_TOKEN), dtype=np.uint8)
        self.documents = [text_document(row.tobytes().decode()) for row in letters]

    def windows(self, document: Document) -> list[Window]:
        ids = self.generator.integers(0, self.vocabulary, self.length)
        row_R = np.arange(self.length - 1)
        return [
            Window(
                ids=ids,
                logits_index=row_R,
                target_ids=ids[1:],
                segment=np.zeros_like(row_R),
                token_start=(row_R + 1) * BYTES_PER_TOKEN,
                byte_start=(row_R + 1) * BYTES_PER_TOKEN,
                byte_end=(row_R + 2) * BYTES_PER_TOKEN,
                is_end=np.zeros(len(row_R), dtype=bool),
                row_in_segment=row_R,
                first_row=0,
            )
        ]


class Bench:
    """One loaded engine and the routes through it; each returns the seconds that `documents` took."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        shape = QWEN3 | SHAPES[arguments.shape] | ({"vocab_size": arguments.vocabulary} if arguments.vocabulary else {})
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(shape))
        self.config = EngineConfig(
            model=str(model),
            dtype="bfloat16",
            max_model_len=arguments.length + 1,
            k=max(arguments.k),
            vocab_size=shape["vocab_size"],
            arguments={"load_format": "dummy"} | dict(engine_argument(item) for item in arguments.engine),
        )
        self.engine = VllmEngine(self.config)
        words = [b"%d" % number for number in range(shape["vocab_size"])]
        self.vocabulary = Vocabulary(token_bytes=words, special_roles={})
        cases = [(route, k) for route in arguments.routes.split(",") if "disk" in route for k in arguments.k]
        self.settings = {case: self.settings_of(*case) for case in cases}
        self.encoders = {  # they start while the engine loads, as in a build
            case: ShardEncoders(settings, arguments.encoders)
            for case, settings in self.settings.items()
            if arguments.encoders
        }
        self.engine.load()  # for the largest k: vLLM refuses more later
        self.prompts = RandomPrompts(arguments.prompts, arguments.length, shape["vocab_size"])

    def settings_of(self, route: str, k: int) -> CacheSettings:
        edges = self.edges(route, k)
        return CacheSettings(
            teacher={}, tokenizer={}, chat_template=None, engine=self.engine.describe(), windows={}, k=k,
            k_ids=min(16, k), vocab_size=self.config.vocab_size, store=self.arguments.store,
            profile=self.arguments.sketch_profile if edges else self.arguments.profile,
            parameters={"rank_edges": list(edges)} if edges else {}, vocabulary=self.vocabulary,
        )  # fmt: skip

    def edges(self, route: str, k: int) -> tuple[int, ...] | None:
        sketch = route.startswith("sketch")
        return tuple(log_rank_edges(k, self.config.vocab_size, BINS).tolist()) if sketch else None

    def seconds(self, route: str, k: int, documents: list[Document]) -> float:
        self.engine.config = replace(self.config, k=k, rank_edges=self.edges(route, k))
        self.engine.start_capture()
        name = {"sketch-disk": "disk", "sketch": "rows"}.get(route, route)
        return {"prefill": self.prefill, "rows": self.rows, "disk": self.disk, "flat": self.flat, "dicts": self.dicts}[
            name
        ](documents)

    def prefill(self, documents: list[Document]) -> float:
        nothing = self.engine.parameters(prompt_logprobs=None)
        return self._drain(documents, lambda windows: self.engine.stream(windows, lambda *_: None, nothing))

    def rows(self, documents: list[Document]) -> float:
        return self._drain(documents, self.engine.score)

    def flat(self, documents: list[Document]) -> float:
        return self._drain(documents, self.engine.score_flat)

    def dicts(self, documents: list[Document]) -> float:
        self.engine.stop_capture()
        dicts = self.engine.parameters(flat_logprobs=False)
        return self._drain(documents, lambda windows: self.engine.stream(windows, lambda *_: None, dicts))

    def disk(self, documents: list[Document]) -> float:
        """What a build does from its windows to its manifest; its place is looked at before the engine loads."""
        output, config = self.folder / "cache", self.engine.config
        shutil.rmtree(output, ignore_errors=True)
        case = "sketch-disk" if config.rank_edges else "disk", config.k
        recipe = Recipe(
            output=output, settings=self.settings[case],
            plan=make_plan(documents, self.arguments.documents_per_shard), engine="vllm", engine_config=config,
            cutter=self.prompts, encoders=self.arguments.encoders,
        )  # fmt: skip
        worker = ShardWorker(recipe, self.engine)
        if self.encoders:
            worker.encoders = self.encoders[case]
        jobs = [(shard, [documents[number] for number in members]) for shard, members in enumerate(recipe.plan.shards)]
        writer = worker.writer
        started = time.perf_counter()
        worker.run(jobs, lambda *_: None, Progress(0, 0, 0))
        writer.finalize()
        return time.perf_counter() - started

    def close(self) -> None:
        for encoders in self.encoders.values():
            encoders.close()
        self.engine.close()

    def _drain(self, documents: list[Document], score: Callable[[Any], Any]) -> float:
        windows = [window for document in documents for window in self.prompts.windows(document)]
        started = time.perf_counter()
        for _ in score(windows):
            pass
        return time.perf_counter() - started


def engine_argument(text: str) -> tuple[str, Any]:
    name, has_value, value = text.partition("=")
    return name, value if has_value else True


def measure(bench: Bench, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One CSV row per route and k, ratios to the prefill of the same repetition; rewritten after every measurement."""
    routes = arguments.routes.split(",")
    cases = [(route, k) for k in arguments.k for route in routes if route not in ONCE or k == arguments.k[0]]
    few = bench.prompts.documents[: max(1, arguments.prompts // 12)]
    for route, k in cases:  # compile every kernel, fill every pool, start every process
        started = time.perf_counter()
        bench.seconds(route, k, few if route not in FEWER_PROMPTS else few[:1])
        print(f"warm: {route} k={k} {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    speeds: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    table, machine, rows = ResultTable(arguments.output), describe_machine(bench), []
    for repeat in range(arguments.repeats):
        for route, k in cases:
            documents = bench.prompts.documents[: max(1, arguments.prompts // FEWER_PROMPTS.get(route, 1))]
            speed = len(documents) * arguments.length / bench.seconds(route, k, documents)
            speeds[route, k].append(speed)
            print(f"{repeat}: {route} k={k} {speed:,.0f} tok/s", file=sys.stderr, flush=True)
            prefill = speeds["prefill", arguments.k[0]]
            rows = [
                _row(route, k, found, prefill, arguments) | machine for (route, k), found in speeds.items() if found
            ]
            table.write(rows)
    return rows


def _row(
    route: str, k: int, speeds: list[float], prefill: list[float], arguments: argparse.Namespace
) -> dict[str, Any]:
    ratios = [speed / base for speed, base in zip(speeds, prefill, strict=False)]  # the last round may be under way
    return {
        "shape": arguments.shape,
        "vocabulary": arguments.vocabulary or QWEN3["vocab_size"],
        "route": route,
        "k": 0 if route == "prefill" else k,
        "prompts": max(1, arguments.prompts // FEWER_PROMPTS.get(route, 1)),
        "length": arguments.length,
        "repeats": len(speeds),
        "tok_s_median": round(float(np.median(speeds))),
        "tok_s_min": round(min(speeds)),
        "tok_s_max": round(max(speeds)),
        "ratio_median": round(float(np.median(ratios)), 4),
        "store": arguments.store if "disk" in route else "",
        "encoders": arguments.encoders if "disk" in route else "",
        "documents_per_shard": arguments.documents_per_shard if "disk" in route else "",
    }


def describe_machine(bench: Bench) -> dict[str, Any]:
    import torch
    import triton

    query = ["nvidia-smi", "--query-gpu=name,memory.used", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
        name, used = lines[0].rsplit(", ", 1)
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        name, used = "no GPU", "0"
    return {
        "gpu": name,
        "gpu_mib_used": used,
        "engine_arguments": " ".join(bench.arguments.engine),
        "vllm": bench.engine.version,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--vocabulary", type=int, help="instead of the shape's own")
    parser.add_argument("--k", type=int, nargs="+", default=[64])
    parser.add_argument("--routes", default=",".join(ROUTES), help=f"comma-separated, of {', '.join(NAMES)}")
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--documents-per-shard", type=int, default=8)
    parser.add_argument("--encoders", type=int, default=encoder_count(1), help="processes that encode; 0: threads")
    parser.add_argument("--show", action="store_true", help="print README.md's table from the CSV, measure nothing")
    parser.add_argument("--store", default="zarr")
    parser.add_argument("--profile", default=DEFAULT_PROFILE)
    parser.add_argument("--sketch-profile", default="sketch")
    parser.add_argument("--engine", nargs="*", default=[], metavar="NAME[=VALUE]", help="vLLM engine arguments")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "capture.csv")
    arguments = parser.parse_args()
    if arguments.show:
        print(readme_table(read_rows(arguments.output)))
        return
    if "prefill" not in arguments.routes.split(","):
        parser.error("prefill must be among the routes: all ratios are to it")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        try:
            rows = measure(bench, arguments)
        finally:
            bench.close()
    for row in rows:
        print(
            f"{row['route']:12} k={row['k']:<4} {row['tok_s_median']:>9,} tok/s   {row['ratio_median']:.3f} of prefill"
        )


def readme_table(rows: list[dict[str, str]]) -> str:
    """The newest row of every shape, route and k, as a ratio to prefill only."""
    newest = {(row["shape"], row["vocabulary"], row["route"], row["k"]): row for row in rows}
    lines = [
        [row["shape"], f"{int(row['vocabulary']):,}", NAMES[row["route"]], row["k"] if row["k"] != "0" else "",
         f"{int(row['tok_s_median']):,}", f"{float(row['ratio_median']):.3f}", row["gpu"]]
        for row in newest.values()
    ]  # fmt: skip
    return markdown(["shape", "vocabulary", "route", "k", "tokens/s", "of prefill only", "GPU"], lines)


if __name__ == "__main__":
    main()
