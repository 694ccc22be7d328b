"""The private parts of vLLM that generated rows need: a hook behind its sampler, guarded like those of `vllm_capture`.

vLLM's own `logprobs=k` costs a `torch.topk` and two more passes over the logits in every step, and then three little
arrays per request and step on their way through two processes: for 256 requests 513 messages, 1.5 ms in the engine's
process and 2 ms in the client's, beside 17 ms that a step of an 8B model takes on an H100. Here the worker reduces the
logits of a step at once (`reduction.reduce_rows`) and keeps the rows on the host until the client takes those of whole
steps, a few steps at a time. Whose rows they are is sorted out by the client (`CompletionRows`), beside the next steps:
what the worker does by itself delays them. Hooked are

    V2 runner   the class of `runner.sampler`, called with (logits, input_batch)
    V1 runner   `GPUModelRunner._sample`, called with (logits, spec_decode_metadata)

Sampling itself is vLLM's. A seed per request costs V2 nothing (one number that its kernel hashes with the position); V1
keeps a torch generator for each and draws with them one by one.

Legend: B requests of one step, S steps, G tokens of a completion, V vocabulary, K top-k ranks, W = 1 + K + J values of
a row, R = 1 + W + K numbers of one: the sampled id, the bits of the values, the ids of the ranks.
"""

import inspect
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from cache_builder.engines.reduction import reduce_rows

SEPARATOR = "#"  # ends a request's name: vLLM may append random characters of its own
NOT_SAMPLED = -1  # instead of an id: the prompt is not read to its end yet
Chunk = tuple[list[str], bytes]  # B names, and (S, B, R) int32: their rows in S steps, one after the other


@dataclass(frozen=True)
class Step:
    """Rows (B, R) int32 of the named requests, on the host once `ready` has come (None: they are)."""

    names: list[str]
    rows: torch.Tensor
    ready: Any

    def is_ready(self) -> bool:
        return self.ready is None or self.ready.query()


class SampledRows:
    """The rows of all steps that the client has not taken yet, on the host; oldest first."""

    def __init__(self, k: int, rank_edges: tuple[int, ...] | None) -> None:
        self.k, self.rank_edges = k, rank_edges
        self.open: deque[Step] = deque()

    def keep(
        self, request_ids: Iterable[str], logits_BV: torch.Tensor, sampled_B: torch.Tensor, kept_B: torch.Tensor
    ) -> None:
        """Rows of a step. logits: as the model gave them. kept: 0 where a prompt is not read to its end yet."""
        sampled_B = sampled_B.int()  # int64 in V2: one kernel for both
        values_BW, ids_BK = reduce_rows(logits_BV, sampled_B, self.k, self.rank_edges)
        marked_B = torch.where(kept_B.to(sampled_B.device, non_blocking=True) > 0, sampled_B, NOT_SAMPLED)
        rows_BR = torch.cat([marked_B[:, None], values_BW.view(torch.int32), ids_BK], dim=1)
        rows_BR = rows_BR.to("cpu", non_blocking=True)
        ready = None
        if logits_BV.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        self.open.append(Step(list(request_ids), rows_BR, ready))

    def take(self, wait: bool) -> list[Chunk]:
        """Every step once, in order: those that the device is done with, or all, waited for."""
        steps = []
        while self.open and (wait or self.open[0].is_ready()):
            steps.append(self.open.popleft())
            if wait and steps[-1].ready is not None:
                steps[-1].ready.synchronize()
        return [
            (names, b"".join([step.rows.numpy() for step in same]))
            for names, same in groupby(steps, key=lambda step: step.names)
        ]


class CompletionRows:
    """The client's side: rows of the requests that it has asked for, sorted out of the steps that it takes."""

    def __init__(self, k: int, bins: int) -> None:
        self.k, self.width = k, 1 + k + bins
        self.parts: dict[str, list[np.ndarray]] = {}

    def expect(self, name: str) -> None:
        self.parts[name] = []

    def add(self, chunks: Iterable[Chunk]) -> None:
        """Rows of requests that nobody expects any more are dropped: a step was under way when they ended."""
        for names, packed in chunks:
            rows_SBR = np.frombuffer(packed, np.int32).reshape(-1, len(names), 1 + self.width + self.k)
            for place, name in enumerate(names):
                parts = self.parts.get(name.partition(SEPARATOR)[0])
                if parts is not None:
                    rows_SR = rows_SBR[:, place]
                    parts.append(rows_SR[rows_SR[:, 0] != NOT_SAMPLED])  # a copy: a view would keep the whole chunk

    def count(self, name: str) -> int:
        return sum(map(len, self.parts[name]))

    def pop(self, name: str, ids_G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(values (G, W), ids (G, K)) of a completion. Raises ValueError where the rows are of other tokens."""
        rows_GR = np.concatenate([np.empty((0, 1 + self.width + self.k), np.int32), *self.parts.pop(name)])
        count, rows_GR = len(rows_GR), rows_GR[: len(ids_G)]
        if count < len(ids_G) or (rows_GR[:, 0] != ids_G).any():
            raise ValueError(f"rows of {count} tokens, which are not the {len(ids_G)} of the completion")
        return rows_GR[:, 1 : 1 + self.width].view(np.float32), rows_GR[:, 1 + self.width :]


def hook_sampler(runner: Any, rows: SampledRows) -> None:
    """Let `rows` see every step. Raises AttributeError, TypeError where this vLLM is laid out differently."""
    sampler = runner.sampler
    if hasattr(runner, "prompt_logprobs_worker"):
        release_sampler(runner)
        plain = type(sampler)
        _check(plain.__call__, ["self", "logits", "input_batch"])

        def call(self: Any, logits: torch.Tensor, input_batch: Any) -> Any:
            raw_BV = logits.clone()  # sampling works in place
            output = plain.__call__(self, logits, input_batch)
            rows.keep(input_batch.req_ids, raw_BV, output.sampled_token_ids[:, 0], output.num_sampled)
            return output

        sampler.__class__ = type(plain.__name__, (plain,), {"__call__": call, "plain": plain})
        return
    runner.__dict__.pop("_sample", None)
    original = runner._sample
    _check(original, ["logits", "spec_decode_metadata"])

    def _sample(logits: torch.Tensor, spec_decode_metadata: Any) -> Any:
        raw_BV = logits.clone()
        output = original(logits, spec_decode_metadata)
        batch = runner.input_batch
        kept_B = torch.from_numpy(~runner.discard_request_mask.np[: batch.num_reqs])
        rows.keep(batch.req_ids, raw_BV, output.sampled_token_ids[:, 0], kept_B)
        return output

    runner._sample = _sample


def release_sampler(runner: Any) -> None:
    """Give the runner its own sampler back."""
    runner.__dict__.pop("_sample", None)
    plain = getattr(getattr(runner, "sampler", None), "plain", None)
    if plain is not None:
        runner.sampler.__class__ = plain


def _check(method: Any, expected: list[str]) -> None:
    found = list(inspect.signature(method).parameters)
    if found != expected:
        raise TypeError(f"{method.__name__} takes {', '.join(found)}, expected {', '.join(expected)}")


def flat_rows_of(logprobs: Any, ids_G: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, log-probabilities), both (G, K + 1), the sampled token first, from vLLM's public `FlatLogprobs`.

    Raises ValueError where they are laid out otherwise.
    """
    ids = np.asarray(logprobs.token_ids, np.int64).reshape(-1, k + 1)
    values = np.asarray(logprobs.logprobs, np.float32).reshape(-1, k + 1)
    if len(ids) != len(ids_G) or ids.shape != values.shape or (ids[:, 0] != ids_G).any():
        raise ValueError(f"{len(ids)} rows for {len(ids_G)} tokens, or another token than the sampled one first")
    return ids, values
