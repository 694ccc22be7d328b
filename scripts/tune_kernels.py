"""Which tile sizes and numbers of warps are fastest, kernel by kernel: python scripts/bench_loss.py --tune (CUDA).

Prints, for every kernel, the device time of one launch under each setting, best first; the defaults of
`distill.fused_triton.Tuning` are the winners on the machine named there.
"""

import itertools
import statistics
from collections.abc import Iterator

import torch

from distill import fused_triton, kernels
from distill.fused_triton import FusedRowLosses, Tuning
from distill.teacher_tail import tail_laws

# Settings to try, by kernel: every combination of the values in each dictionary.
GRIDS: dict[str, list[dict[str, tuple[int, ...]]]] = {
    "scan_kernel": [{"group": (64, 128), "scan_tile": (2048, 4096, 8192), "scan_warps": (4, 8)}],
    "select_kernel": [
        {"group": (64,), "spare": (2,), "chunk_words": (512, 1024), "select_warps": (2, 4, 8)},
        {"group": (64,), "spare": (4,), "chunk_words": (2048,), "select_warps": (4, 8)},
        {"group": (128,), "spare": (2,), "chunk_words": (1024, 2048), "select_warps": (2, 4, 8)},
    ],
    "tail_kernel": [{"tail_steps": (64, 128, 256), "tail_tile": (1024, 2048, 4096, 8192), "tail_warps": (4, 8)}],
    "dense_gradient_kernel": [
        {"gradient_tile": (1024, 2048, 4096, 8192), "gradient_tiles": (1, 4, 1000), "gradient_warps": (4, 8)}
    ],
}
ROWS, K, IDS = 2048, 64, 16


class _Timer:
    """Stands in front of a kernel and times its launches."""

    def __init__(self, kernel: object) -> None:
        self.kernel, self.events = kernel, []

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*args: object, **kwargs: object) -> None:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.kernel[grid](*args, **kwargs)
            end.record()
            self.events.append((begin, end))

        return launch

    def milliseconds(self) -> float:
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) for begin, end in self.events[2:]]
        self.events.clear()
        return statistics.median(times)


def _same_tile_with_sketch(setting: dict[str, int]) -> dict[str, int]:
    return {"sketch_gradient_tile": setting["gradient_tile"]} if "gradient_tile" in setting else {}


def settings(grids: list[dict[str, tuple[int, ...]]]) -> Iterator[dict[str, int]]:
    for grid in grids:
        for values in itertools.product(*grid.values()):
            yield dict(zip(grid, values, strict=True))


def tune(n: int, v: int) -> None:
    """One row of output per setting. n is scaled down to keep the sweep short; times are given for n."""
    rows = min(n, ROWS)
    torch.manual_seed(0)
    logits_NV = torch.empty(rows, v, device="cuda", dtype=torch.bfloat16).normal_(std=2.5).requires_grad_()
    teacher_NU = (
        torch.empty(rows, 32_768, device="cuda").normal_(std=2.5).softmax(-1).sort(dim=-1, descending=True).values
    )
    edges = torch.tensor(sorted({round(K * (32_768 / K) ** (j / 16)) for j in range(17)}), device="cuda")
    ends_NU = torch.cat([torch.zeros(rows, 1, device="cuda"), teacher_NU.cumsum(1)], 1)
    probs_NK = teacher_NU[:, :K].contiguous()
    tail_N = 1 - probs_NK.sum(1)
    laws = tail_laws(probs_NK, ends_NU[:, edges].diff(dim=1).clamp(min=0), edges)
    labels_N = torch.randint(0, v, (rows,), device="cuda")
    words_NI = torch.randint(-1, v, (rows, IDS), device="cuda")
    grad_N = torch.full((rows,), 1 / rows, device="cuda")
    print(f"{torch.cuda.get_device_name()}, {rows} x {v} bfloat16, times x {n / rows:g}")

    for name, grids in GRIDS.items():
        original = getattr(kernels, name)
        found = []
        for setting in settings(grids):
            sketched = (False, True) if name == "dense_gradient_kernel" else (name == "tail_kernel",)
            tuning, times = Tuning(**setting, **_same_tile_with_sketch(setting)), []
            for sketch in sketched:
                timer = _Timer(original)
                setattr(fused_triton.kernels, name, timer)
                try:
                    for _ in range(6):
                        ce_N, uld_N, mapped_N, _, _ = FusedRowLosses.apply(
                            logits_NV, labels_N, probs_NK, tail_N, words_NI, probs_NK[:, :IDS].contiguous(),
                            laws if sketch else None, False, tuning,
                        )  # fmt: skip
                        if name == "dense_gradient_kernel":
                            torch.autograd.grad((ce_N, uld_N, mapped_N), logits_NV, (grad_N, grad_N, grad_N))
                    times.append(timer.milliseconds() * n / rows)
                except Exception as error:
                    print(f"  {name} {setting} failed: {str(error).splitlines()[0][:100]}")
                    break
                finally:
                    setattr(fused_triton.kernels, name, original)
            if len(times) == len(sketched):
                found.append((times[0], times, setting))
        print(name, "(without, with sketch)" if name == "dense_gradient_kernel" else "")
        for _, times, setting in sorted(found, key=lambda item: item[0])[:10]:
            print("  ", " / ".join(f"{t:.3f} ms" for t in times), setting, flush=True)
    print("whole pass by default:", Tuning())
