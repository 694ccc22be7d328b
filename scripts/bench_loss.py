"""Speed and memory of the losses, ours and others', forward + backward in one process; every line one CSV row.

    python scripts/bench_loss.py                      # CUDA: every case, about 3 minutes
    python scripts/bench_loss.py --cases uld,linear   # some of the cases
    python scripts/bench_loss.py --device cpu         # the quickstart's shape, against cross entropy in float32
    python scripts/bench_loss.py --tune               # CUDA: sizes of tiles and warps of each kernel, about a minute

Run from the repository root (PYTHONPATH=. where the package is not installed). Prints time (median, 10th and 90th
percentile of the runs, in ms) and memory (peak minus everything allocated before the call: inputs, teacher rows; a
gradient that the call returns counts) and appends to scripts/results/loss.csv.

"trl ops": softmax and full descending sort of both sides, zero-padded, L1, in the logits' dtype, as TRL's ULDLoss
computes them; the teacher's live logits are an input there. "compiled": torch.compile of `uld_loss` as it reads.
"""

import argparse
import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, pad

from distill.config import DistillationConfig
from distill.fused import row_losses
from distill.linear import linear_uld_loss
from distill.losses import TeacherRows
from distill.step_loss import StepLoss

RESULTS = Path(__file__).parent / "results" / "loss.csv"
FIELDS = ("case", "what", "rows", "vocabulary", "dtype", "k", "median_ms", "p10_ms", "p90_ms", "extra_gib", "machine")
FIELDS += ("torch", "triton")
# (rows, student vocabulary, teacher vocabulary)
CUDA_SHAPES = ((4096, 151_936, 128_256), (4096, 49_152, 151_936), (2048, 262_144, 151_936))
CPU_SHAPES = ((512, 49_152, 262_144),)
K, IDS, BINS, HIDDEN = 64, 16, 16, 2048
# Whole steps of the trainer's, against the first.
MIXTURES = ("ce:1", "ce:1,uld:1.5", "ce:1,mapped:1", "ce:1,hybrid:1", "ce:1,likelihood:1", "ce:1,kl:1", "ce:1,jsd:1")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One shape's logits (a leaf), the teacher's rows and its live logits."""

    logits_NV: torch.Tensor
    teacher: TeacherRows
    teacher_logits_NU: torch.Tensor
    labels_N: torch.Tensor
    words_NI: torch.Tensor
    rank_edges: torch.Tensor


def make_inputs(n: int, v: int, u: int, device: str, dtype: torch.dtype) -> Inputs:
    torch.manual_seed(0)
    logits_NV = torch.empty(n, v, device=device, dtype=dtype).normal_(std=2.5)
    teacher_NU = torch.empty(n, u, device=device, dtype=dtype).normal_(std=2.5)
    edges = torch.tensor(sorted({round(K * (u / K) ** (j / BINS)) for j in range(BINS + 1)}), device=device)
    probs_NK, bins_NJ = [], []
    for some_NU in teacher_NU.split(256):
        sorted_NU = some_NU.float().softmax(-1).sort(dim=-1, descending=True).values
        ends_NU = pad(sorted_NU.double().cumsum(1), (1, 0))
        probs_NK.append(sorted_NU[:, :K].clone())
        bins_NJ.append(ends_NU[:, edges].diff(dim=1).float())
    probs_NK = torch.cat(probs_NK)
    return Inputs(
        logits_NV=logits_NV.requires_grad_(),
        teacher=TeacherRows(probs_NK=probs_NK, tail_N=1 - probs_NK.sum(1), bins_NJ=torch.cat(bins_NJ)),
        teacher_logits_NU=teacher_NU,
        labels_N=torch.randint(0, v, (n,), device=device),
        words_NI=torch.randint(-1, v, (n, IDS), device=device),
        rank_edges=edges,
    )


class Bench:
    """Times functions and writes what it finds."""

    def __init__(self, device: str, results: Path) -> None:
        self.device, self.results = device, results
        self.machine = (
            torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()} x{torch.get_num_threads()}"
        )

    def measure(
        self, case: str, what: str, inputs: Inputs, run: Callable[[], object], seconds: float = 1.0
    ) -> float | None:
        """Median ms of `run`, which must leave nothing allocated but gradients of leaves."""
        logits = inputs.logits_NV
        try:
            self._once(run)
            extra = self._extra_gib(run)
            first = self._once(run)
            count = max(3, min(30, int(seconds * 1000 / max(first, 1e-3))))
            times = sorted(self._once(run) for _ in range(count))
        except (RuntimeError, ImportError) as error:
            # An implementation of others that does not run here (memory, versions) is a line of the table too.
            print(
                f"{case:9s} {what:34s} failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True
            )
            return None
        p10, p90 = times[len(times) // 10], times[-1 - len(times) // 10]
        median = statistics.median(times)
        memory = "" if extra is None else f"{extra:.3f}"
        print(f"{case:9s} {what:34s} {median:9.3f} ms  [{p10:.3f}, {p90:.3f}]  {memory:>8s} GiB", flush=True)
        row = [case, what, *logits.shape, str(logits.dtype)[6:], K, f"{median:.4f}", f"{p10:.4f}", f"{p90:.4f}", memory]
        self._append([*row, self.machine, torch.__version__, _triton_version()])
        return median

    def _once(self, run: Callable[[], object]) -> float:
        if self.device == "cpu":
            begin = time.perf_counter()
            run()
            return (time.perf_counter() - begin) * 1000
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def _extra_gib(self, run: Callable[[], object]) -> float | None:
        if self.device == "cpu":
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def _append(self, row: list[object]) -> None:
        new = not self.results.exists()
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with self.results.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(FIELDS)
            writer.writerow(row)


def backward(inputs: Inputs, loss: torch.Tensor) -> None:
    """A gradient of the logits that is given back at once, so that every run starts from the same memory."""
    torch.autograd.grad(loss, inputs.logits_NV)


def trl_ops(inputs: Inputs) -> None:
    q_NV = inputs.logits_NV.softmax(-1).sort(dim=-1, descending=True).values
    p_NU = inputs.teacher_logits_NU.softmax(-1).sort(dim=-1, descending=True).values
    missing = q_NV.shape[1] - p_NU.shape[1]
    q_NV, p_NU = pad(q_NV, (0, max(-missing, 0))), pad(p_NU, (0, max(missing, 0)))
    backward(inputs, (q_NV - p_NU).abs().sum(-1).mean())


def ours(
    inputs: Inputs, *, ce: bool = False, uld: bool = True, mapped: bool = False, sketch: bool = False, impl=None
) -> None:
    losses = row_losses(
        inputs.logits_NV,
        labels_N=inputs.labels_N if ce else None,
        teacher=inputs.teacher if uld or mapped else None,
        uld=uld,
        rank_edges=inputs.rank_edges if sketch else None,
        words_NI=inputs.words_NI if mapped else None,
        impl=impl,
    )
    parts = [part_N.mean() for part_N in (losses.ce_N, losses.uld_N, losses.mapped_N) if part_N is not None]
    backward(inputs, sum(parts))


def mixture(inputs: Inputs, loss: str) -> Callable[[], None]:
    """A step's loss as the trainer computes it; every row is a label and compared, chunks are of two tokens."""
    config = DistillationConfig(output_dir="unused", loss=loss, use_cpu=not inputs.logits_NV.is_cuda)
    step, device, rows = StepLoss(config), inputs.logits_NV.device, len(inputs.logits_NV)
    every_N, nothing_N = torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
    batch = {
        "label_index_R": every_N,
        "label_ids_R": inputs.labels_N,
        "label_sample_R": nothing_N,
        "student_index_N": every_N,
        "sample_N": nothing_N,
        "teacher_probs_NK": inputs.teacher.probs_NK,
        "teacher_tail_N": inputs.teacher.tail_N,
        "words_NI": inputs.words_NI,
        "chunk_index_M": every_N,
        "chunk_M": every_N // 2,
        "chunk_gold_G": torch.full((rows // 2,), -4.0, device=device),
        "chunk_sample_G": nothing_N[: rows // 2],
    }
    return lambda: backward(inputs, step.terms(inputs.logits_NV, batch).sum() / rows)


def in_place(inputs: Inputs) -> Callable[[], None]:
    """Gradient over the logits: their values are lost, so a run starts from what the last one left."""
    spare_NV = inputs.logits_NV.detach().clone()

    def run() -> None:
        logits_NV = spare_NV.requires_grad_()
        losses = row_losses(logits_NV, labels_N=inputs.labels_N, teacher=inputs.teacher, in_place=True)
        torch.autograd.grad((losses.ce_N + losses.uld_N).mean(), logits_NV)

    return run


def bench_given_logits(bench: Bench, shape: tuple[int, int, int], cases: set[str]) -> None:
    dtype = torch.bfloat16
    inputs = make_inputs(*shape, bench.device, dtype)
    print(f"== {shape[0]} x {shape[1]}, teacher {shape[2]}, {dtype}, {bench.machine}", flush=True)
    if "floor" in cases:
        target_NV = torch.empty_like(inputs.logits_NV)
        bench.measure("floor", "one read, one write", inputs, lambda: target_NV.copy_(inputs.logits_NV.detach()))
        del target_NV
    if "ce" in cases:
        bench.measure("ce", "torch", inputs, lambda: backward(inputs, cross_entropy(inputs.logits_NV, inputs.labels_N)))
        upcast = lambda: backward(inputs, cross_entropy(inputs.logits_NV.float(), inputs.labels_N))  # noqa: E731
        bench.measure("ce", "torch, fp32 upcast", inputs, upcast)
        bench.measure("ce", "ours", inputs, lambda: ours(inputs, ce=True, uld=False))
    if "uld" in cases:
        bench.measure("uld", "ours", inputs, lambda: ours(inputs))
        bench.measure("uld", "ours, gradient in place, + ce", inputs, in_place(inputs))
        bench.measure("uld", "ours, sketch", inputs, lambda: ours(inputs, sketch=True))
        bench.measure("uld", "ours, torch", inputs, lambda: ours(inputs, impl="torch"))
        bench.measure("uld", "trl ops", inputs, lambda: trl_ops(inputs))
    if "all" in cases:
        bench.measure("all", "ours, ce + uld + mapped", inputs, lambda: ours(inputs, ce=True, mapped=True))
    if "mixtures" in cases:
        for loss in MIXTURES:
            bench.measure("mixtures", loss, inputs, mixture(inputs, loss))
    if shape != CUDA_SHAPES[0]:
        return
    if "all" in cases:
        everything = lambda: ours(inputs, ce=True, mapped=True, sketch=True)  # noqa: E731
        bench.measure("all", "ours, ce + uld + mapped, sketch", inputs, everything)
        bench.measure("all", "ours, ce + uld", inputs, lambda: ours(inputs, ce=True))
        bench.measure("uld", "ours, torch, sketch", inputs, lambda: ours(inputs, impl="torch", sketch=True))
    if "compiled" in cases:
        plain = torch.compile(plain_uld, dynamic=False)
        teacher = inputs.teacher
        run = lambda: backward(inputs, plain(inputs.logits_NV, teacher.probs_NK, teacher.tail_N))  # noqa: E731
        bench.measure("uld", "torch.compile of the plain form", inputs, run)


def plain_uld(logits_NV: torch.Tensor, probs_NK: torch.Tensor, tail_N: torch.Tensor) -> torch.Tensor:
    """The definition as anyone would write it."""
    top_NK = logits_NV.float().softmax(-1).topk(probs_NK.shape[1], dim=-1).values
    return ((probs_NK - top_NK).abs().sum(-1) + (tail_N - (1 - top_NK.sum(-1))).abs()).mean()


def bench_linear(bench: Bench, shape: tuple[int, int, int]) -> None:
    """The head fused: hidden and weight are the leaves, the weight's gradient is part of the memory."""
    n, v, u = shape
    inputs = make_inputs(n, v, u, bench.device, torch.bfloat16)
    # Only the shape of the logits is shown: they exist in the unfused cases alone.
    only_shape_NV = torch.empty(n, v, device="meta", dtype=torch.bfloat16)
    inputs = replace(inputs, logits_NV=only_shape_NV, teacher_logits_NU=torch.empty(0))
    hidden_ND = torch.randn(n, HIDDEN, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    weight_VD = (torch.randn(v, HIDDEN, device=bench.device, dtype=torch.bfloat16) * 0.05).requires_grad_()
    print(f"== head fused: {n} x {HIDDEN} -> {v}, {bench.machine}", flush=True)

    def grads(loss: torch.Tensor) -> None:
        torch.autograd.grad(loss, (hidden_ND, weight_VD))

    def gemms() -> None:
        logits_NV = hidden_ND.detach() @ weight_VD.detach().T
        logits_NV @ weight_VD.detach()
        logits_NV.T @ hidden_ND.detach()

    def unfused_ce() -> None:
        grads(cross_entropy(hidden_ND @ weight_VD.T, inputs.labels_N))

    bench.measure("linear", "three GEMMs", inputs, gemms)
    bench.measure("linear", "torch, unfused, ce", inputs, unfused_ce)
    for name, options in (
        ("ours, ce", {"uld_weight": 0.0}),
        ("ours, ce + uld", {}),
        ("ours, ce + uld, sketch", {"rank_edges": inputs.rank_edges}),
        ("ours, ce + uld + mapped", {"words_NI": inputs.words_NI, "mapped_weight": 1.0}),
        ("ours, ce + uld, 1,024 rows a chunk", {"chunk_rows": 1024}),
        ("ours, ce + uld, 2,048 rows a chunk", {"chunk_rows": 2048}),
    ):
        run = lambda options=options: grads(  # noqa: E731
            linear_uld_loss(hidden_ND, weight_VD, inputs.labels_N, inputs.teacher, **options).loss
        )
        bench.measure("linear", name, inputs, run)

    def unfused() -> None:
        losses = row_losses(hidden_ND @ weight_VD.T, labels_N=inputs.labels_N, teacher=inputs.teacher)
        grads((losses.ce_N + losses.uld_N).mean())

    bench.measure("linear", "ours, unfused, ce + uld", inputs, unfused)

    def liger() -> None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        grads(LigerFusedLinearCrossEntropyLoss()(weight_VD, hidden_ND, inputs.labels_N))

    bench.measure("linear", "Liger fused linear ce", inputs, liger)


def bench_cpu(bench: Bench) -> None:
    for shape in CPU_SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = make_inputs(*shape, "cpu", dtype)
            print(f"== {shape[0]} x {shape[1]}, teacher {shape[2]}, {dtype}, {bench.machine}", flush=True)
            upcast = lambda: backward(inputs, cross_entropy(inputs.logits_NV.float(), inputs.labels_N))  # noqa: B023, E731
            base = bench.measure("ce", "torch, fp32 upcast", inputs, upcast, seconds=3)
            for name, options in (
                ("ours", {}),
                ("ours, sketch", {"sketch": True}),
                ("ours, ce + uld", {"ce": True}),
                ("ours, ce + uld + mapped", {"ce": True, "mapped": True}),
            ):
                run = lambda options=options: ours(inputs, **options)  # noqa: B023, E731
                median = bench.measure("uld", name, inputs, run, seconds=3)
                print(f"{'':9s} = {median / base:.2f} x cross entropy")
            for loss in MIXTURES:
                median = bench.measure("mixtures", loss, inputs, mixture(inputs, loss), seconds=3)
                print(f"{'':9s} = {median / base:.2f} x cross entropy")
            bench.measure("uld", "trl ops", inputs, lambda: trl_ops(inputs), seconds=1)  # noqa: B023


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--cases", default="floor,ce,uld,all,mixtures,compiled,linear", help="comma-separated (CUDA)")
    parser.add_argument("--shapes", type=int, default=len(CUDA_SHAPES), help="how many of the shapes (CUDA)")
    parser.add_argument("--tune", action="store_true", help="sweep the kernels' sizes instead (CUDA)")
    parser.add_argument("--output_file", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.tune:
        from tune_kernels import tune

        tune(*CUDA_SHAPES[0][:2])
        return
    bench = Bench(options.device, options.output_file)
    if options.device == "cpu":
        bench_cpu(bench)
        return
    cases = set(options.cases.split(","))
    for shape in CUDA_SHAPES[: options.shapes]:
        bench_given_logits(bench, shape, cases)
        torch.cuda.empty_cache()
    if "linear" in cases:
        bench_linear(bench, CUDA_SHAPES[0])


if __name__ == "__main__":
    main(sys.argv[1:])
