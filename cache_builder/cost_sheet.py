"""What a build will read, store and cost, and after how many student epochs it has paid for itself.

Sizes are estimates from measured bytes per row; the speed is given, or probed with the real engine.

Legend: R rows of one window.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from cache_builder.engines.generating import Prompt
from cache_builder.preparation import Preparation
from cache_builder.shard_worker import ShardWorker, make_prompt
from storage_specs.errors import ConfigError
from storage_specs.windows import Window

# Bytes per row of values and tail, estimates: measured on 8,192 rows of Gemma-3-270M at k = 64 (design.md, section 4).
# All but the sketch, which keeps 16 ranks and 16 bins whatever k is, grow with k.
MEASURED_K = 64
VALUE_BYTES = {"exact": 256.0, "half": 87.0, "compact": 24.0, "sketch": 16.0}
ID_BYTES = 20.0 / 16  # per rank whose id is kept; 16 ids took 20 bytes in the same rows
OTHER_BYTES = 6.0  # per row: its place, the gold log-probability, its share of text and records
CAPTURE_RATIO = 0.88  # scoring with capture, codec and disk over prefill alone: an H200, 8B shape (bench_capture.py)
PROBED = 256  # documents that a probe takes its requests from
READ_BYTES_PER_SECOND = 200e6  # what a student's storage gives; local disks and object stores give more


@dataclass(frozen=True, kw_only=True)
class Workload:
    """documents, shards: to be done. text_bytes: UTF-8. tokens: read by the teacher, prefixes and overlaps included.

    rows: predictions kept. windows: model inputs. generates: rows are written by the teacher, and are at most so many;
    tokens counts them too.
    """

    documents: int
    shards: int
    text_bytes: int
    tokens: int
    rows: int
    windows: int
    generates: bool


def workload_of(prepared: Preparation, shards: range) -> Workload:
    """Of these shards of the plan, less those that an extended cache has. Tokenises all their documents.

    Raises TokenizerError, ChatTemplateError, ConfigError.
    """
    tokens = rows = windows = size = 0
    recipe = prepared.recipe
    taken_over = 0 if prepared.base is None else len(prepared.base.plan.shards)
    scored = [shard for shard in shards if shard >= taken_over]
    documents = [document for shard in scored for document in prepared.members(shard)]
    for document in tqdm(documents, unit="doc", disable=None):
        size += len(document.text.encode())
        if recipe.sampling is not None:
            prompt = make_prompt(recipe.cutter, document, recipe.sampling, 0, recipe.engine_config)
            windows, rows = windows + 1, rows + prompt.max_tokens
            tokens += len(prompt.ids) + prompt.max_tokens
            continue
        for window in recipe.cutter.windows(document):
            windows += 1
            tokens += len(window.ids)
            rows += len(window.target_ids)
    return Workload(
        documents=len(documents),
        shards=len(scored),
        text_bytes=size,
        tokens=tokens,
        rows=rows,
        windows=windows,
        generates=recipe.sampling is not None,
    )


def bytes_per_row(profile: str, k: int, k_ids: int) -> float:
    """An estimate, for a codec profile of VALUE_BYTES."""
    values = VALUE_BYTES[profile] * (1 if profile == "sketch" else k / MEASURED_K)
    return values + ID_BYTES * k_ids + OTHER_BYTES


def probe(ask: Callable[[list[Any]], int], requests: Sequence[Any], seconds: float) -> float:
    """Tokens per second of an engine at work for about `seconds`. ask: has requests done, and counts their tokens.

    The first request, for which weights are loaded and kernels compiled, is not timed. Batches double until half of the
    time is over; the last one, which took the most of it, counts. Raises EngineError; ConfigError without requests.
    """
    if not requests:
        raise ConfigError("nothing to probe with: no document has a token to score")
    ask([requests[0]])
    begun, size = time.monotonic(), 1
    while True:
        batch = [requests[number % len(requests)] for number in range(size)]
        started = time.monotonic()
        tokens = ask(batch)
        now = time.monotonic()
        if now - begun >= seconds / 2:
            return tokens / (now - started)
        size *= 2


def probed(prepared: Preparation, seconds: float) -> float:
    """`probe` with the build's own engine and first documents: read as they are, or answered in mode generate."""
    recipe, engine = prepared.recipe, prepared.engine
    documents = prepared.documents[:PROBED]

    def score(windows: list[Window]) -> int:
        list(engine.score(windows))
        return sum(len(window.ids) for window in windows)

    if recipe.sampling is None:
        return probe(score, [window for document in documents for window in recipe.cutter.windows(document)], seconds)
    generator = ShardWorker(recipe, engine).generator

    def generate(prompts: list[Prompt]) -> int:
        written = sum(len(made.scores.gold_logprob) for made in generator.generate(prompts))
        return written + sum(len(prompt.ids) for prompt in prompts)

    # a document that comes again is another sample
    prompts = [
        make_prompt(recipe.cutter, document, recipe.sampling, sample, recipe.engine_config)
        for sample, document in enumerate(documents)
    ]
    return probe(generate, prompts, seconds)


def break_even(tokens: int, stored: float, tokens_per_second: float) -> float | None:
    """Student epochs, summed over all students, after which the cache has cost less than a live teacher; None: never.

    A live teacher costs one forward pass over the tokens per epoch, `live`; the cache one scoring pass, `cache`, and
    per epoch the reading of its bytes, `read`. epochs * live = cache + epochs * read, solved for epochs.
    """
    cache = tokens / tokens_per_second
    live, read = cache * CAPTURE_RATIO, stored / READ_BYTES_PER_SECOND
    return cache / (live - read) if live > read else None


def describe(
    work: Workload, *, profile: str, k: int, k_ids: int, replicas: int, gpus: int, speed: tuple[float, str] | None
) -> str:
    """The sheet as text. gpus: of one replica. speed: tokens per second of one replica and where that is from."""
    bound, do = ("at most ", "read and write") if work.generates else ("", "read")
    lines = [
        f"documents   {work.documents:,} in {work.shards:,} shards, {work.text_bytes:,} bytes of text",
        f"tokens      {bound}{work.tokens:,} to {do}, in {work.windows:,} windows",
        f"rows        {bound}{work.rows:,} to keep",
        f"storage     estimates, from bytes per row measured at k = {MEASURED_K}",
        f"  {'profile':<10}{f'ids of the first {k_ids}':>30}{'no ids':>30}",
    ]
    for name in VALUE_BYTES:
        sizes = [bytes_per_row(name, k, ids) for ids in (k_ids, 0)]
        cells = "".join(f"{f'{_bytes(size * work.rows)} ({size:.0f} a row)':>30}" for size in sizes)
        lines.append(f"  {name:<10}{cells}" + (" <- this build" if name == profile else ""))
    if speed is None:
        return "\n".join([*lines, "time        unknown: give --tokens_per_second X, or --probe 30 to measure it"])
    rate, origin = speed
    hours = work.tokens / (rate * replicas) / 3600
    stored = bytes_per_row(profile, k, k_ids) * work.rows
    epochs = break_even(work.tokens, stored, rate * replicas)
    verdict = "never: reading takes longer than the live teacher" if epochs is None else f"after {epochs:.2f} epochs"
    return "\n".join(
        [
            *lines,
            f"time        {hours:,.2f} hours, {hours * replicas * gpus:,.2f} GPU-hours: {rate:,.0f} tokens per second "
            f"({origin}), {replicas} replicas of {gpus} GPUs",
            f"break-even  {verdict} of all students together = cache / (live - read)",
            f"  cache = tokens / speed = {work.tokens / (rate * replicas):,.1f} s, one pass",
            f"  live  = {CAPTURE_RATIO} * cache, one pass of a live teacher per epoch, which captures nothing"
            + (" and writes anew" if work.generates else ""),
            f"  read  = bytes / {READ_BYTES_PER_SECOND / 1e6:.0f} MB/s = "
            f"{stored / READ_BYTES_PER_SECOND:,.1f} s per epoch",
        ]
    )


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
