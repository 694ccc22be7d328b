"""The drift of every engine and precision against transformers in float32, on both real models, as a CSV.

    python scripts/drift_table.py                 # vLLM's CPU build, about 6 minutes on two cores
    python scripts/drift_table.py --show          # README.md's table from the CSV

Lands in scripts/results/drift.csv: absolute differences of the same rows (the first passages of Wikipedia, at most 512
tokens each, k = 64), of the gold log-probability and of the sorted log-probabilities in nats, and of the sorted
probabilities. The limits of the builder's self-check (`cache_builder/self_check.py`) come from this table. Every engine
runs in a process of its own; one that cannot has no row (Gemma's activations overflow float16, for which vLLM refuses
it and transformers returns what is not finite).
"""

import argparse
import os
import pickle
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import demo_assets
import torch
import transformers
from real_pair import passages
from result_table import ResultTable, markdown, read_rows

from cache_builder.engines import make_engine
from cache_builder.engines.base import EngineConfig
from cache_builder.self_check import drift_between
from storage_specs.document import text_document
from storage_specs.drift import MEASURES, STATISTICS
from storage_specs.errors import EngineError
from storage_specs.rendering import render
from storage_specs.windows import Window, cut_windows

K, WINDOW = 64, 512
REFERENCE = ("transformers float32", "transformers", "float32", {})
# name, engine, dtype, arguments; the head is float32 where vLLM is not told otherwise
ENGINES = (
    ("transformers bfloat16", "transformers", "bfloat16", {}),
    ("transformers float16", "transformers", "float16", {}),
    ("vLLM float32", "vllm", "float32", {}),
    ("vLLM bfloat16", "vllm", "bfloat16", {}),
    ("vLLM bfloat16, bfloat16 head", "vllm", "bfloat16", {"hf_overrides": '{"head_dtype": "bfloat16"}'}),
    ("vLLM float16", "vllm", "float16", {}),
    ("vLLM float16, float16 head", "vllm", "float16", {"hf_overrides": '{"head_dtype": "float16"}'}),
)


def windows_of(folder: Path, documents: int) -> list[Window]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [cut_windows(render(tokenizer, text_document(text)), WINDOW, 1)[0] for text in passages(documents)]


def scored(name: str, dtype: str, arguments: dict[str, Any], folder: Path, windows: list[Window]) -> list[Any]:
    """The engine's rows, from a process of its own. Raises EngineError where that has none."""
    config = EngineConfig(
        model=str(folder),
        dtype=dtype,
        max_model_len=WINDOW + 1,
        k=K,
        vocab_size=transformers.AutoConfig.from_pretrained(folder).vocab_size,
        arguments=arguments | ({"enforce_eager": True} if name == "vllm" else {}),
    )
    with tempfile.TemporaryDirectory() as place:
        given, made = Path(place) / "given", Path(place) / "made"
        given.write_bytes(pickle.dumps((name, config, windows)))
        subprocess.run([sys.executable, __file__, "--work", given, made], check=False)  # vLLM may abort at its end
        rows = pickle.loads(made.read_bytes())
    if isinstance(rows, EngineError):
        raise rows
    return rows


def work(given: Path, made: Path) -> None:
    name, config, windows = pickle.loads(given.read_bytes())
    engine = make_engine(name, config)
    try:
        rows: Any = list(engine.score(iter(windows)))
    except EngineError as error:
        rows = error
    made.write_bytes(pickle.dumps(rows))
    engine.close()


def measured(documents: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    import vllm

    for model, folder in (("Gemma-3-270M", demo_assets.gemma_path()), ("SmolLM2-135M", demo_assets.smollm2_path())):
        windows = windows_of(folder, documents)
        expected = scored(*REFERENCE[1:], folder, windows)
        for name, engine, dtype, arguments in ENGINES:
            if name not in names:
                continue
            try:
                drift = drift_between(scored(engine, dtype, arguments, folder, windows), expected)
            except EngineError as error:
                print(f"{model}, {name}: no rows: {' '.join(str(error).split())}", file=sys.stderr)
                continue
            yield {
                "model": model,
                "engine": name,
                "rows": drift["rows"],
                **{f"{measure}_{key}": f"{drift[measure][key]:.2e}" for measure in MEASURES for key in STATISTICS},
                "machine": platform.machine(),
                "versions": f"vllm {vllm.__version__}, transformers {transformers.__version__}, "
                f"torch {torch.__version__}",
            }


def readme_table(rows: list[dict[str, str]]) -> str:
    newest = {(row["model"], row["engine"]): row for row in rows}
    columns = [f"{measure}_{key}" for measure in MEASURES for key in STATISTICS]
    header = ["model", "engine", *(f"{name.replace('_', ' ')}" for name in columns)]
    return markdown(header, [[model, engine, *map(row.get, columns)] for (model, engine), row in newest.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=6)
    names = [name for name, *_ in ENGINES]
    parser.add_argument("--engines", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--show", action="store_true", help="print README.md's table from the CSV, measure nothing")
    parser.add_argument("--work", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "drift.csv")
    given = parser.parse_args()
    if given.work:
        work(*given.work)
        return
    if not given.show:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        table, rows = ResultTable(given.output), []
        for row in measured(given.documents, given.engines):
            rows.append(row)
            table.write(rows)
            print(" ".join(f"{value}" for value in row.values()), flush=True)
    print(readme_table(read_rows(given.output)))


if __name__ == "__main__":
    main()
