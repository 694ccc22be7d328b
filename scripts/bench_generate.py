"""What keeping the teacher's distributions costs in mode generate: plain vLLM generation against ours, in one engine.

    python scripts/bench_generate.py --shape qwen3-8b                   # a GPU, dummy weights, about 3 minutes
    python scripts/bench_generate.py --shape tiny --prompts 8 --max_tokens 16 --repeats 2   # CPU build of vLLM

Run from the repository root (PYTHONPATH=. where the package is not installed). Completions have lengths drawn evenly
from a third of max_tokens to all of it, so that finished requests give way to others as in a long build, or
(`--lengths long_tail`) most are short and some many times as long, as where the teacher itself ends them. Arms, in
turns after a warm-up of each:

    plain     vLLM's own requests, tokens only: no log-probabilities, no seeds
    seeds     the same with a seed per request
    logprobs  vLLM's own log-probabilities of sampled tokens (`logprobs=k`, flat), our fallback; rows in memory
    kept      rows that the worker keeps; rows in memory
    ours      all that `cache-builder build --mode generate` does after tokenising: `kept` with seeds, documents, codec,
              checksums, shards on disk

A ratio of 1.1 means that an arm takes 1.1 times as long as `plain`. One line per arm goes to
scripts/results/generate.csv, rewritten after every measurement (--results names another file); `--show` prints
README.md's table from it.
"""

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_capture import BINS, engine_argument
from result_table import ResultTable, markdown, read_rows

from cache_builder.encoders import ShardEncoders, encoder_count
from cache_builder.engines import make_generator
from cache_builder.engines.base import EngineConfig
from cache_builder.engines.generating import Prompt
from cache_builder.engines.vllm import VllmEngine
from cache_builder.progress import Progress
from cache_builder.sampling import Sampling
from cache_builder.shard_worker import Recipe, ShardWorker
from storage_specs.document import Document, Message
from storage_specs.plan import make_plan
from storage_specs.settings import CacheSettings
from storage_specs.sketch import log_rank_edges

LENGTHS = ("even", "long_tail")
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "intermediate_size": 12288,
        "tie_word_embeddings": False,
    },
    "qwen3-1.7b": {
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 6144,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "intermediate_size": 256,
        "tie_word_embeddings": True,
        "head_dim": 32,
        "vocab_size": 8192,
    },
}
COMMON = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "hidden_act": "silu",
    "attention_bias": False,
    "torch_dtype": "bfloat16",
}
WARM_UP = 6  # a part of the prompts, in every arm, before any is measured
ARMS = {
    "plain": "plain generation",
    "seeds": "with a seed per request",
    "logprobs": "vLLM's `logprobs`, flat, rows in memory",
    "kept": "ours, rows in memory",
    "ours": "ours, to disk",
}


class BenchWorker(ShardWorker):
    """A worker whose prompts are random ids and whose words are all one letter: there is no tokenizer."""

    @cached_property
    def words(self) -> list[bytes | None]:
        return [b"w"] * self.recipe.settings.vocab_size

    def prompt(self, document: Document, sample: int) -> Prompt:
        vocabulary = self.recipe.settings.vocab_size
        return Prompt(
            ids=random_ids(document.metadata["number"], document.metadata["tokens"], vocabulary),
            text="",
            turns=None,
            seed=self.recipe.sampling.seed_of(document.doc_id, sample),
            max_tokens=document.metadata["length"],
        )


def length_of(number: int, longest: int, lengths: str) -> int:
    random = np.random.default_rng([number, longest])
    if lengths == "even":
        return int(random.integers(longest // 3, longest + 1))
    return int(min(longest, 1 + random.exponential(longest / 10)))


def random_ids(number: int, tokens: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, vocab_size, tokens)


def prompt_document(number: int, tokens: int, length: int) -> Document:
    text = f"prompt {number}"
    message = Message(role="prompt", byte_start=0, byte_end=len(text), scored=False)
    return Document(
        kind="completion",
        text=text,
        messages=(message,),
        metadata={"number": number, "tokens": tokens, "length": length},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--profile", default="compact", help="of the arm ours; sketch keeps tail bins in kept and ours")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--max_tokens", type=int, default=288)
    parser.add_argument("--lengths", choices=LENGTHS, default="even", help="of the completions")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--arms", default=",".join(ARMS), help="the first one has to be plain")
    parser.add_argument("--documents_per_shard", type=int, default=32)
    parser.add_argument("--encoders", type=int, default=encoder_count(1), help="processes that encode; 0: threads")
    parser.add_argument("--engine", nargs="*", default=[], metavar="NAME[=VALUE]", help="vLLM engine arguments")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "generate.csv")
    parser.add_argument("--show", action="store_true", help="print README.md's table from the CSV, measure nothing")
    given = parser.parse_args()
    if given.show:
        print(readme_table(read_rows(given.results)))
        return
    if given.arms.split(",")[0] != "plain":
        parser.error("--arms begins with plain: all ratios are to it")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given, Path(folder))
        try:
            rows = measure(bench, given)
        finally:
            bench.close()
    for row in rows:
        print(f"{row['arm']:<16} {row['median_s']:>8} s  {row['tokens_per_s']:>8} tok/s  ratio {row['ratio']}")


def readme_table(rows: list[dict[str, str]]) -> str:
    """The newest run of every shape and k; `plain` is the first row of each run, and all its ratios are to it."""
    newest: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        if row.get("lengths") != "long_tail":
            key = row["shape"], row["k"]
            newest[key] = [row] if row["arm"] == "plain" else [*newest[key], row]
    lines = [
        [row["shape"], row["k"], ARMS[row["arm"]], row["prompts"], row["tokens_per_s"], row["ratio"], row["machine"]]
        for run in newest.values()
        for row in run
    ]
    return markdown(["shape", "k", "", "prompts", "tokens/s", "time, to plain", "GPU"], lines)


class Bench:
    """One loaded engine, and the arms; each returns the tokens that it wrote."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.output = given, folder / "cache"
        shape = COMMON | SHAPES[given.shape]
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(shape))
        on_gpu = torch.cuda.is_available()
        edges = log_rank_edges(given.k, shape["vocab_size"], BINS).tolist() if given.profile == "sketch" else None
        self.config = EngineConfig(
            model=str(model),
            dtype="bfloat16" if on_gpu else "float32",
            max_model_len=given.prompt_tokens + given.max_tokens + 1,
            k=given.k,
            vocab_size=shape["vocab_size"],
            rank_edges=None if edges is None else tuple(edges),
            arguments={"load_format": "dummy"}
            | ({} if on_gpu else {"enforce_eager": True})
            | dict(engine_argument(item) for item in given.engine),
        )
        self.engine = VllmEngine(self.config)
        self.sampling = Sampling(max_tokens=given.max_tokens)
        self.settings = settings(self.config, self.sampling, given.profile)
        lengths = [length_of(number, given.max_tokens, given.lengths) for number in range(given.prompts)]
        self.documents = [prompt_document(number, given.prompt_tokens, length) for number, length in enumerate(lengths)]
        self.encoders = ShardEncoders(self.settings, given.encoders) if given.encoders else None
        worker = self.worker(self.documents)
        self.prompts = [worker.prompt(document, 0) for document in self.documents]

    def worker(self, documents: list[Document]) -> BenchWorker:
        recipe = Recipe(
            output=self.output,
            settings=self.settings,
            plan=make_plan(documents, self.given.documents_per_shard),
            engine="vllm",
            engine_config=self.config,
            cutter=None,  # type: ignore[arg-type]
            sampling=self.sampling,
            encoders=self.given.encoders,
        )
        worker = BenchWorker(recipe, self.engine)
        worker.encoders = self.encoders
        return worker

    def run(self, arm: str, count: int) -> int:
        """The tokens that the first `count` prompts were answered with."""
        self.engine.config = replace(self.config, rank_edges=None) if arm == "logprobs" else self.config
        if arm in ("plain", "seeds"):
            return self.vllm(self.prompts[:count], seeds=arm == "seeds")
        return self.ours(self.documents[:count]) if arm == "ours" else self.rows(self.prompts[:count], arm == "kept")

    def vllm(self, prompts: list[Prompt], *, seeds: bool) -> int:
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                temperature=1.0, max_tokens=prompt.max_tokens, seed=prompt.seed if seeds else None, detokenize=False
            )
            for prompt in prompts
        ]
        requests = [{"prompt_token_ids": prompt.ids.tolist()} for prompt in prompts]
        outputs = self.engine.load().generate(requests, parameters, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def rows(self, prompts: list[Prompt], kept: bool) -> int:
        generator = make_generator("vllm", self.engine, self.sampling, [])
        generator.kept, generator.seeds = kept, False
        return sum(len(generation.ids) for generation in generator.generate(iter(prompts)))

    def ours(self, documents: list[Document]) -> int:
        worker = self.worker(documents)
        shards = worker.recipe.plan.shards
        jobs = [(shard, [documents[number] for number in members]) for shard, members in enumerate(shards)]
        worker.run(jobs, lambda shard, work: None, Progress(0, 0, 0))
        rows = worker.writer.finalize().counts["rows"]
        shutil.rmtree(self.output)
        return rows

    def close(self) -> None:
        if self.encoders is not None:
            self.encoders.close()
        self.engine.close()


def measure(bench: Bench, given: argparse.Namespace) -> list[dict[str, Any]]:
    """All arms, in turns; the CSV is rewritten after every measurement."""
    arms = given.arms.split(",")
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    tokens: dict[str, int] = {}
    table, rows = ResultTable(given.results), []
    for arm in arms:  # compile every kernel, fill every batch
        bench.run(arm, max(1, given.prompts // WARM_UP))
    for repeat in range(given.repeats):
        for arm in arms:
            started = time.monotonic()
            tokens[arm] = bench.run(arm, given.prompts)
            seconds[arm].append(time.monotonic() - started)
            print(f"{repeat}: {arm} {seconds[arm][-1]:.2f} s", file=sys.stderr, flush=True)
            rows = [_row(bench, arm, times, seconds["plain"], tokens) for arm, times in seconds.items() if times]
            table.write(rows)
    if len(set(tokens.values())) > 1:
        raise SystemExit(f"the arms did not do the same work: {tokens}")
    return rows


def _row(bench: Bench, arm: str, times: list[float], plain: list[float], tokens: dict[str, int]) -> dict[str, Any]:
    given, median = bench.given, statistics.median(times)
    on_gpu = torch.cuda.is_available()
    return {
        "shape": given.shape,
        "k": given.k,
        "prompts": given.prompts,
        "prompt_tokens": given.prompt_tokens,
        "max_tokens": given.max_tokens,
        "arm": arm,
        "median_s": f"{median:.3f}",
        "min_s": f"{min(times):.3f}",
        "max_s": f"{max(times):.3f}",
        "tokens_per_s": f"{tokens[arm] / median:.0f}",
        "ratio": f"{statistics.median(mine / base for mine, base in zip(times, plain, strict=False)):.3f}",
        "machine": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "vllm": bench.engine.version,
        "torch": torch.__version__,
        "profile": given.profile,
        "lengths": given.lengths,
        "repeats": len(times),
        "encoders": given.encoders,
    }


def settings(config: EngineConfig, sampling: Sampling, profile: str) -> CacheSettings:
    """What a manifest needs; no ids, so that no vocabulary is."""
    return CacheSettings(
        teacher={"name": "dummy"},
        tokenizer={"digest": None},
        chat_template=None,
        engine={"name": "vllm"},
        k=config.k,
        k_ids=0,
        vocab_size=config.vocab_size,
        profile=profile,
        parameters={} if config.rank_edges is None else {"rank_edges": list(config.rank_edges)},
        windows={"max_model_len": config.max_model_len, "overlap": 0},
        generation=sampling.to_json(),
    )


if __name__ == "__main__":
    main()
