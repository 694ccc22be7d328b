"""SentencePiece and tiktoken files as `tokenizers.Tokenizer`, which is what `encode` and `byte_spans` take.

    tokenizer = from_sentencepiece("tokenizer.model")
    tokenizer = from_tiktoken("cl100k_base.tiktoken", pattern, {"<|endoftext|>": 100257})
    tokenizer = from_tiktoken(encoding._mergeable_ranks, encoding._pat_str, encoding._special_tokens)

Neither needs the library that wrote the file. Special tokens written out in a text are read as special, as Hugging Face
tokenizers do and those libraries do not by default.
"""

import base64
import binascii
import struct
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from storage_specs.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Fields of sentencepiece_model.proto.
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4


def from_tiktoken(
    ranks: str | Path | Mapping[bytes, int], pattern: str, special_tokens: Mapping[str, int] | None = None
) -> "Tokenizer":
    """A tiktoken vocabulary: its file (base64 and rank per line) or its table, with the pattern that splits texts.

    Raises TokenizerError for a file that is none. A vocabulary of 100,000 words takes some seconds.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    table = dict(ranks) if isinstance(ranks, Mapping) else _tiktoken_file(Path(ranks))
    letter = _byte_letters()
    spelled = {token: "".join(letter[byte] for byte in token) for token in table}
    merges = []
    for token in sorted(table, key=table.__getitem__):
        parts = _parts(table, token)
        if len(parts) == 2:
            merges.append((spelled[parts[0]], spelled[parts[1]]))
    vocabulary = {spelled[token]: rank for token, rank in table.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | dict(special_tokens or {}), merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special_tokens or {}))
    return tokenizer


def _tiktoken_file(path: Path) -> dict[bytes, int]:
    try:
        rows = [line.split() for line in path.read_bytes().splitlines() if line]
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
    except (OSError, ValueError, binascii.Error) as error:
        raise TokenizerError(f"{path} is no tiktoken file (base64 and a rank in every line): {error}") from None


def _parts(ranks: Mapping[bytes, int], token: bytes) -> list[bytes]:
    """What byte pair encoding makes of a token's bytes before its own merge: the two parts that merge joins."""
    parts, limit = [token[n : n + 1] for n in range(len(token))], ranks[token]
    while len(parts) > 2:
        pairs = [(ranks.get(left + right, limit), n) for n, (left, right) in enumerate(pairwise(parts))]
        rank, n = min(pairs)
        if rank >= limit:
            break
        parts[n : n + 2] = [parts[n] + parts[n + 1]]
    return parts


def _byte_letters() -> list[str]:
    """The letter that byte-level vocabularies write for each byte: printable Latin-1 as itself, others from U+0100."""
    itself = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in itself else next(others)) for byte in range(256)]


def from_sentencepiece(path: str | Path, add_bos: bool = True) -> "Tokenizer":
    """A SentencePiece model file of kind BPE or Unigram. add_bos: put its <s> in front (the file does not say).

    Raises TokenizerError for a file that is none, and for the kinds `word` and `char`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    try:
        pieces, kind, byte_fallback, charsmap, prefix, squeeze = _sentencepiece_file(Path(path).read_bytes())
    except (OSError, ValueError, IndexError, KeyError, struct.error) as error:
        raise TokenizerError(f"{path} is no SentencePiece model: {error}") from None
    if kind not in (UNIGRAM, BPE) or not pieces:
        raise TokenizerError(
            f"{path}: SentencePiece models of kind BPE and Unigram can be read, not kind {kind}: convert it to a "
            "tokenizer.json with transformers"
        )
    unknown = next(n for n, (_, _, what) in enumerate(pieces) if what == UNKNOWN)
    if kind == BPE:
        vocabulary = {piece: n for n, (piece, _, _) in enumerate(pieces)}
        scores = {piece: score for piece, score, what in pieces if what in (NORMAL, USER_DEFINED)}
        merges = _merges(vocabulary, scores)
        model = models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=pieces[unknown][0],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    else:
        model = models.Unigram([(piece, score) for piece, score, _ in pieces], unknown, byte_fallback)
    tokenizer = Tokenizer(model)
    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    if squeeze:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if kind == BPE:
        steps += [normalizers.Prepend("\u2581")] if prefix else []
        steps.append(normalizers.Replace(" ", "\u2581"))
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if prefix else "never")
    tokenizer.normalizer = normalizers.Sequence(steps)
    fallback = [decoders.ByteFallback(), decoders.Fuse()] if byte_fallback else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), *fallback])
    tokenizer.add_special_tokens([piece for piece, _, what in pieces if what in (UNKNOWN, CONTROL)])
    tokenizer.add_tokens([piece for piece, _, what in pieces if what == USER_DEFINED])
    bos = tokenizer.token_to_id("<s>")
    if add_bos and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
        )
    return tokenizer


def _merges(vocabulary: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, best piece first: SentencePiece merges by the result's score."""
    found = []
    for piece, score in scores.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(score, len(left), len(right), left, right) for left, right in known]
    found.sort(key=lambda row: row[:3], reverse=True)
    return [(left, right) for _, _, _, left, right in found]


def _sentencepiece_file(
    data: bytes,
) -> tuple[list[tuple[str, float, int]], int, bool, bytes, bool, bool]:
    """(pieces with score and kind, model kind, byte fallback, normalizer table, prefix space?, squeeze spaces?)."""
    pieces, kind, byte_fallback, charsmap, prefix, squeeze = [], UNIGRAM, False, b"", True, True
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, NORMAL)))
        elif field == 2:
            trainer = dict(_fields(value))
            kind, byte_fallback = trainer.get(3, UNIGRAM), bool(trainer.get(35, 0))
        elif field == 3:
            normalizer = dict(_fields(value))
            charsmap, prefix, squeeze = normalizer.get(2, b""), bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1))
    return pieces, kind, byte_fallback, charsmap, prefix, squeeze


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(field number, value) of a protobuf message: numbers as int, everything else as bytes."""
    position = 0

    def number() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
            continue
        sizes = {1: 8, 5: 4}
        size = sizes[key & 7] if key & 7 in sizes else number() if key & 7 == 2 else None
        if size is None or position + size > len(data):
            raise ValueError(f"broken at byte {position}")
        yield key >> 3, data[position : position + size]
        position += size
