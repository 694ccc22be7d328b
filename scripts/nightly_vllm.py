"""The vllm engine where it is hard, for real (CPU build): two ranks, preemption, and a build's self-check.

    python scripts/nightly_vllm.py                      # all cases, about 3 minutes on two cores
    python scripts/nightly_vllm.py --cases preempted_scoring

A random Qwen3 of four layers in float32, prompts that do not fit a step, top 64 and 16 tail bins; every row is compared
with transformers' forward pass. Cases, each in a process of its own, a CSV row each in scripts/results/vllm.csv:

    tensor_parallel        two processes share the model
    preempted_scoring      a key-value cache for a third of what is asked at once, prompts side by side
    preempted_generation   the same while completions grow; rows that the worker keeps
    self_check             `build` in bfloat16: the drift in its manifest

There is no case for pipeline parallelism: the CPU build of vLLM 0.32 has none (its runner asserts
`intermediate_tensors`, which only the start-up on a GPU makes).

`max_prob`, `max_bin`, `max_gold`: largest differences of any sorted probability, tail bin, gold log-probability (nats);
of the self-check: the 99th percentiles. A case fails where they exceed 1e-4, 1e-4, 1e-3 (the self-check: its limits),
or where nothing was preempted.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import demo_assets
import numpy as np
import torch
import transformers
from result_table import ResultTable

from cache_builder.engines import make_generator
from cache_builder.engines.base import EngineConfig, WindowScores
from cache_builder.engines.generating import Prompt
from cache_builder.engines.vllm import VllmEngine
from cache_builder.sampling import Sampling
from storage_specs.sketch import bin_masses, log_rank_edges
from storage_specs.windows import Window

VOCABULARY, K = 5000, 64
EDGES = tuple(log_rank_edges(K, VOCABULARY, 16).tolist())
LIMITS = {"max_prob": 1e-4, "max_bin": 1e-4, "max_gold": 1e-3}
LENGTHS = (200, 180, 31, 150, 2, 199, 64, 128)
SMALL_CACHE = {"block_size": "32", "num_gpu_blocks_override": "16", "max_num_batched_tokens": "64", "max_num_seqs": "6"}
CASES: dict[str, dict[str, str]] = {
    "tensor_parallel": {"tensor_parallel_size": "2", "max_num_batched_tokens": "64"},
    "preempted_scoring": SMALL_CACHE | {"long_prefill_token_threshold": "16"},
    "preempted_generation": SMALL_CACHE,
    "self_check": {},
}


def make_model(folder: Path) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    shape = transformers.Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, initializer_range=0.2, eos_token_id=None,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(shape).float().eval()
    model.save_pretrained(folder)
    return model


def run_case(name: str, folder: Path) -> dict[str, Any]:
    """What a case found. In this process; vLLM's core too where preemptions are counted."""
    if name == "self_check":
        return self_check(folder)
    model = make_model(folder / "model")
    engine = VllmEngine(
        EngineConfig(
            model=str(folder / "model"), dtype="float32", max_model_len=256, k=K, vocab_size=VOCABULARY,
            rank_edges=EDGES, arguments={"enforce_eager": True} | CASES[name],
        )
    )  # fmt: skip
    preempted = count_preemptions(engine) if name.startswith("preempted") else None
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, VOCABULARY, length) for length in LENGTHS]
    if name == "preempted_generation":
        asked = [Prompt(ids=ids, text="", turns=None, seed=0, max_tokens=50) for ids in prompts]
        made = make_generator("vllm", engine, Sampling(max_tokens=50), []).generate(iter(asked))
        scored = [
            (np.concatenate([ids, answer.ids]), len(ids) - 1, answer.scores)
            for ids, answer in zip(prompts, made, strict=True)
        ]
    else:
        found = engine.score([window_of(ids) for ids in prompts])
        scored = [(ids, 0, scores) for ids, scores in zip(prompts, found, strict=True)]
    differences = [difference(model, *row) for row in scored]
    engine.close()
    worst = {key: max(each[key] for each in differences) for key in LIMITS}
    good = all(worst[key] <= LIMITS[key] for key in LIMITS) and preempted != []
    return {
        "rows": sum(len(scores.gold_logprob) for *_, scores in scored),
        **{key: f"{value:.2e}" for key, value in worst.items()},
        "preemptions": "" if preempted is None else len(preempted),
        "passed": good and engine.flat_reason is None,
    }


def count_preemptions(engine: VllmEngine) -> list[str]:
    """The requests that the scheduler preempts from here on; its core must live in this process."""
    scheduler = engine.load().llm_engine.engine_core.engine_core.scheduler
    original, found = scheduler._preempt_request, list[str]()

    def preempt(request: Any, *arguments: Any, **named: Any) -> Any:
        found.append(request.request_id)
        return original(request, *arguments, **named)

    scheduler._preempt_request = preempt
    return found


def difference(
    model: transformers.PreTrainedModel, ids_L: np.ndarray, first: int, scores: WindowScores
) -> dict[str, float]:
    """Largest differences of the rows that follow positions `first` on."""
    with torch.inference_mode():
        logprobs_LV = model(torch.from_numpy(ids_L)[None]).logits[0, first:-1].double().log_softmax(-1).numpy()
    sorted_LV = np.sort(np.exp(logprobs_LV), axis=1)[:, ::-1]
    gold_L = logprobs_LV[np.arange(len(logprobs_LV)), ids_L[first + 1 :]]
    return {
        "max_prob": float(np.abs(scores.probs - sorted_LV[:, :K]).max()),
        "max_bin": float(np.abs(scores.tail_bins - bin_masses(sorted_LV, np.array(EDGES))).max()),
        "max_gold": float(np.abs(scores.gold_logprob - gold_L).max()),
    }


def self_check(folder: Path) -> dict[str, Any]:
    from cache_builder.build_config import BuildConfig
    from cache_builder.builder import build

    (folder / "corpus.txt").write_text("The river Aare flows through Bern, around three sides of its old town. " * 20)
    config = BuildConfig(
        teacher=str(demo_assets.smollm2_path()), corpus=str(folder / "corpus.txt"), output=folder / "cache",
        engine="vllm", dtype="bfloat16", max_model_len=256, engine_arguments={"enforce_eager": True},
    )  # fmt: skip
    drift = build(config).manifest.drift
    return {
        "rows": drift["rows"],
        "max_prob": f"{drift['probs']['p99']:.2e}",
        "max_bin": "",
        "max_gold": f"{drift['gold_logprob']['p99']:.2e}",
        "preemptions": "",
        "passed": drift["reference"] == "transformers float32" and drift["gold_logprob"]["p50"] > 0,
    }


def window_of(ids_L: np.ndarray) -> Window:
    index_R = np.arange(len(ids_L) - 1)
    return Window(
        ids=ids_L, logits_index=index_R, target_ids=ids_L[1:], segment=np.zeros_like(index_R), token_start=index_R,
        byte_start=index_R, byte_end=index_R + 1, is_end=np.zeros(len(index_R), bool), row_in_segment=index_R,
        first_row=0,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "vllm.csv")
    given = parser.parse_args()
    if given.work:
        name, folder = given.work
        (Path(folder) / "found.json").write_text(json.dumps(run_case(name, Path(folder))))
        return
    table, rows = ResultTable(given.output), []
    versions = {"machine": platform.machine(), "torch": torch.__version__, "transformers": transformers.__version__}
    for name in given.cases:
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if name.startswith("preempted") else "1",
        }
        if name.endswith("parallel"):
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"  # left alone, vLLM wants a NUMA node for each process
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, __file__, "--work", name, folder], env=environment, check=False)
            found = Path(folder) / "found.json"
            result = json.loads(found.read_text()) if found.exists() else {"passed": False}
        rows.append({"case": name} | result | {"seconds": round(time.monotonic() - started)} | versions)
        table.write(rows)
        print(rows[-1], flush=True)
    sys.exit(0 if all(row["passed"] for row in rows) else 1)


if __name__ == "__main__":
    main()
