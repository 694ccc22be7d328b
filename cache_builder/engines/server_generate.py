"""Mode generate behind an endpoint: chat or plain completions with log-probabilities.

A chat goes to `chat/completions`, where the endpoint renders it and returns each token's bytes. Where token ids are
asked for (k_ids > 0; vLLM's server), prompts are sent as ids to `completions` and ids come back. Else plain prompts go
there as text, and a token's bytes are those of its string.

Legend: G tokens of a completion, K top-k ranks.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from cache_builder.engines.base import WindowScores, window_scores
from cache_builder.engines.generating import Generation, Prompt
from cache_builder.engines.server import ServerEngine
from cache_builder.sampling import Sampling
from storage_specs.errors import EngineError

Token = tuple[bytes | None, float, list[float], list[int]]  # its bytes, its log-probability, the top ones, their ids
_ID = re.compile(r"token_id:(\d+)")
_BYTES = re.compile(r"\\x([0-9a-f]{2})|(.)", re.DOTALL)


class ServerGenerator:
    """Writes with the engine's endpoint."""

    def __init__(self, engine: ServerEngine, sampling: Sampling) -> None:
        self.engine, self.sampling = engine, sampling
        self.k = engine.config.k

    def generate(self, prompts: Iterable[Prompt]) -> Iterator[Generation]:
        return self.engine.answers(prompts, self._generate)

    def _generate(self, prompt: Prompt) -> Generation:
        sampling = self.sampling
        body: dict[str, Any] = {
            "model": self.engine.config.model,
            "max_tokens": prompt.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        body |= {"seed": prompt.seed} if sampling.temperature else {}
        body |= {"stop": list(sampling.stop)} if sampling.stop else {}
        body |= {"top_k": sampling.top_k} if sampling.top_k else {}
        with_ids = self.engine.config.arguments["returns_ids"]
        if with_ids:
            body |= {"prompt": prompt.ids.tolist(), "logprobs": self.k, "return_tokens_as_token_ids": True}
            body |= {"stop_token_ids": list(sampling.stop_token_ids)}
        elif prompt.turns is not None:
            body |= {"messages": prompt.turns, "logprobs": True, "top_logprobs": self.k}
        else:
            body |= {"prompt": prompt.text, "logprobs": self.k}
        chat = prompt.turns is not None and not with_ids
        answer = self.engine.client.post("chat/completions" if chat else "completions", body)
        try:
            choice = answer["choices"][0]
            logprobs, finish_reason = choice["logprobs"], choice["finish_reason"]
            if not isinstance(finish_reason, str):
                raise TypeError(f"finish_reason is {finish_reason!r:.40}")
            text = (choice["message"]["content"] if chat else choice["text"]) or ""
            if not logprobs:
                raise EngineError("the endpoint returned no log-probabilities: it cannot be a teacher")
            if with_ids:
                return self._with_ids(logprobs, finish_reason, choice.get("stop_reason"))
            tokens = [_chat_token(item) for item in logprobs["content"]] if chat else list(_plain_tokens(logprobs))
            return self._with_bytes(tokens, finish_reason, text)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            said = self.engine.client.without_key(f"{type(error).__name__}: {error}")
            raise EngineError(f"the endpoint's answer is laid out differently ({said})") from None

    def _with_ids(self, logprobs: Any, finish_reason: str, stop_reason: Any) -> Generation:
        ids_G = np.array([_token_id(token) for token in logprobs["tokens"]], dtype=np.int64)
        best = [{_token_id(token): value for token, value in top.items()} for top in logprobs["top_logprobs"]]
        return Generation(
            ids=ids_G,
            scores=self._scores(
                len(ids_G),
                logprobs["token_logprobs"],
                [list(top.values()) for top in best],
                [list(top) for top in best],
            ),
            finish_reason=finish_reason,
            ended=finish_reason == "stop" and len(ids_G) > 0 and int(ids_G[-1]) in self.sampling.stop_token_ids,
            stop_reason=stop_reason if stop_reason in self.sampling.stop else None,
        )

    def _with_bytes(self, tokens: list[Token], finish_reason: str, text: str) -> Generation:
        """What the tokens' bytes are, held against the text: an end token's own bytes are no part of it.

        Which bytes belong to which token is not known where the two differ otherwise: the completion is refused. Cut by
        length a text ends with less than a character, which endpoints leave out or replace.
        """
        pieces = [piece for piece, *_ in tokens]
        said = text.encode()
        whole = b"".join(piece or b"" for piece in pieces)
        ended, stop_reason = False, None
        if said and not pieces:
            raise EngineError("the endpoint returned a text without the log-probabilities of its tokens")
        if finish_reason != "stop":
            if whole.decode(errors="replace").rstrip("\ufffd") != text.rstrip("\ufffd"):
                pieces = [None] * len(pieces)
        elif whole != said:
            body = b"".join(piece or b"" for piece in pieces[:-1])
            found = [stop for stop in self.sampling.stop if whole.startswith(said + stop.encode())]
            if found:
                stop_reason = found[0]
            elif body == said:
                ended, pieces[-1] = True, b""
            else:
                pieces = [None] * len(pieces)
        return Generation(
            ids=None,
            pieces=pieces,
            scores=self._scores(
                len(tokens),
                [gold for _, gold, *_ in tokens],
                [top for *_, top, _ in tokens],
                [ids for *_, ids in tokens],
            ),
            finish_reason=finish_reason,
            ended=ended,
            stop_reason=stop_reason,
        )

    def _scores(self, tokens: int, gold: list[float], top: list[list[float]], ids: list[list[int]]) -> WindowScores:
        """A row of the k best per token; the sampled one comes along below them where it is none of them."""
        if not tokens == len(gold) == len(top):
            raise ValueError(f"{len(gold)} log-probabilities and {len(top)} distributions of {tokens} tokens")
        short = min(map(len, top), default=self.k)
        if short < self.k:
            raise EngineError(
                f"the endpoint returned {short} log-probabilities for a position, but k is {self.k}: build with --k "
                f"{max(1, short)} or less"
            )
        order = [sorted(range(len(row)), key=lambda n, row=row: -row[n])[: self.k] for row in top]
        values_GK = [[row[n] for n in best] for row, best in zip(top, order, strict=True)]
        ids_GK = [[row[n] for n in best] for row, best in zip(ids, order, strict=True)]
        shape = (len(gold), self.k)
        return window_scores(
            np.array(gold, dtype=np.float64),
            np.array(values_GK, dtype=np.float64).reshape(shape),
            np.array(ids_GK, dtype=np.int64).reshape(shape),
        )


def _token_id(token: str) -> int:
    match = _ID.fullmatch(token)
    if match is None:
        raise EngineError("the endpoint returns no token ids: build with --k_ids 0")
    return int(match[1])


def _chat_token(item: dict[str, Any]) -> Token:
    top = [entry["logprob"] for entry in item["top_logprobs"]]
    piece = item.get("bytes")
    return (
        bytes(list(piece)) if piece is not None else _spelled(item["token"]),
        item["logprob"],
        top,
        list(range(len(top))),
    )


def _plain_tokens(logprobs: dict[str, Any]) -> Iterator[Token]:
    for token, gold, best in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        yield _spelled(token), gold, list(best.values()), list(range(len(best)))


def _spelled(token: str) -> bytes | None:
    """The bytes of a token's string; some endpoints write `bytes:\\xe2\\x80` for what is no text. None: not known."""
    if token.startswith("bytes:"):
        parts = _BYTES.findall(token.removeprefix("bytes:"))
        return b"".join(bytes.fromhex(hexadecimal) if hexadecimal else letter.encode() for hexadecimal, letter in parts)
    return None if "\ufffd" in token else token.encode()
