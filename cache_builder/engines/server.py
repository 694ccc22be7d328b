"""The server engine: a teacher behind an OpenAI-compatible endpoint.

Mode score needs `prompt_logprobs`, which only vLLM's server has. Mode generate works with any endpoint that returns
log-probabilities (`server_generate`). Some requests are under way at a time, answers are taken in order.

Legend: R rows of one window, L tokens of one window, K top-k ranks.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from cache_builder.engines.base import EngineConfig, WindowScores, check_window, window_scores
from cache_builder.engines.http_client import HttpClient
from storage_specs.errors import EngineError
from storage_specs.windows import Window

DEFAULT_CONCURRENCY = 16
AHEAD = 8  # times the concurrency: requests from the oldest that is not answered on
DEFAULT_TIMEOUT = 600.0  # seconds; a long prompt waits behind others in a busy server


class ServerEngine:
    """`config.model` is the endpoint's name of the model; `config.arguments`: base_url, api_key_env, max_concurrency,
    timeout, and `returns_ids`: whether token ids are asked for."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        arguments = config.arguments
        self.concurrency = arguments.get("max_concurrency") or DEFAULT_CONCURRENCY
        self.client = HttpClient(
            arguments["base_url"], arguments.get("api_key_env"), arguments.get("timeout") or DEFAULT_TIMEOUT
        )

    def describe(self) -> dict[str, Any]:
        """Neither address nor key. What an endpoint does not tell is said to be unknown."""
        return {
            "name": "server",
            "version": "unknown",
            "dtype": "unknown",
            "attention_backend": "unknown",
            "returns": f"the top {self.config.k} log-probabilities of a position"
            + (" and their ids" if self.config.arguments["returns_ids"] else ", no ids"),
            "tail_mass": "1 - the sum of what is returned",
            "end_rows": "where the end token is among what is returned",
        }

    def score(self, windows: Iterable[Window]) -> Iterator[WindowScores]:
        return self.answers(windows, self._score)

    def close(self) -> None:
        self.client.close()

    def answers(self, requests: Iterable[Any], ask: Callable[[Any], Any]) -> Iterator[Any]:
        """`ask` of every request, some at a time in threads, in order. Raises what it raises.

        Those that wait for an older, slower one hold nobody up, up to AHEAD times `max_concurrency` in all. After an
        error nothing more is asked.
        """
        source = iter(requests)
        under_way, asked = deque[Future[Any]](), set[Future[Any]]()
        threads = ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint")
        try:
            while True:
                while (
                    len(asked) < 2 * self.concurrency
                    and len(under_way) < AHEAD * self.concurrency
                    and (request := next(source, None)) is not None
                ):
                    under_way.append(threads.submit(ask, request))
                    asked.add(under_way[-1])
                if not under_way:
                    return
                answered, asked = wait(asked, return_when=FIRST_COMPLETED)
                if any(future.exception() for future in answered):
                    source = iter(())
                while under_way and under_way[0].done():
                    yield under_way.popleft().result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _score(self, window: Window) -> WindowScores:
        check_window(window, self.config)
        body = {
            "model": self.config.model,
            "prompt": window.ids.tolist(),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": self.config.k,
        }
        answer = self.client.post("completions", body)
        try:
            positions = answer["choices"][0].get("prompt_logprobs")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise EngineError("the endpoint's answer has no choices: it is no completions endpoint") from None
        if not positions:
            raise EngineError(
                "the endpoint returns no prompt_logprobs, so it cannot score texts; vLLM's own server can; with others "
                "use --mode generate"
            )
        try:
            return parse_prompt_logprobs(positions, window, self.config.k)
        except EngineError as error:
            raise EngineError(self.client.without_key(str(error))) from None


def parse_prompt_logprobs(positions: list[Any], window: Window, k: int) -> WindowScores:
    """The rows of one window from vLLM's `prompt_logprobs`: None, then {id: {"logprob", "rank", ...}} per position.

    The prompt's own token is among them whatever its rank. Raises EngineError for any other shape.
    """
    if not isinstance(positions, list) or len(positions) != len(window.ids):
        found = len(positions) if isinstance(positions, list) else "no list of"
        raise EngineError(f"the endpoint returned {found} positions for a prompt of {len(window.ids)} tokens")
    gold, values, ids = [], [], []
    try:
        for index, target in zip(window.logits_index.tolist(), window.target_ids.tolist(), strict=True):
            entries = {int(token): float(entry["logprob"]) for token, entry in positions[index + 1].items()}
            gold.append(entries[target])
            best = sorted(entries.items(), key=lambda entry: (-entry[1], entry[0]))[:k]
            values.append([value for _, value in best])
            ids.append([token for token, _ in best])
        return window_scores(
            np.array(gold), np.array(values, dtype=np.float64).reshape(-1, k), np.array(ids).reshape(-1, k)
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise EngineError(
            f"the endpoint's prompt_logprobs are not the top {k} with the prompt's own token: {type(error).__name__}: "
            f"{error}; start vLLM's server with --max-logprobs {k} or more"
        ) from None
