"""Mode generate with vLLM: rows of the sampled tokens from the pass that samples them (`logprobs=k`, raw_logprobs).

Requests are streamed: twice as many as vLLM runs at a time are with it, so that a finished one is replaced at once.

Legend: G tokens of a completion, K top-k ranks.
"""

import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from cache_builder.engines.base import window_scores
from cache_builder.engines.generating import Generation, Prompt, StopStrings
from cache_builder.engines.vllm import VllmEngine
from cache_builder.engines.vllm_sampled import keep_sampled_rows, rows_of
from cache_builder.sampling import Sampling
from storage_specs.errors import EngineError


class VllmGenerator:
    """Writes with the engine's `LLM`."""

    def __init__(self, engine: VllmEngine, sampling: Sampling, words: list[bytes | None]) -> None:
        self.engine, self.sampling, self.words = engine, sampling, words
        self.seeds = not _seeds_kill()
        self._requests = 0

    def generate(self, prompts: Iterable[Prompt]) -> Iterator[Generation]:
        if self.engine.config.rank_edges is not None:
            raise EngineError(
                "the sketch needs all logits, and what vLLM says of sampled tokens has the top k only: choose another "
                "codec profile, or --engine transformers"
            )
        core = self.engine.load().llm_engine
        problem = keep_sampled_rows()
        if problem:
            print(f"vllm {self.engine.version}: rows through flat logprobs, slower: {problem}", file=sys.stderr)
        most = 2 * core.vllm_config.scheduler_config.max_num_seqs
        source = iter(prompts)
        running: OrderedDict[str, StopStrings] = OrderedDict()
        done: dict[str, Generation] = {}
        try:
            while True:
                while len(running) < most and (prompt := next(source, None)) is not None:
                    name = f"prompt-{self._requests}"
                    self._requests += 1
                    running[name] = StopStrings(self.sampling.stop)
                    _ask(core.add_request, name, {"prompt_token_ids": prompt.ids.tolist()}, self._parameters(prompt))
                if not running:
                    return
                for output in _ask(core.step):
                    stop_reason = self._stopped(output, running) if self.sampling.stop else None
                    if stop_reason is not None:
                        core.abort_request([output.request_id])
                    if output.finished or stop_reason is not None:
                        done[output.request_id] = self._generation(output.outputs[0], stop_reason)
                while running and (name := next(iter(running))) in done:
                    del running[name]
                    yield done.pop(name)
        finally:
            unfinished = [name for name in running if name not in done]
            if unfinished:
                with suppress(Exception):  # the engine may be what failed
                    core.abort_request(unfinished)

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
            logprobs=self.engine.config.k,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE if sampling.stop else RequestOutputKind.FINAL_ONLY,
        )

    def _stopped(self, output: Any, running: dict[str, StopStrings]) -> str | None:
        """The stop string that has come up in a request, if any; what it wrote before is looked at once."""
        stop, ids = running[output.request_id], output.outputs[0].token_ids
        for token in ids[stop.tokens :]:
            stop.tokens += 1
            reason = None if token in self.sampling.stop_token_ids else stop.found(self.words[token] or b"")
            if reason is not None:
                return reason
        return None

    def _generation(self, output: Any, stop_reason: str | None) -> Generation:
        ids_G = np.array(output.token_ids, dtype=np.int64)
        try:
            ids, values = rows_of(output.logprobs, self.engine.config.k)
        except ValueError as error:
            raise EngineError(f"vLLM's sampled log-probabilities are laid out differently: {error}") from None
        if ids.shape[0] != len(ids_G) or (ids[:, 0] != ids_G).any():
            raise EngineError("vLLM's first log-probability of a position is not that of the token that it sampled")
        return Generation(
            ids=ids_G,
            scores=window_scores(values[:, 0], values[:, 1:], ids[:, 1:]),
            finish_reason="stop" if stop_reason is not None else output.finish_reason,
            ended=stop_reason is None and output.finish_reason == "stop",
            stop_reason=stop_reason,
        )


def _seeds_kill() -> bool:
    """A seed per request has killed the engine of CPU builds; there vLLM's own engine argument `seed` decides."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def _ask(call: Any, *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except Exception as error:  # the engine's process died, ran out of memory, or refused the request
        raise EngineError(f"vLLM failed while generating: {type(error).__name__}: {error}") from error
