"""The private parts of vLLM that generated rows need: a hook behind its sampler, guarded like those of `vllm_capture`.

vLLM's own `logprobs=k` costs a `torch.topk` and two more passes over the logits in every step, and then three little
arrays per request and step on their way through two processes: for 256 requests 513 messages, 1.5 ms in the engine's
process and 2 ms in the client's, beside 17 ms that a step of an 8B model takes on an H100. Here the worker reduces the
logits of a step at once (`reduction.reduce_rows`), keeps the rows on the host, and gives a request's rows in one piece
when it is finished and the client asks for it. Hooked are

    V2 runner   the class of `runner.sampler`, called with (logits, input_batch)
    V1 runner   `GPUModelRunner._sample`, called with (logits, spec_decode_metadata)

Sampling itself is vLLM's. A seed per request costs V2 nothing (one number that its kernel hashes with the position); V1
keeps a torch generator for each and draws with them one by one.

Legend: B requests of one step, G tokens of a completion, V vocabulary, K top-k ranks, W = 1 + K + J values of a row,
R = 1 + W + K numbers of one.
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from cache_builder.engines.reduction import reduce_rows

SEPARATOR = "#"  # ends a request's name: vLLM may append random characters of its own
Answer = tuple[int, bytes]  # G, and (G, 1 + W + K) int32: the sampled id, the bits of the values, ids of the ranks


@dataclass
class Step:
    """Rows of one step, on the host once `ready` has come. places: of the requests whose rows are still wanted.

    rows (B, 1 + W + K) int32. kept (B,): 0 where a prompt is not read to its end yet.
    """

    places: dict[str, int]
    rows: torch.Tensor
    kept: torch.Tensor
    ready: Any

    @cached_property
    def on_host(self) -> tuple[np.ndarray, np.ndarray]:
        """`rows` and `kept`: numpy picks a row in a tenth of torch's time, while no step of the model can start."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.rows.numpy(), self.kept.numpy().astype(bool)


class SampledRows:
    """The rows of all requests that are not taken yet; about (2 K + J + 2) * 4 bytes of host memory per token."""

    def __init__(self, k: int, rank_edges: tuple[int, ...] | None) -> None:
        self.k, self.rank_edges = k, rank_edges
        self.open: list[Step] = []
        self.late: Sequence[str] = ()

    def keep(
        self, request_ids: Iterable[str], logits_BV: torch.Tensor, sampled_B: torch.Tensor, kept_B: torch.Tensor
    ) -> None:
        """Rows of a step. logits: as the model gave them."""
        sampled_B = sampled_B.int()  # int64 in V2: one kernel for both
        values_BW, ids_BK = reduce_rows(logits_BV, sampled_B, self.k, self.rank_edges)
        rows_BR = torch.cat([sampled_B[:, None], values_BW.view(torch.int32), ids_BK], dim=1)
        rows_BR, kept_B = (part.to("cpu", non_blocking=True) for part in (rows_BR, kept_B))
        ready = None
        if logits_BV.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        places = {request.partition(SEPARATOR)[0]: place for place, request in enumerate(request_ids)}
        self.open.append(Step(places, rows_BR, kept_B, ready))

    def take(self, names: Sequence[str]) -> list[Answer]:
        """The rows of finished requests, given once.

        A step that was under way when a request ended may have left another row of it: gone with the next call.
        """
        for name in self.late:
            self._places(name)
        self.late = names
        answers = [self._joined(self._places(name)) for name in names]
        self.open = [step for step in self.open if step.places]
        return answers

    def _places(self, name: str) -> list[tuple[Step, int]]:
        return [(step, step.places.pop(name)) for step in self.open if name in step.places]

    def _joined(self, places: list[tuple[Step, int]]) -> Answer:
        found = ((*step.on_host, place) for step, place in places)
        rows = [rows_BR[place] for rows_BR, kept_B, place in found if kept_B[place]]
        return len(rows), b"".join(row_R.tobytes() for row_R in rows)


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


def rows_of(answer: Sequence[Any], ids_G: np.ndarray, k: int, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """(values (G, W), ids (G, K)) of a completion from what its worker kept. Raises ValueError where it is not that."""
    count, packed = answer
    width = 1 + k + bins
    rows_GR = np.frombuffer(packed, np.int32).reshape(count, 1 + width + k)[: len(ids_G)]
    if count < len(ids_G) or (rows_GR[:, 0] != ids_G).any():
        raise ValueError(f"rows of {count} tokens, which are not the {len(ids_G)} of the completion")
    return rows_GR[:, 1 : 1 + width].view(np.float32), rows_GR[:, 1 + width :]


def flat_rows_of(logprobs: Any, ids_G: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, log-probabilities), both (G, K + 1), the sampled token first, from vLLM's public `FlatLogprobs`.

    Raises ValueError where they are laid out otherwise.
    """
    ids = np.asarray(logprobs.token_ids, np.int64).reshape(-1, k + 1)
    values = np.asarray(logprobs.logprobs, np.float32).reshape(-1, k + 1)
    if len(ids) != len(ids_G) or ids.shape != values.shape or (ids[:, 0] != ids_G).any():
        raise ValueError(f"{len(ids)} rows for {len(ids_G)} tokens, or another token than the sampled one first")
    return ids, values
