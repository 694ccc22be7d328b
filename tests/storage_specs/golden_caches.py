"""The golden caches of spec version 1: small caches in git that every later version must read to the same values.

    python tests/storage_specs/golden_caches.py      # writes golden/v1/*.tar.xz and golden/v1/values.json anew

Rewriting them is a change of the format: it takes a new spec version, or a release that never was. The documents are
made of whole numbers and divisions only, so that no random generator and no libm decides about them.
"""

import hashlib
import io
import json
import sys
import tarfile
import tempfile
from dataclasses import fields, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from small_caches import STORES, arrays_of, files_of, some_settings, write_cache

from storage_specs import open_cache
from storage_specs.codecs import PROFILES
from storage_specs.document import CachedDocument, Document, chat_document, completion_document, text_document

FOLDER = Path(__file__).parent / "golden" / "v1"
NAMES = tuple(f"{store}-{profile}-{ids}" for store in STORES for profile in PROFILES for ids in ("ids", "no-ids"))
LIBRARIES = ("zarr", "numcodecs", "pyarrow", "numpy")
K, K_IDS, VOCAB_SIZE = 40, 4, 64
RANK_EDGES = [40, 44, 52, 64]  # profile sketch
DOCUMENTS_PER_SHARD = 3


def documents_of(name: str) -> list[CachedDocument]:
    """Chat, completion and text; text outside ASCII; an empty document; one without rows; end rows."""
    chat = [
        {"role": "user", "content": "Wie heißt 日本 auf Deutsch?", "name": "Ünï"},
        {"role": "assistant", "content": "Japan. 😀", "tool_calls": [{"id": 1, "arguments": {"a": [None, 0.5]}}]},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "e\u0301\0\r\n"},
    ]
    plain = [
        chat_document(chat, {"source": "golden", "Ünï": [True, None, 1.5]}),
        text_document(""),
        completion_document("2 + 2 = ", "4", {"number": 1}),
        text_document("naïve ﬁt, scored once. " * 8),
        text_document("no rows at all"),
    ]
    documents = [_scored(document, number, rows=number != 4) for number, document in enumerate(plain)]
    if name.endswith("no-ids"):
        documents = [replace(document, token_ids=None) for document in documents]
    if "sketch" in name:
        shares = np.array([0.5, 0.25, 0.25], np.float32)
        documents = [replace(document, tail_bins=document.tail_mass[:, None] * shares) for document in documents]
    return documents


def _scored(document: Document, number: int, rows: bool) -> CachedDocument:
    """A row for every third byte of each scored message, and an end row."""
    places: list[tuple[int, int, int, bool]] = []
    for segment, message in enumerate(document.messages if rows else ()):
        if message.scored:
            cuts = [*range(message.byte_start, message.byte_end, 3), message.byte_end]
            places += [(segment, start, end, False) for start, end in pairwise(cuts)]
            places.append((segment, message.byte_end, message.byte_end, True))
    segment, byte_start, byte_end, is_end = np.array(places, np.int64).reshape(-1, 4).T
    row_T1, rank_K = np.arange(len(places))[:, None], np.arange(K)
    weight_TK = 2**20 // (1 + rank_K * (1 + row_T1 % 5) + (row_T1 % 3) * (rank_K > 0) * 50)
    total_T1 = weight_TK.sum(axis=1, keepdims=True) + 2**12 * (row_T1 % 4)
    probs_TK = (weight_TK / total_T1).astype(np.float32)
    tail_T = np.maximum(1 - probs_TK.sum(axis=1, dtype=np.float64), 0).astype(np.float32)
    ids_TI = (row_T1 * 7 + rank_K[:K_IDS] * 5 + number) % VOCAB_SIZE
    return CachedDocument(
        **{item.name: getattr(document, item.name) for item in fields(Document)},
        segment=segment,
        byte_start=byte_start,
        byte_end=byte_end,
        is_end=is_end.astype(bool),
        gold_logprob=-(row_T1[:, 0] % 11 / 8).astype(np.float32),
        tail_mass=tail_T,
        probs=probs_TK,
        token_ids=ids_TI,
    )


def write(name: str, folder: Path) -> dict[str, bytes]:
    """The golden cache of that name, written by this version: {file name: bytes}."""
    store, profile, ids = name.split("-", 2)
    k_ids = K_IDS if ids == "ids" else 0
    parameters = {"rank_edges": RANK_EDGES} if profile == "sketch" else {}
    settings = some_settings(store, profile=profile, parameters=parameters, k=K, k_ids=k_ids, vocab_size=VOCAB_SIZE)
    write_cache(folder, documents_of(name), settings, DOCUMENTS_PER_SHARD)
    return files_of(folder)


def unpack(name: str, folder: Path) -> Path:
    """The golden cache of that name, as it is in git, as a folder."""
    with tarfile.open(FOLDER / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def values_of(folder: Path) -> dict[str, object]:
    """What reading a cache gives, as digests by column: sha256 over dtype, shape and bytes of all documents."""
    cache = open_cache(folder)
    digests: dict[str, hashlib._Hash] = {}
    for document in cache:
        plain = [document.kind, document.text, [vars(message) for message in document.messages], document.metadata]
        columns = {"documents": json.dumps(plain, sort_keys=True).encode()}
        for name, values in arrays_of(document).items():
            little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"))
            columns[name] = f"{values.dtype.name} {values.shape} ".encode() + little.tobytes()
        for name, data in columns.items():
            digests.setdefault(name, hashlib.sha256()).update(data)
    found: dict[str, object] = {name: digest.hexdigest() for name, digest in sorted(digests.items())}
    if cache.vocabulary is not None:
        words = [None if word is None else word.hex() for word in cache.vocabulary.token_bytes]
        known = json.dumps([words, sorted(cache.vocabulary.special_roles.items())]).encode()
        found["vocabulary"] = hashlib.sha256(known).hexdigest()
    return {"cache_id": cache.manifest.cache_id, "values": found}


def versions() -> dict[str, str]:
    """Of the libraries whose versions decide about bytes."""
    return {name: version(name) for name in LIBRARIES}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    known: dict[str, object] = {"versions": versions(), "caches": {}}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            files = write(name, Path(folder))
            known["caches"][name] = values_of(Path(folder))
        with tarfile.open(FOLDER / f"{name}.tar.xz", "w:xz", preset=9) as archive:
            for file, data in sorted(files.items()):
                entry = tarfile.TarInfo(file)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    (FOLDER / "values.json").write_text(json.dumps(known, indent=1) + "\n", encoding="utf8")
    print(f"{sum(file.stat().st_size for file in FOLDER.iterdir())} bytes in {FOLDER}")


if __name__ == "__main__":
    main()
