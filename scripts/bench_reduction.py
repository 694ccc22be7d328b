"""The head and the reduction alone, on one GPU: milliseconds per 8,192 rows, and what rounding the logits costs.

    python scripts/bench_reduction.py [--hidden 4096] [--vocabulary 151936]

Heads: a 16-bit GEMM with 16-bit logits, the same GEMM with its float32 sums kept (`out_dtype`; what vLLM's `head_dtype`
float32 does), and a float32 GEMM; for each the share of rows whose logits tie at rank k, and the mean KL from float64.
Reductions of float32 logits: ours without and with a sketch of 16 tail bins, vLLM's (log_softmax and topk), a full
sort, with which the tail bins are compared. Hidden states and weights are Gaussian, logits have a deviation of 3.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from result_table import ResultTable
from torch.nn.functional import linear
from triton.testing import do_bench

from cache_builder.engines.reduction import reduce_rows, reduce_rows_torch
from storage_specs.sketch import log_rank_edges

ROWS, BLOCK, BINS = 8192, 1024, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--k", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "reduction.csv")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    hidden_BD = torch.randn(BLOCK, arguments.hidden, device="cuda").bfloat16()
    head_VD = (
        torch.randn(arguments.vocabulary, arguments.hidden, device="cuda") * 3 / arguments.hidden**0.5
    ).bfloat16()
    wide_VD = head_VD.float()
    target_B = torch.randint(0, arguments.vocabulary, (BLOCK,), device="cuda")
    table, rows = ResultTable(arguments.output), list[dict[str, Any]]()
    measured = {
        "shape": f"{arguments.hidden} x {arguments.vocabulary}",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }

    def add(what: str, k: int, work: Callable[[], Any], **more: Any) -> None:
        low, median, high = do_bench(work, warmup=50, rep=300, quantiles=[0.1, 0.5, 0.9])
        times = (ROWS / BLOCK * time for time in (median, low, high))
        row = {"what": what, "k": k} | dict(
            zip(("ms", "ms_p10", "ms_p90"), (f"{time:.3f}" for time in times), strict=True)
        )
        rows.append(row | {"tied": "", "kl": "", "bin_error": ""} | more | measured)
        print(*rows[-1].values(), flush=True)
        table.write(rows)

    heads = {
        "head, bfloat16 logits": lambda: hidden_BD @ head_VD.t(),
        "head, bfloat16 GEMM, float32 logits": lambda: torch.mm(hidden_BD, head_VD.t(), out_dtype=torch.float32),
        "head, float32 GEMM": lambda: linear(hidden_BD.float(), wide_VD),
    }
    exact_BV = (hidden_BD[:256].double() @ head_VD.double().t()).log_softmax(-1)
    for what, head in heads.items():
        logits_BV = head()[:256].float()
        top_BK = logits_BV.topk(arguments.k[0] + 1).values
        kl = (exact_BV.exp() * (exact_BV - logits_BV.double().log_softmax(-1))).sum(-1).mean()
        tied = (top_BK[:, -1] == top_BK[:, -2]).float().mean()
        add(what, arguments.k[0], head, tied=f"{tied:.3f}", kl=f"{kl:.2e}")
    del exact_BV
    logits_BV = heads["head, bfloat16 GEMM, float32 logits"]()
    add("one read", 0, lambda: logits_BV.amax())
    for k in arguments.k:
        edges = tuple(log_rank_edges(k, arguments.vocabulary, BINS).tolist())
        values_BW, ids_BK = reduce_rows(logits_BV, target_B, k, edges)
        wanted_BW, wanted_ids_BK = (
            torch.cat(parts)
            for parts in zip(
                *(
                    reduce_rows_torch(*pair, k, edges)
                    for pair in zip(logits_BV.split(64), target_B.split(64), strict=True)
                ),
                strict=True,
            )
        )
        torch.testing.assert_close(ids_BK, wanted_ids_BK, rtol=0, atol=0)
        torch.testing.assert_close(values_BW[:, : 1 + k], wanted_BW[:, : 1 + k], rtol=0, atol=5e-6)
        error = (values_BW - wanted_BW)[:, 1 + k :].abs().max()
        add("ours, top-k", k, lambda k=k: reduce_rows(logits_BV, target_B, k, None))
        add(
            "ours, top-k and sketch",
            k,
            lambda k=k, e=edges: reduce_rows(logits_BV, target_B, k, e),
            bin_error=f"{error:.1e}",
        )
        add("vLLM: log_softmax, topk", k, lambda k=k: logits_BV.log_softmax(-1).topk(k))
    add("a full sort", 0, lambda: logits_BV[:128].sort(descending=True))
    rows[-1] |= {name: f"{8 * float(rows[-1][name]):.3f}" for name in ("ms", "ms_p10", "ms_p90")}  # 128 of 1,024 rows
    table.write(rows)


if __name__ == "__main__":
    main()
