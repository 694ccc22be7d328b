"""Mode generate with vLLM: rows of the sampled tokens from the pass that samples them.

The worker keeps them (`vllm_sampled`); where its hook does not fit this vLLM they come from the public `logprobs=k`
with `flat_logprobs`, which costs more and knows no tail bins. Requests are streamed: twice as many as vLLM runs at a
time are with it, so that a finished one is replaced at once. Completions leave in the order of their prompts; those
that wait for an older, longer one hold nobody up until they take BYTES_WAITING.

Legend: G tokens of a completion, K top-k ranks.
"""

import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice
from typing import Any

import numpy as np

from cache_builder.engines.base import ordered_scores, window_scores
from cache_builder.engines.generating import Generation, Prompt, StopStrings
from cache_builder.engines.vllm import VllmEngine, is_cpu_build
from cache_builder.engines.vllm_sampled import SEPARATOR, CompletionRows, flat_rows_of
from cache_builder.sampling import Sampling
from storage_specs.errors import EngineError

BYTES_WAITING = 2 << 30  # what an interruption may cost beside the open shards
TAKEN_AT_ONCE = 16  # steps whose rows are fetched together: each time waits for a step to end


class VllmGenerator:
    """Writes with the engine's `LLM`. `kept`: whether the worker keeps the rows; flat log-probabilities otherwise."""

    def __init__(self, engine: VllmEngine, sampling: Sampling, words: list[bytes | None]) -> None:
        self.engine, self.sampling, self.words = engine, sampling, words
        # CPU builds die of a seeded request whose prompt is read in two steps (V1 winds its generator back, which torch
        # cannot on a CPU). There the engine's own seed decides, that of the first sample: other --seed, other samples,
        # and replicas, which begin with different ones, never draw alike.
        self.seeds = not is_cpu_build()
        self.kept = engine.flat_reason is None
        self._requests = 0

    def generate(self, prompts: Iterable[Prompt]) -> Iterator[Generation]:
        source = iter(prompts)
        if not self.seeds and not self.engine.is_loaded:
            source = self._seeding(source)
        llm = self.engine.load()
        self._keep_rows(llm)
        core = llm.llm_engine
        most = 2 * core.vllm_config.scheduler_config.max_num_seqs
        running: OrderedDict[str, StopStrings] = OrderedDict()
        ended: dict[str, tuple[Any, str | None]] = {}  # with their text, but without their rows yet
        done: dict[str, Generation] = {}
        rows, steps = CompletionRows(self.engine.config.k, self.engine.config.bins), 0
        waiting = 0  # bytes of those that are done
        try:
            while True:
                while (
                    len(running) - len(ended) - len(done) < most
                    and waiting < BYTES_WAITING
                    and (prompt := next(source, None)) is not None
                ):
                    name = f"prompt-{self._requests}"
                    self._requests += 1
                    running[name] = StopStrings(self.sampling.stop)
                    if self.kept:
                        rows.expect(name)
                    request = {"prompt_token_ids": prompt.ids.tolist()}
                    self.engine.ask(core.add_request, name + SEPARATOR, request, self._parameters(prompt))
                if not running:
                    return
                for output in self.engine.ask(core.step):
                    name = output.request_id.removesuffix(SEPARATOR)
                    stop_reason = self._stopped(output, running[name]) if self.sampling.stop else None
                    if stop_reason is not None:
                        core.abort_request([output.request_id])
                    if output.finished or stop_reason is not None:
                        ended[name] = (output.outputs[0], stop_reason)
                steps += 1
                all_ended = len(ended) + len(done) == len(running)
                if all_ended or not self.kept or steps % TAKEN_AT_ONCE == 0:
                    finished = self._finished(llm, ended, rows, all_ended)
                    waiting += sum(generation.scores.nbytes for generation in finished.values())
                    done |= finished
                while running and (name := next(iter(running))) in done:
                    del running[name]
                    generation = done.pop(name)
                    waiting -= generation.scores.nbytes
                    yield generation
        finally:
            unfinished = [name + SEPARATOR for name in running if name not in done]
            if self.engine.is_loaded:
                with suppress(Exception):  # the engine may be what failed
                    core.abort_request(unfinished)
                    llm.collective_rpc("capture_sampled_stop")

    def _seeding(self, prompts: Iterator[Prompt]) -> Iterator[Prompt]:
        """The same prompts, of which the first one seeds the engine that is not loaded yet."""
        first = list(islice(prompts, 1))
        for prompt in first:
            self.engine.arguments["seed"] = prompt.seed % 2**31
        return chain(first, prompts)

    def _keep_rows(self, llm: Any) -> None:
        """Let the worker keep the rows of sampled tokens; `kept` says afterwards whether it does."""
        edges = self.engine.config.rank_edges
        problem = self.engine.flat_reason or "the worker was not asked to keep them"
        if self.kept:
            arguments = (self.engine.config.k, None if edges is None else list(edges))
            problem = next(filter(None, self.engine.ask(llm.collective_rpc, "capture_sampled", None, arguments)), None)
            self.kept = problem is None
        if self.kept:
            return
        if edges is not None:
            raise EngineError(
                "the sketch needs all logits, and vLLM's public log-probabilities have the top k only: "
                f"{problem}; choose another codec profile, or --engine transformers"
            )
        print(f"vllm {self.engine.version}: rows through flat logprobs, slower: {problem}", file=sys.stderr)

    def _finished(
        self, llm: Any, ended: dict[str, tuple[Any, str | None]], rows: CompletionRows, wait: bool
    ) -> dict[str, Generation]:
        """Those of `ended` whose rows have come, or all, waited for; they leave `ended`."""
        if self.kept:
            taken = self.engine.ask(llm.collective_rpc, "capture_take", None, (wait,))
            rows.add(next(chunks for chunks in taken if chunks is not None))
        whole = [
            name
            for name, (output, _) in ended.items()
            if wait or not self.kept or rows.count(name) >= len(output.token_ids)
        ]
        return {name: self._generation(name, *ended.pop(name), rows) for name in whole}

    def _parameters(self, prompt: Prompt) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = self.sampling
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=prompt.seed if self.seeds and sampling.temperature > 0 else None,
            max_tokens=prompt.max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            logprobs=None if self.kept else self.engine.config.k,
            flat_logprobs=not self.kept,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE if sampling.stop else RequestOutputKind.FINAL_ONLY,
        )

    def _stopped(self, output: Any, stop: StopStrings) -> str | None:
        """The stop string that has come up in a request, if any; what it wrote before is looked at once."""
        for token in output.outputs[0].token_ids[stop.tokens :]:
            stop.tokens += 1
            reason = None if token in self.sampling.stop_token_ids else stop.found(self.words[token] or b"")
            if reason is not None:
                return reason
        return None

    def _generation(self, name: str, output: Any, stop_reason: str | None, rows: CompletionRows) -> Generation:
        ids_G, k = np.array(output.token_ids, dtype=np.int64), self.engine.config.k
        try:
            if self.kept:
                values_GW, ids_GK = rows.pop(name, ids_G)
                tail_GJ = values_GW[:, 1 + k :] if self.engine.config.bins else None
                scores = ordered_scores(values_GW[:, 0], values_GW[:, 1 : 1 + k], ids_GK, tail_GJ)
            else:
                ids, values = flat_rows_of(output.logprobs, ids_G, k)
                scores = window_scores(values[:, 0], values[:, 1:], ids[:, 1:])
        except ValueError as error:
            raise EngineError(f"vLLM's rows of sampled tokens are laid out differently: {error}") from None
        return Generation(
            ids=ids_G,
            scores=scores,
            finish_reason="stop" if stop_reason is not None else output.finish_reason,
            ended=stop_reason is None and output.finish_reason == "stop",
            stop_reason=stop_reason,
        )
