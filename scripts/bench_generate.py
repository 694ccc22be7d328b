"""What keeping the teacher's distributions costs in mode generate: plain vLLM generation against ours, in one engine.

    python scripts/bench_generate.py --shape qwen3-8b                   # a GPU, dummy weights, about 3 minutes
    python scripts/bench_generate.py --shape tiny --prompts 8 --max_tokens 16 --repeats 2   # CPU build of vLLM

Run from the repository root (PYTHONPATH=. where the package is not installed). "plain" is `LLM.generate` without
log-probabilities, tokens only, no seeds. "ours" is all that `cache-builder build --mode generate` does after
tokenising: sampling with a seed per request, rows of every sampled token, documents, codec, checksums, shards on disk.
Both run in turns after a warm-up of each; a ratio of 1.1 means that ours takes 1.1 times as long. One line per
arm is printed and appended to scripts/results/generate.csv (--results names another file).
"""

import argparse
import csv
import json
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_builder.engines.base import EngineConfig
from cache_builder.engines.generating import Prompt
from cache_builder.engines.vllm import VllmEngine
from cache_builder.progress import Progress
from cache_builder.sampling import Sampling
from cache_builder.shard_worker import Recipe, ShardWorker
from storage_specs.document import Document, Message
from storage_specs.plan import make_plan
from storage_specs.settings import CacheSettings

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
FIELDS = ("shape", "k", "prompts", "prompt_tokens", "max_tokens", "arm", "median_s", "min_s", "max_s", "tokens_per_s")
FIELDS += ("ratio", "machine", "vllm", "torch")


class BenchWorker(ShardWorker):
    """A worker whose prompts are random ids and whose words are all one letter: there is no tokenizer."""

    words = property(lambda self: [b"w"] * self.recipe.settings.vocab_size)  # type: ignore[assignment]

    def prompt(self, document: Document, sample: int) -> Prompt:
        number, sampling = int(document.metadata["number"]), self.recipe.sampling
        return Prompt(
            ids=random_ids(number, document.metadata["tokens"], self.recipe.settings.vocab_size),
            text="",
            turns=None,
            seed=sampling.seed_of(document.doc_id, sample),
            max_tokens=sampling.max_tokens,
        )


def random_ids(number: int, tokens: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, vocab_size, tokens)


def prompt_document(number: int, tokens: int) -> Document:
    text = f"prompt {number}"
    message = Message(role="prompt", byte_start=0, byte_end=len(text), scored=False)
    return Document(kind="completion", text=text, messages=(message,), metadata={"number": number, "tokens": tokens})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--max_tokens", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seeds", choices=("own", "none"), default="own", help="ours: a seed per request, or none")
    parser.add_argument("--documents_per_shard", type=int, default=64)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "generate.csv")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(given, Path(folder))
    new = not given.results.exists()
    given.results.parent.mkdir(parents=True, exist_ok=True)
    with given.results.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(f"{row['arm']:<16} {row['median_s']:>8} s  {row['tokens_per_s']:>8} tok/s  ratio {row['ratio']}")


def measure(given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Both arms, in turns."""
    from vllm import SamplingParams

    shape = COMMON | SHAPES[given.shape]
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(shape))
    arguments = {"load_format": "dummy"} | ({} if torch.cuda.is_available() else {"enforce_eager": True})
    config = EngineConfig(
        model=str(model),
        dtype="bfloat16" if torch.cuda.is_available() else "float32",
        max_model_len=given.prompt_tokens + given.max_tokens + 1,
        k=given.k,
        vocab_size=shape["vocab_size"],
        arguments=arguments,
    )
    engine = VllmEngine(config)
    documents = [prompt_document(number, given.prompt_tokens) for number in range(given.prompts)]
    sampling = Sampling(max_tokens=given.max_tokens)
    ids = [random_ids(number, given.prompt_tokens, config.vocab_size).tolist() for number in range(given.prompts)]
    plain_parameters = SamplingParams(
        temperature=1.0, max_tokens=given.max_tokens, min_tokens=given.max_tokens, ignore_eos=True, detokenize=False
    )

    def plain() -> int:
        prompts = [{"prompt_token_ids": one} for one in ids]
        outputs = engine.load().generate(prompts, plain_parameters, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def ours() -> int:
        output = folder / "cache"
        recipe = Recipe(
            output=output,
            settings=settings(config, sampling),
            plan=make_plan(documents, given.documents_per_shard),
            engine="vllm",
            engine_config=config,
            cutter=None,  # type: ignore[arg-type]
            sampling=sampling,
        )
        worker = BenchWorker(recipe, engine)
        worker.generator.seeds = given.seeds == "own" and worker.generator.seeds
        jobs = [(shard, [documents[number] for number in members]) for shard, members in enumerate(recipe.plan.shards)]
        worker.run(jobs, lambda shard, work: None, Progress(0, 0, 0))
        rows = worker.writer.finalize().counts["rows"]
        shutil.rmtree(output)
        return rows

    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    tokens = {}
    for repeat in range(given.repeats + 1):
        for name, arm in (("plain", plain), ("ours", ours)):
            started = time.monotonic()
            tokens[name] = arm()
            if repeat:  # the first round compiles
                seconds[name].append(time.monotonic() - started)
    if tokens["plain"] != tokens["ours"]:
        raise SystemExit(f"the arms did not do the same work: {tokens}")
    base = statistics.median(seconds["plain"])
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return [
        {
            "shape": given.shape,
            "k": given.k,
            "prompts": given.prompts,
            "prompt_tokens": given.prompt_tokens,
            "max_tokens": given.max_tokens,
            "arm": name if given.seeds == "own" else f"{name}, no seeds",
            "median_s": f"{statistics.median(times):.3f}",
            "min_s": f"{min(times):.3f}",
            "max_s": f"{max(times):.3f}",
            "tokens_per_s": f"{tokens[name] / statistics.median(times):.0f}",
            "ratio": f"{statistics.median(times) / base:.3f}",
            "machine": machine,
            "vllm": engine.version,
            "torch": torch.__version__,
        }
        for name, times in seconds.items()
    ]


def settings(config: EngineConfig, sampling: Sampling) -> CacheSettings:
    """What a manifest needs; no ids, so that no vocabulary is."""
    return CacheSettings(
        teacher={"name": "dummy"},
        tokenizer={"digest": None},
        chat_template=None,
        engine={"name": "vllm"},
        k=config.k,
        k_ids=0,
        vocab_size=config.vocab_size,
        windows={"max_model_len": config.max_model_len, "overlap": 0},
        generation=sampling.to_json(),
    )


if __name__ == "__main__":
    main()
