"""What learning from a cache costs beside plain fine-tuning: step time, waiting for data and memory, in one process.

    python scripts/bench_training.py                    # CUDA, bf16, ~3 minutes: two shapes
    python scripts/bench_training.py --shapes smollm2   # SmolLM2-135M's alone (llama1b: Llama-3.2-1B's)
    python scripts/bench_training.py --tiny             # CPU, seconds: that everything runs
    python scripts/bench_training.py --cache my-cache --tokenizer HuggingFaceTB/SmolLM2-135M   # real rows and text

Run from the repository root (PYTHONPATH=. where the package is not installed). Needs no network: weights are random,
tokenizers are trained on made-up text, a cache of made-up rows is written to a temporary folder. The arms take turns,
each for some steps of the same batches on the same weights:

    stock      transformers.Trainer, the model's own cross entropy
    ce         CachedDistillationTrainer, cross entropy alone
    ce+uld     --loss ce:1,uld:1.5; and so on (`ARMS`; what kl and jsd cost is bench_loss.py's)

Time of a step: between the ends of two steps on the device, without the first ones of a turn; every timed step of every
turn counts. Data wait: how long a step's batch was waited for, as a share of that step; on a GPU, which may still be
busy meanwhile, at most that much is lost. Appends a row for each arm to scripts/results/training.csv: ratios are of
medians.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from result_table import ResultTable, markdown, read_rows
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback

from distill import CachedDistillationTrainer, CachedDocuments, DistillationConfig
from storage_specs import CacheSettings, CacheWriter, make_plan, open_cache, render, text_document, token_bytes
from storage_specs.document import CachedDocument
from storage_specs.vocabulary import Vocabulary, tokenizer_digest

RESULTS = Path(__file__).parent / "results" / "training.csv"
ARMS = {
    "stock": None,
    "ce": "ce:1",
    "ce+uld": "ce:1,uld:1.5",
    "ce+mapped": "ce:1,mapped:1",
    "ce+uld+mapped": "ce:1,uld:1.5,mapped:1",
    "ce+hybrid": "ce:1,hybrid:1",
    "ce+likelihood": "ce:1,likelihood:1",
}
K, K_IDS = 64, 16


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A student's sizes, and what a step of it reads."""

    config: dict[str, Any]
    documents: int
    max_length: int


SHAPES = {
    "smollm2": Shape(
        config={
            "vocab_size": 49_152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        },
        documents=16,
        max_length=1024,
    ),
    "llama1b": Shape(
        config={
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        documents=8,
        max_length=1024,
    ),
    "tiny": Shape(
        config={
            "vocab_size": 2048,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        documents=4,
        max_length=64,
    ),
}


@dataclass(kw_only=True)
class Timings:
    """What the turns of one arm gave."""

    step_ms: list[float] = field(default_factory=list)
    waits_ms: list[float] = field(default_factory=list)  # of the same steps; none of stock
    peak_gib: float = 0.0

    @property
    def data_waits(self) -> tuple[float, float, float] | None:
        """Shares of the steps' time: of all of it, median and 99th percentile of single steps."""
        if not self.waits_ms:
            return None
        shares = np.divide(self.waits_ms, self.step_ms)
        return sum(self.waits_ms) / sum(self.step_ms), float(np.median(shares)), float(np.percentile(shares, 99))


class StepClock(TrainerCallback):
    """When each step ended on the device, told without waiting for it."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.ends: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.cuda:
            self.ends.append(torch.cuda.Event(enable_timing=True))
            self.ends[-1].record()
        else:
            self.ends.append(time.perf_counter())

    def step_ms(self, warm_up: int) -> list[float]:
        if self.cuda:
            torch.cuda.synchronize()
            gaps = [begin.elapsed_time(end) for begin, end in zip(self.ends, self.ends[1:], strict=False)]
        else:
            gaps = [(end - begin) * 1000 for begin, end in zip(self.ends, self.ends[1:], strict=False)]
        return gaps[warm_up - 1 :]


class Bench:
    """One shape: its model, its batches, and turns of its arms."""

    def __init__(
        self, name: str, options: argparse.Namespace, cache: Path, tokenizer: PreTrainedTokenizerFast, scratch: Path
    ) -> None:
        self.name, self.shape, self.options, self.scratch = name, SHAPES[name], options, scratch
        self.tokenizer = tokenizer
        self.device = "cuda" if torch.cuda.is_available() and not options.tiny else "cpu"
        torch.manual_seed(0)
        longest = {"max_position_embeddings": self.shape.max_length, "tie_word_embeddings": True}
        sizes = self.shape.config | {"vocab_size": max(self.shape.config["vocab_size"], len(tokenizer))}
        self.model = LlamaForCausalLM(LlamaConfig(**sizes, **longest)).to(self.device)
        self.documents = CachedDocuments(cache, ids=True)
        self.rows: list[dict[str, list[int]]] | None = None
        self.tokens = 0

    def trainer(self, arm: str) -> Trainer:
        steps = self.options.warm_up + self.options.steps
        common: dict[str, Any] = {
            "output_dir": str(self.scratch / "out"),
            "per_device_train_batch_size": self.shape.documents,
            "max_steps": steps,
            "learning_rate": 1e-5,
            "lr_scheduler_type": "constant",
            "bf16": self.device == "cuda",
            "use_cpu": self.device == "cpu",
            "logging_steps": self.options.warm_up,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_drop_last": True,
        }
        if arm == "stock":
            args = transformers.TrainingArguments(**common, train_sampling_strategy="sequential")
            trainer = Trainer(self.model, args, data_collator=self._pad, train_dataset=self.rows)
            trainer.remove_callback(transformers.PrinterCallback)
            return trainer
        threads = {"dataloader_num_workers": self.options.threads}
        args = DistillationConfig(**common, **threads, loss=ARMS[arm], max_length=self.shape.max_length)
        return CachedDistillationTrainer(self.model, args, self.documents, self.tokenizer)

    def read_batches(self) -> None:
        """The rows of every batch of a turn, in the order in which the cached trainers see them: stock's data set."""
        trainer, self.rows, labels = self.trainer("ce"), [], []
        wanted = (self.options.warm_up + self.options.steps) * self.shape.documents
        for micro_batch in trainer.batches:
            batch = trainer.data_collator(self.documents.__getitems__(micro_batch))
            if len(batch["input_ids"]) != len(micro_batch):
                raise SystemExit("a document is longer than a window: give documents of at most max_length tokens")
            sizes = batch["attention_mask"].sum(1).tolist()
            self.rows += [{"input_ids": ids[:n].tolist()} for ids, n in zip(batch["input_ids"], sizes, strict=True)]
            labels.append(len(batch["label_index_R"]))
            if len(self.rows) >= wanted:
                break
        else:
            raise SystemExit(f"the cache holds {len(self.rows)} documents, and a turn needs {wanted}")
        self.tokens = statistics.mean(labels)

    def check(self) -> None:
        """Both trainers must see the same loss on the first batch, or the times compare different work."""
        stock, own = self.trainer("stock"), self.trainer("ce")
        with torch.no_grad():
            first = stock._prepare_inputs(self._pad(self.rows[: self.shape.documents]))
            theirs = self.model(**first).loss.item()
            micro_batch = next(iter(own.batches))
            batch = own._prepare_inputs(own.data_collator(self.documents.__getitems__(micro_batch)))
            ours = own.compute_loss(self.model, batch).item()
        if abs(ours - theirs) > 1e-3 * theirs:
            raise SystemExit(f"cross entropy on the first batch: {theirs} (stock) and {ours} (ours)")

    def turn(self, arm: str, timings: Timings) -> None:
        """Some steps of one arm."""
        trainer, clock, waits = self.trainer(arm), StepClock(self.device == "cuda"), []
        trainer.add_callback(clock)
        if arm != "stock":
            add_wait = trainer.step_log.add_wait
            trainer.step_log.add_wait = lambda seconds: (waits.append(seconds * 1000), add_wait(seconds))
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.head_dtypes: set[torch.dtype] = set()
        hook = self.model.lm_head.register_forward_hook(lambda _, inputs, output: self.head_dtypes.add(output.dtype))
        trainer.train()
        hook.remove()
        timings.step_ms += clock.step_ms(self.options.warm_up)
        timings.waits_ms += waits[self.options.warm_up :]
        if self.device == "cuda":
            timings.peak_gib = max(timings.peak_gib, torch.cuda.max_memory_allocated() / 2**30)
        trainer.accelerator.free_memory()
        # accelerate prepares a model once: without its marks the next turn's trainer prepares it as its own.
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            self.model.__dict__.pop(name, None)
        wanted = torch.bfloat16 if self.device == "cuda" else torch.float32
        if self.head_dtypes != {wanted}:
            raise SystemExit(f"{arm}: the head computed in {self.head_dtypes}, not in {wanted}: nothing is compared")
        self.model.zero_grad(set_to_none=True)

    def run(self, until: float) -> dict[str, Timings]:
        """Rounds of turns of all arms; none is begun that would take longer than there is time, but for the first."""
        self.read_batches()
        self.check()
        timings, longest = {arm: Timings() for arm in self.options.arms}, 0.0
        for number in range(self.options.turns):
            began = time.perf_counter()
            if number and began + longest > until:
                print(f"{self.name}: {number} of {self.options.turns} rounds, for lack of time", flush=True)
                break
            for arm, found in timings.items():
                self.turn(arm, found)
                print(f"{self.name} {arm}: {statistics.median(found.step_ms):.2f} ms so far", flush=True)
            longest = max(longest, time.perf_counter() - began)
        return timings

    @staticmethod
    def _pad(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        input_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        labels = torch.full_like(input_ids, -100)
        for n, row in enumerate(rows):
            ids = torch.tensor(row["input_ids"])
            input_ids[n, : len(ids)], labels[n, : len(ids)] = ids, ids
        return {"input_ids": input_ids, "attention_mask": (labels != -100).long(), "labels": labels}


def made_up_words(count: int, random: np.random.Generator) -> list[str]:
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    sizes = random.integers(2, 10, count)
    return ["".join(random.choice(letters, size)) for size in sizes]


def train_tokenizer(text: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with an EOS."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        text,
        tokenizers.trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


def write_cache(
    path: Path, documents: int, tokens: int, per_shard: int, tiny: bool
) -> tuple[Path, PreTrainedTokenizerFast]:
    """A cache of made-up text and rows, each document nearly `tokens` tokens of the student, and its tokenizer."""
    random = np.random.default_rng(0)
    words = np.array(made_up_words(400 if tiny else 20_000, random))
    weights = 1 / np.arange(1, len(words) + 1)
    drawn = random.choice(words, size=(documents, tokens), p=weights / weights.sum())
    texts = [" ".join(row) for row in drawn]
    sample = texts[: max(8, documents // 8)]
    student, teacher = (train_tokenizer(sample, size) for size in ((500, 700) if tiny else (16_000, 24_000)))
    docs = []
    for text in texts:
        ends = np.array([end for _, end in student(text, return_offsets_mapping=True)["offset_mapping"]])
        docs.append(text_document(text[: ends[min(len(ends), tokens - 2) - 1]]))
    vocab_size = len(teacher)
    cached = [_with_rows(document, teacher, vocab_size, random) for document in docs]
    settings = CacheSettings(
        teacher={"name": "made-up"},
        tokenizer={"digest": tokenizer_digest(teacher)},
        chat_template=None,
        engine={"name": "made-up"},
        k=K,
        k_ids=K_IDS,
        vocab_size=vocab_size,
        windows={"max_model_len": tokens, "overlap": 64},
        vocabulary=Vocabulary(token_bytes=token_bytes(teacher), special_roles={teacher.eos_token_id: "eos"}),
    )
    plan = make_plan(cached, per_shard)
    writer = CacheWriter(path, settings, plan)
    for shard, members in enumerate(plan.shards):
        writer.write_shard(shard, [cached[number] for number in members])
    writer.finalize()
    return path, student


def _with_rows(document: Any, teacher: Any, vocab_size: int, random: np.random.Generator) -> CachedDocument:
    sequence = render(teacher, document)
    scored = sequence.scored.copy()
    scored[0] = False  # no BOS: nothing predicts the first token
    rows = int(scored.sum())
    falling_TK = np.sort(random.pareto(1.0, (rows, K)), axis=1)[:, ::-1] + 1e-3
    inside_T1 = random.uniform(0.7, 0.99, (rows, 1))
    probs_TK = (falling_TK / falling_TK.sum(1, keepdims=True) * inside_T1).astype(np.float32)
    return CachedDocument(
        kind=document.kind,
        text=document.text,
        messages=document.messages,
        metadata={},
        segment=sequence.segment[scored],
        byte_start=sequence.byte_start[scored],
        byte_end=sequence.byte_end[scored],
        is_end=sequence.is_end[scored],
        gold_logprob=np.full(rows, -2.0, dtype=np.float32),
        tail_mass=1 - probs_TK.sum(1),
        probs=probs_TK,
        token_ids=(random.integers(1, vocab_size // K_IDS, (rows, 1)) * K_IDS + np.arange(K_IDS)) % vocab_size,
    )


def report(bench: Bench, timings: dict[str, Timings], results: Path, cache: str, rows_per_shard: int) -> None:
    """Print and append what was found."""
    medians = {arm: statistics.median(found.step_ms) for arm, found in timings.items()}
    rows = []
    for arm, found in timings.items():
        times, median = sorted(found.step_ms), medians[arm]
        p10, p90 = times[len(times) // 10], times[-1 - len(times) // 10]
        waits = found.data_waits
        said = "-" if waits is None else "{:.2%} (a step: median {:.2%}, p99 {:.2%})".format(*waits)
        speed, of_stock, of_ce = bench.tokens / median * 1000, median / medians["stock"], median / medians["ce"]
        print(
            f"{bench.name:8s} {arm:14s} {median:9.2f} ms  [{p10:.2f}, {p90:.2f}]  {of_stock:.3f} of stock  "
            f"{of_ce:.3f} of ce  {speed:9.0f} tok/s  data wait {said}  {found.peak_gib:.2f} GiB",
            flush=True,
        )
        shares = ("", "", "") if waits is None else tuple(f"{wait:.5f}" for wait in waits)
        rows.append(
            {
                "shape": bench.name,
                "arm": arm,
                "documents": bench.shape.documents,
                "max_length": bench.shape.max_length,
                "tokens_per_step": f"{bench.tokens:.0f}",
                "median_ms": f"{median:.3f}",
                "p10_ms": f"{p10:.3f}",
                "p90_ms": f"{p90:.3f}",
                "steps": len(times),
                "of_stock": f"{of_stock:.4f}",
                "of_ce": f"{of_ce:.4f}",
                "tokens_per_second": f"{speed:.0f}",
                **dict(zip(("data_wait", "data_wait_median", "data_wait_p99"), shares, strict=True)),
                "peak_gib": f"{found.peak_gib:.3f}",
                "rows_per_shard": rows_per_shard,
                "threads": bench.options.threads,
                "cache": cache,
                "machine": torch.cuda.get_device_name() if bench.device == "cuda" else f"CPU {platform.machine()}",
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "triton": _triton_version(),
                "python": platform.python_version(),
                "date": time.strftime("%Y-%m-%d"),
            }
        )
    ResultTable(results).write(rows)


def readme_table(rows: Sequence[dict[str, str]]) -> str:
    """The newest row of every shape and arm."""
    newest = {(row["shape"], row["arm"]): row for row in rows}
    lines = [
        [row["shape"], f"`{row['arm']}`", f"{float(row['median_ms']):.0f} [{float(row['p10_ms']):.0f}, "
         f"{float(row['p90_ms']):.0f}]", f"{float(row['of_stock']):.3f}", f"{float(row['of_ce']):.3f}",
         f"{float(row['data_wait']):.2%}" if row["data_wait"] else "", f"{float(row['peak_gib']):.1f}", row["machine"]]
        for row in newest.values()
    ]  # fmt: skip
    header = ["shape", "arm", "ms a step [p10, p90]", "of stock", "of `ce`", "waited for data", "peak GiB", "GPU"]
    return markdown(header, lines)


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", default="smollm2,llama1b", help="comma-separated (default: smollm2,llama1b)")
    add("--tiny", action="store_true", help="a tiny shape on the CPU")
    add("--arms", default=",".join(ARMS), help="comma-separated; stock and ce are always there (default: all)")
    add("--threads", type=int, default=1, help="that prepare batches (1)")
    add("--turns", type=int, default=3, help="turns of each arm (3)")
    add("--steps", type=int, default=24, help="timed steps of a turn; the queue of batches must run dry in them (24)")
    add("--seconds", type=float, default=float("inf"), help="begin no round that would end later (no limit)")
    add("--warm_up", type=int, default=4, help="steps before them, and between two lines of the log (4)")
    add("--cache", type=Path, help="a cache of documents of at most 1024 tokens, instead of a made-up one")
    add("--tokenizer", help="the student's tokenizer for --cache: folder or hub name")
    add("--results", type=Path, default=RESULTS, help="CSV to append to")
    add("--show", action="store_true", help="print the table of distill/README.md from the CSV, measure nothing")
    options = parser.parse_args(arguments)
    if options.show:
        print(readme_table(read_rows(options.results)))
        return 0
    options.arms = [arm for arm in ARMS if arm in {"stock", "ce", *options.arms.split(",")}]
    began = time.perf_counter()
    names = ["tiny"] if options.tiny else options.shapes.split(",")
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if options.cache is not None:
            cache, tokenizer = options.cache, transformers.AutoTokenizer.from_pretrained(options.tokenizer)
        else:
            wanted = max(SHAPES[name].documents for name in names) * (options.warm_up + options.steps)
            length = max(SHAPES[name].max_length for name in names)
            # a tenth is held out
            cache, tokenizer = write_cache(
                scratch / "cache", int(wanted * 1.25) + 16, length, 8 if options.tiny else 32, options.tiny
            )
            print(f"cache of made-up rows written in {time.perf_counter() - began:.1f} s", flush=True)
        manifest = open_cache(cache).manifest
        rows_per_shard = manifest.counts["rows"] // len(open_cache(cache).documents_per_shard)
        for number, name in enumerate(names, start=1):
            until = began + options.seconds * number / len(names)
            bench = Bench(name, options, cache, tokenizer, scratch)
            report(bench, bench.run(until), options.results, manifest.teacher["name"], rows_per_shard)
            del bench
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
