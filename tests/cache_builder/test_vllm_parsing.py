"""The vllm engine without vLLM: flat log-probs are parsed, sampled rows kept, and what cannot be is refused."""

import math
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from vllm_windows import window_of

from cache_builder.engines import make_engine
from cache_builder.engines.base import EngineConfig
from cache_builder.engines.generating import Prompt
from cache_builder.engines.vllm import VllmEngine, parse_flat
from cache_builder.engines.vllm_failures import failure
from cache_builder.engines.vllm_generate import VllmGenerator
from cache_builder.engines.vllm_sampled import (
    CompletionRows,
    SampledRows,
    Step,
    flat_rows_of,
    hook_sampler,
    release_sampler,
)
from cache_builder.main import main
from cache_builder.sampling import Sampling
from storage_specs.errors import ConfigError, DeviceMemoryError, EngineError


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_logprobs", "5", "max_logprobs is not passed to vLLM"),
        ("spec_method", "ngram", "spec_method is not passed to vLLM.*speculation corrupts"),
        ("hf_token", "hf_very_secret", "hf_token is not passed to vLLM.*HF_TOKEN"),
        ("kv_sharing_fast_prefill", True, "computes wrong prompt log-probabilities"),
        ("pipeline_parallel_size", "2", "vLLM's CPU build starts with 1 only"),
        ("hf_overrides", "[1]", "must be a JSON object"),
        ("enforce_eager", "maybe", "vLLM does not take --enforce-eager maybe: unrecognized arguments: maybe"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # vLLM's imports
def test_arguments_that_cannot_be_are_refused_before_vllm_starts(
    name: str, value: str | bool, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = EngineConfig(model="m", dtype="float32", max_model_len=8, k=2, vocab_size=9, arguments={name: value})
    with pytest.raises(ConfigError, match=message) as caught:
        make_engine("vllm", config)
    assert "secret" not in str(caught.value)
    assert "usage" not in capfd.readouterr().err


def test_a_missing_or_old_vllm_is_an_engine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(model="m", dtype="float32", max_model_len=8, k=2, vocab_size=9)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EngineError, match=r"pip install \.\[teacher\]"):
        make_engine("vllm", config)
    old = types.ModuleType("vllm")
    old.__version__ = "0.9.2.dev1+cpu"
    monkeypatch.setitem(sys.modules, "vllm", old)
    with pytest.raises(EngineError, match=r"vLLM 0\.9\.2.* is too old"):
        make_engine("vllm", config)


def test_vllm_flags_without_vllm_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache_builder.engines.vllm.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="unknown option 'documents_per_shards'; did you mean 'documents_per_shard'"):
        main(["build", "--teacher", "x", "--corpus", "y", "--output", "z", "--documents-per-shards", "3"])


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.", "raise --gpu-memory-"),
        (
            "1 GiB KV cache is needed, which is larger than the available KV cache memory (0 GiB).",
            "raise --gpu-memory-",
        ),
        (
            "Free memory on device (1/80 GiB) on startup is less than desired.",
            "lower --gpu-memory-utilization (now 0.9)",
        ),
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", "lower --gpu-memory-utilization (now 0.9)"),
    ],
)
def test_memory_that_vllm_lacks_has_a_remedy(said: str, remedy: str) -> None:
    found = failure("teacher m: vLLM cannot load it", ValueError(said), {"gpu_memory_utilization": 0.9})
    assert isinstance(found, DeviceMemoryError)
    assert str(found).startswith("teacher m: vLLM cannot load it: out of memory (")
    assert f"the same command goes on: {remedy}" in str(found)
    assert "--max-num-batched-tokens" in str(found)


class Hooked(VllmEngine):
    """Beside a worker that says what it is told to say of `capture_start`, or raises it; `told`: what it was asked."""

    def __init__(self, answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cache_builder.engines.vllm.keep_arrays", lambda: None)
        self.config = EngineConfig(model="m", dtype="bfloat16", max_model_len=9, k=1, vocab_size=9)
        self.arguments, self.flat_reason, self.answer, self.told = {}, None, answer, list[str]()
        self._captures, self._llm = False, types.SimpleNamespace(collective_rpc=self.collective_rpc)

    def collective_rpc(self, name: str, args: Any = ()) -> list[Any]:
        self.told.append(name)
        if name == "capture_start" and isinstance(self.answer, Exception):
            raise self.answer
        return [self.answer]

    def parameters(self, **changed: Any) -> None:
        return None

    def stream(self, *_: Any) -> Any:
        raise RuntimeError("it died")
        yield


def test_memory_that_a_block_of_logits_lacks_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = RuntimeError("Call to collective_rpc method failed: CUDA out of memory. Tried to allocate 640.00 MiB.")
    engine = Hooked(lacking, monkeypatch)
    with pytest.raises(DeviceMemoryError, match=r"teacher m: vLLM cannot score: out of memory.*lower --gpu-memory"):
        engine.score([])
    engine.answer = None
    with pytest.raises(RuntimeError, match="it died"):
        next(engine.score([]))
    assert engine.told == ["capture_start", "capture_start"]


def test_a_route_that_fails_starts_no_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is raised is what happened; the hooks come back when rows are asked of them again."""
    engine = Hooked(None, monkeypatch)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="it died"):
            next(engine.score_flat([]))
    assert engine.told == ["capture_stop", "capture_stop"]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="it died"):
            next(engine.score([]))
    assert engine.told == ["capture_stop", "capture_stop", "capture_start"]


def test_other_failures_of_vllm_are_told_as_they_are() -> None:
    unknown = failure("x", RuntimeError("It ended. See root cause above."), {"gpu_memory_utilization": 0.9})
    assert isinstance(unknown, EngineError)
    assert str(unknown).startswith(
        "x: RuntimeError: It ended. See root cause above; where it is memory that it lacks, lower --gpu-memory-utiliz"
    )
    assert str(failure("x", ValueError("bad flag"), {})) == "x: ValueError: bad flag"


def flat_of(entries: list[list[tuple[int, float]]]) -> Any:
    """What vLLM's FlatLogprobs holds for positions 0, 1, ..."""
    starts = np.cumsum([0, *map(len, entries)])[:-1].tolist()
    joined = [entry for position in entries for entry in position]
    return types.SimpleNamespace(
        start_indices=starts, token_ids=[token for token, _ in joined], logprobs=[value for _, value in joined]
    )


def test_flat_logprobs_are_parsed_by_position_and_their_shape_is_checked() -> None:
    config = EngineConfig(model="m", dtype="float32", max_model_len=8, k=2, vocab_size=9)
    a, b, c = float(np.log(0.5)), float(np.log(0.25)), float(np.log(0.125))
    entries = [[], [(5, c), (7, b), (3, a)], [(7, a), (7, a), (1, b)], [(2, b), (2, b), (1, b)]]
    window = window_of([4, 5, 7, 2])
    scores = parse_flat(flat_of(entries), window, config)
    np.testing.assert_allclose(scores.gold_logprob, [c, a, b])
    np.testing.assert_allclose(scores.probs, [[0.5, 0.25], [0.5, 0.25], [0.25, 0.25]])
    assert scores.token_ids.tolist() == [[3, 7], [7, 1], [1, 2]]
    np.testing.assert_allclose(scores.tail_mass, [0.25, 0.25, 0.5])
    assert parse_flat(flat_of(entries), window_of([4, 5, 7, 2], every=2), config).token_ids.tolist() == [[3, 7], [1, 2]]
    for wrong in (entries[:3], [*entries, entries[1]], [[], entries[1], entries[2], entries[3][:2]]):
        with pytest.raises(EngineError, match="expected 3 for each token after the first"):
            parse_flat(flat_of(wrong), window, config)
    with pytest.raises(EngineError, match="not that of the prompt's own token"):
        parse_flat(flat_of(entries), window_of([4, 5, 6, 2]), config)


def test_rows_that_are_laid_out_otherwise_are_refused() -> None:
    flat = types.SimpleNamespace(token_ids=[3, 1, 2, 3, 2, 1], logprobs=[-1.0, -0.5, -1.5] * 2)
    ids, values = flat_rows_of(flat, np.array([3, 3]), 2)
    assert (ids.tolist(), values.dtype) == ([[3, 1, 2], [3, 2, 1]], np.float32)
    for wrong in ([3], [3, 1]):
        with pytest.raises(ValueError, match="rows for"):
            flat_rows_of(flat, np.array(wrong), 2)


def test_steps_are_taken_once_and_sorted_out_by_request() -> None:
    """Two requests, the second of which reads its prompt in the first step; names end where vLLM adds its own."""
    kept, generator = SampledRows(2, (2, 5)), torch.Generator().manual_seed(0)
    logits_SBV = torch.randn(4, 2, 5, generator=generator)
    rows = CompletionRows(2, 1)
    for name in ("a", "b", "c"):
        rows.expect(name)
    for step, logits_BV in enumerate(logits_SBV):
        sampled_B = torch.tensor([step, 4 - step])
        kept.keep(["a#-12ab", "b#"], logits_BV, sampled_B, torch.tensor([True, step > 0]))
        if step == 1:
            rows.add(kept.take(False))
    kept.keep(["a#-12ab"], logits_SBV[0, :1], torch.tensor([0]), torch.tensor([True]))  # as it ended
    chunks = kept.take(True)
    assert [names for names, _ in chunks] == [["a#-12ab", "b#"], ["a#-12ab"]]
    rows.add(chunks)
    assert (kept.take(True), [rows.count(name) for name in "abc"]) == ([], [5, 3, 0])
    values_GW, ids_GK = rows.pop("a", np.array([0, 1, 2]))
    sorted_GV = logits_SBV[:3, 0].log_softmax(-1).sort(descending=True)
    np.testing.assert_allclose(values_GW[:, 1:3], sorted_GV.values[:, :2], atol=1e-6)
    np.testing.assert_allclose(values_GW[:, 3], 1 - sorted_GV.values[:, :2].exp().sum(1), atol=1e-6)
    np.testing.assert_allclose(values_GW[:, 0], logits_SBV[:3, 0].log_softmax(-1).diagonal(), atol=1e-6)
    assert ids_GK.tolist() == sorted_GV.indices[:, :2].tolist()
    assert rows.pop("b", np.array([3, 2, 1]))[0].shape == (3, 4)
    rows.add(chunks)  # what comes late, of a request that is done
    assert "a" not in rows.parts


@pytest.mark.parametrize("wrong", [[3, 2, 1, 0, 0], [3, 3]])
def test_rows_of_other_tokens_are_refused(wrong: list[int]) -> None:
    kept, rows = SampledRows(2, None), CompletionRows(2, 0)
    rows.expect("a")
    for token in (3, 2, 1):
        kept.keep(["a#"], torch.randn(1, 5), torch.tensor([token]), torch.tensor([True]))
    rows.add(kept.take(True))
    with pytest.raises(ValueError, match="which are not"):
        rows.pop("a", np.array(wrong))


@pytest.mark.parametrize(("wait", "taken"), [(False, 1), (True, 3)])
def test_steps_under_way_are_waited_for_only_where_that_is_asked(wait: bool, taken: int) -> None:
    rows = SampledRows(2, None)
    for done in (True, False, True):  # a device is done with its steps in order
        ready = types.SimpleNamespace(query=lambda done=done: done, synchronize=lambda: None)
        rows.open.append(Step(["a#"], torch.zeros(1, 6, dtype=torch.int32), ready))
    assert [len(packed) for _, packed in rows.take(wait)] == [taken * 6 * 4]
    assert len(rows.open) == 3 - taken


class Sampler:
    """As the V2 runner's: takes logits, and may change them in place."""

    def __call__(self, logits: torch.Tensor, input_batch: Any) -> Any:
        sampled_B1 = logits.argmax(dim=1, keepdim=True)
        logits.zero_()
        return types.SimpleNamespace(sampled_token_ids=sampled_B1, num_sampled=torch.ones(len(logits)))


def test_the_v2_sampler_is_seen_and_let_go() -> None:
    runner = types.SimpleNamespace(sampler=Sampler(), prompt_logprobs_worker=None)
    batch = types.SimpleNamespace(req_ids=["a#", "b#"])
    logits_BV = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # hooked anew, it is hooked once
        rows = SampledRows(3, None)
        hook_sampler(runner, rows)
    output = runner.sampler(logits_BV.clone(), batch)
    completions = CompletionRows(3, 0)
    completions.expect("b")
    completions.add(rows.take(True))
    values_GW, _ = completions.pop("b", output.sampled_token_ids[1].numpy())
    expected_V = logits_BV[1].log_softmax(-1)
    np.testing.assert_allclose(values_GW[0], expected_V.max().repeat(1).tolist() + expected_V.topk(3).values.tolist())
    release_sampler(runner)
    assert type(runner.sampler) is Sampler
    with pytest.raises(TypeError, match="expected self, logits, input_batch"):
        hook_sampler(types.SimpleNamespace(sampler=len, prompt_logprobs_worker=None), rows)


@pytest.mark.parametrize(("seeds_kill", "expected"), [(True, {"seed": 2**31 - 1}), (False, {})])
def test_where_samples_have_no_seeds_the_first_one_seeds_the_engine(
    seeds_kill: bool, expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else --seed would change nothing on a CPU, and two replicas would write the same samples of a prompt."""

    def load() -> None:
        raise EngineError("far enough")

    monkeypatch.setattr("cache_builder.engines.vllm_generate.is_cpu_build", lambda: seeds_kill)
    engine: Any = types.SimpleNamespace(flat_reason=None, arguments={}, is_loaded=False, load=load)
    prompts = [Prompt(ids=np.arange(2), text="", turns=None, seed=seed, max_tokens=1) for seed in (2**63 - 1, 5)]
    generator = VllmGenerator(engine, Sampling(), [])
    with pytest.raises(EngineError, match="far enough"):
        next(generator.generate(iter(prompts)))
    assert engine.arguments == expected
    assert [prompt.seed for prompt in generator._seeding(iter(prompts))] == [2**63 - 1, 5]


class TwoSlots(VllmGenerator):
    """With an engine of two slots in which a prompt takes as many steps as it may have tokens; no rows are kept."""

    def __init__(self) -> None:
        self.steps, self.asked = 0, list[list[Any]]()
        scheduler = types.SimpleNamespace(max_num_seqs=2)
        core = types.SimpleNamespace(
            vllm_config=types.SimpleNamespace(scheduler_config=scheduler),
            add_request=lambda name, request, tokens: self.asked.append([name, tokens]),
            step=self.step,
            abort_request=lambda names: None,
        )
        llm = types.SimpleNamespace(llm_engine=core, collective_rpc=lambda name: None)
        engine: Any = types.SimpleNamespace(
            flat_reason="not here", is_loaded=True, config=types.SimpleNamespace(k=1, bins=0), load=lambda: llm,
            ask=lambda call, *arguments: call(*arguments),
        )  # fmt: skip
        super().__init__(engine, Sampling(), [])

    def step(self) -> list[Any]:
        self.steps += 1
        for request in self.asked[:2]:
            request[1] -= 1
        over = [name for name, left in self.asked[:2] if not left]
        self.asked = [request for request in self.asked if request[0] not in over]
        return [types.SimpleNamespace(request_id=name, finished=True, outputs=[None]) for name in over]

    def _keep_rows(self, llm: Any) -> None:
        pass

    def _parameters(self, prompt: Prompt) -> int:
        return prompt.max_tokens

    def _generation(self, name: str, *rest: Any) -> Any:
        return types.SimpleNamespace(scores=types.SimpleNamespace(nbytes=10), name=name)


@pytest.mark.parametrize(("waiting", "steps"), [(2 << 30, 30), (4 * 10, 30 + 23 / 2)])
def test_a_long_completion_holds_nobody_up(waiting: int, steps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 steps, and meanwhile thirty of one each in the other slot; where but four may wait, three more are with the
    engine by then, and 23 are left for two slots."""
    monkeypatch.setattr("cache_builder.engines.vllm_generate.BYTES_WAITING", waiting)
    lengths = [30] + 30 * [1]
    generator = TwoSlots()
    prompts = [Prompt(ids=np.arange(2), text="", turns=None, seed=0, max_tokens=count) for count in lengths]
    written = [generation.name for generation in generator.generate(iter(prompts))]
    assert written == [f"prompt-{number}" for number in range(31)]
    assert generator.steps == math.ceil(steps)
