"""The private parts of vLLM that scoring needs, all of them: hooks in the worker, and one in the client.

vLLM's own prompt log-probabilities keep a top-k of rounded logits; here the worker reduces its logits itself
(`reduction.reduce_rows`) and puts the rows where vLLM's would be, so that scheduling, chunked prefill, preemption and
the way to the client stay vLLM's business. Loaded into the workers by `worker_extension_cls`, a public argument; what
it hooks is private:

    V2 runner   `PromptLogprobsWorker.compute_prompt_logprobs`     most dense models on a GPU
    V1 runner   `GPUModelRunner._get_prompt_logprobs_dict`         CPU builds, hybrids, most mixtures of experts in 0.26
    client      `LogprobsProcessor._update_prompt_logprobs`        keeps arrays instead of making Python numbers

Under tensor parallelism every rank computes logits (they are gathered), rank 0 alone reduces them. Under pipeline
parallelism only the last stage has logits, and only its runner calls the hooks.

Legend: N tokens of one step, L tokens of a prompt, V vocabulary, K top-k ranks, W = 1 + K + J values of a row.
"""

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from cache_builder.engines.reduction import reduce_rows
from cache_builder.engines.reduction_memory import bytes_per_row
from cache_builder.engines.vllm_sampled import Chunk, SampledRows, hook_sampler, release_sampler

KNOWN_VERSIONS = ((0, 26), (0, 32))
EXTENSION = "cache_builder.engines.vllm_capture.CaptureExtension"
# Of one block of logits and its reduction: beyond what vLLM counted when it sized its key-value cache.
BLOCK_BYTES = {"cuda": 640 << 20, "cpu": 64 << 20}
PARAMETERS = {
    "compute_prompt_logprobs": "logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens",
    "_get_prompt_logprobs_dict": "hidden_states, num_scheduled_tokens",
    "_update_prompt_logprobs": "self, prompt_logprobs_tensors",
}


def version_problem(version: str) -> str | None:
    """Why the hooks are not for this vLLM version, or None where they are."""
    found = re.match(r"(\d+)\.(\d+)", version)
    first, last = KNOWN_VERSIONS
    if found and first <= tuple(map(int, found.groups())) <= last:
        return None
    return f"capture in the worker is known to work with vLLM {first[0]}.{first[1]} to {last[0]}.{last[1]} only"


def keep_arrays() -> None:
    """Let captured rows reach the client as `RequestOutput.prompt_logprobs` = (values (L-1, W), ids (L-1, K)).

    Rows of vLLM's own are passed on as ever: they are told apart by their width. Raises AttributeError, TypeError where
    this vLLM has no such method.
    """
    from vllm.v1.engine.logprobs import LogprobsProcessor

    original = LogprobsProcessor._update_prompt_logprobs
    if hasattr(original, "original"):
        return
    _check_signature(original)

    def _update_prompt_logprobs(self: Any, prompt_logprobs_tensors: Any) -> None:
        ids, values = prompt_logprobs_tensors[:2]
        if ids.shape[1] == values.shape[1]:
            original(self, prompt_logprobs_tensors)
        else:
            self.prompt_logprobs = (values.numpy(), ids.numpy())

    _update_prompt_logprobs.original = original  # type: ignore[attr-defined]
    LogprobsProcessor._update_prompt_logprobs = _update_prompt_logprobs


class CaptureExtension:
    """Becomes a base class of vLLM's worker; its methods are called in every worker by `collective_rpc`."""

    model_runner: Any

    def capture_sampled(self, k: int, rank_edges: list[int] | None) -> str | None:
        """Keep rows of sampled tokens from here on. Returns what stands in the way, or None."""
        from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

        if get_tensor_model_parallel_rank() or not get_pp_group().is_last_rank:
            return None
        self.sampled_rows = SampledRows(k, None if rank_edges is None else tuple(rank_edges))
        try:
            hook_sampler(self.model_runner, self.sampled_rows)
        except (AttributeError, TypeError) as error:
            return f"this vLLM's sampler is laid out differently ({error})"
        return None

    def capture_take(self, wait: bool) -> list[Chunk] | None:
        """The rows of steps that are done, or of all; None from a worker that keeps none."""
        rows = self.__dict__.get("sampled_rows")
        return None if rows is None else rows.take(wait)

    def capture_sampled_stop(self) -> None:
        release_sampler(self.model_runner)
        self.__dict__.pop("sampled_rows", None)

    def capture_start(self, k: int, rank_edges: list[int] | None, vocab_size: int) -> str | None:
        """Hook the runner. Returns what stands in the way, or None."""
        from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

        keeps = get_tensor_model_parallel_rank() == 0
        capture = Capture(k, None if rank_edges is None else tuple(rank_edges), vocab_size, keeps)
        runner = self.model_runner
        try:
            if hasattr(runner, "prompt_logprobs_worker"):
                worker = runner.prompt_logprobs_worker
                if worker is not None:  # it is, before the last pipeline stage
                    _hook(worker, "compute_prompt_logprobs", partial(_compute_prompt_logprobs, worker, capture))
            else:
                _hook(runner, "_get_prompt_logprobs_dict", partial(_get_prompt_logprobs_dict, runner, capture))
        except (AttributeError, TypeError) as error:
            return f"this vLLM's worker is laid out differently ({error})"
        if get_pp_group().is_last_rank:  # the head lives there; all its tensor-parallel ranks compute logits together
            capture.warm_up(runner)
        return None

    def capture_stop(self) -> None:
        """Give the runner its own methods back."""
        for target in (self.model_runner, getattr(self.model_runner, "prompt_logprobs_worker", None)):
            for name in PARAMETERS:
                getattr(target, "__dict__", {}).pop(name, None)


class Capture:
    """Hidden states to rows, in blocks of logits that bound the memory whatever the vocabulary and the batch."""

    def __init__(self, k: int, rank_edges: tuple[int, ...] | None, vocab_size: int, keeps: bool) -> None:
        self.k, self.rank_edges, self.vocab_size, self.keeps = k, rank_edges, vocab_size, keeps

    def block(self, device: str) -> int:
        """Rows whose logits exist at a time: BLOCK_BYTES at most, in whole tiles of the head's GEMM where they fit.

        A model that caps its logits makes two copies more of them, tensor parallelism one.
        """
        bins = 0 if self.rank_edges is None else len(self.rank_edges) - 1
        block = max(1, BLOCK_BYTES[device] // bytes_per_row(self.vocab_size, self.k, bins))
        return block // 128 * 128 or block

    def warm_up(self, runner: Any) -> None:
        """The largest block of a step, before the first batch waits: compiles a GPU's kernels for the head's own dtype
        and strides, and takes the memory that no later block exceeds."""
        config = runner.model_config
        rows = min(self.block(runner.device.type), runner.max_num_tokens)
        hidden_ND = torch.zeros(rows, config.get_hidden_size(), dtype=config.dtype, device=runner.device)
        with torch.inference_mode():
            self.rows(runner.model.compute_logits, hidden_ND, hidden_ND.new_zeros(rows, dtype=torch.int32))

    def rows(
        self, logits_fn: Callable[[torch.Tensor], torch.Tensor], hidden_ND: torch.Tensor, target_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(values (N, W) float32, ids (N, K) int32) on the model's device; None on a rank that keeps no rows."""
        block = self.block(hidden_ND.device.type)
        # Behind the last token of a prompt lies no token. int32 like sampled tokens: one kernel for both.
        target_N = target_N.clamp(0, self.vocab_size - 1).int()
        parts = []
        for start in range(0, len(hidden_ND), block):
            logits_BV = logits_fn(hidden_ND[start : start + block])
            if self.keeps:
                if logits_BV.shape[1] != self.vocab_size:
                    raise ValueError(f"the model's logits are {logits_BV.shape[1]} wide, expected {self.vocab_size}")
                parts.append(reduce_rows(logits_BV, target_N[start : start + block], self.k, self.rank_edges))
            del logits_BV  # the next block takes its place
        return (torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])) if parts else None


def _check_signature(method: Callable[..., Any]) -> None:
    name = method.__name__
    found = ", ".join(inspect.signature(method).parameters)
    if found != PARAMETERS[name]:
        raise TypeError(f"{name} takes {found}, expected {PARAMETERS[name]}")


def _hook(target: Any, name: str, replacement: Callable[..., Any]) -> None:
    target.__dict__.pop(name, None)  # an earlier hook of our own
    _check_signature(getattr(target, name))
    setattr(target, name, replacement)


def _compute_prompt_logprobs(
    worker: Any,
    capture: Capture,
    logits_fn: Callable[[torch.Tensor], torch.Tensor],
    hidden_states: torch.Tensor,
    input_batch: Any,
    all_token_ids: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    prompt_lens: np.ndarray,
) -> dict[str, Any]:
    """V2: rows of the prompts that this step finishes; those of unfinished ones wait in vLLM's own lists.

    As there, all tokens of the step are computed together: where anyone wants rows, everybody does. A request that was
    preempted starts anew with an empty list.
    """
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.worker.gpu.sample.prompt_logprob import get_prompt_logprobs_token_ids

    index = input_batch.idx_mapping_np
    length = prompt_lens[index]
    start = input_batch.num_computed_prefill_tokens_np
    wanted = worker.uses_prompt_logprobs[index] & (start < length) & (length >= input_batch.prefill_len_np)
    if not wanted.any():
        return {}
    target_N = get_prompt_logprobs_token_ids(
        input_batch.num_tokens, input_batch.query_start_loc, input_batch.idx_mapping, num_computed_tokens, all_token_ids
    )
    rows = capture.rows(logits_fn, hidden_states[: input_batch.num_tokens], target_N)
    if rows is None:
        return {}
    values_NW, ids_NK = rows
    finished = {}
    for number, request in enumerate(input_batch.req_ids):
        if not wanted[number]:
            continue
        first, last = (int(place) for place in input_batch.query_start_loc_np[number : number + 2])
        is_last = start[number] + input_batch.num_scheduled_tokens[number] >= length[number]
        parts = worker.in_progress_prompt_logprobs[request]
        parts.append((values_NW[first : last - is_last], ids_NK[first : last - is_last]))
        if is_last:
            values, ids = (part[0] if len(parts) == 1 else torch.cat(part) for part in zip(*parts, strict=True))
            finished[request] = LogprobsTensors(ids, values, ids.new_zeros(len(ids)))
            parts.clear()
    return finished


def _get_prompt_logprobs_dict(
    runner: Any, capture: Capture, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
) -> dict[str, Any]:
    """V1: as V2, but one prompt at a time, into tensors on the host that hold a whole prompt."""
    from vllm.v1.outputs import LogprobsTensors

    finished, done = {}, []
    for request_id in runner.num_prompt_logprobs:
        scheduled = num_scheduled_tokens.get(request_id)
        request = runner.requests[request_id]
        if scheduled is None or request.prompt_token_ids is None:  # preempted; embeddings instead of tokens
            continue
        length, first = len(request.prompt_token_ids), request.num_computed_tokens
        count = min(scheduled, length - 1 - first)
        if first + scheduled >= length:
            done.append(request_id)
        rows = None
        if count > 0:
            offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]])
            target_N = torch.tensor(request.prompt_token_ids[first + 1 : first + 1 + count]).to(hidden_states.device)
            rows = capture.rows(runner.model.compute_logits, hidden_states[offset : offset + count], target_N)
        if rows is not None:
            whole = request.in_progress_prompt_logprobs_cpu
            if whole is None:
                values, ids = (
                    torch.empty((length - 1, part.shape[1]), dtype=part.dtype, pin_memory=part.is_cuda) for part in rows
                )
                whole = request.in_progress_prompt_logprobs_cpu = LogprobsTensors(ids, values, ids.new_zeros(len(ids)))
            for target, part in zip((whole.logprobs, whole.logprob_token_ids), rows, strict=True):
                target[first : first + count].copy_(part, non_blocking=True)
        if done and done[-1] == request_id and request.in_progress_prompt_logprobs_cpu is not None:
            finished[request_id] = request.in_progress_prompt_logprobs_cpu
    for request_id in done:
        del runner.num_prompt_logprobs[request_id]
        runner.requests[request_id].in_progress_prompt_logprobs_cpu = None
    if finished:
        runner._sync_device()
    return finished
