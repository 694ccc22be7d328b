"""Real rows of Gemma-3-270M as documents, scored once and kept beside the models; and as many of them as are asked for.

    python scripts/real_documents.py [--rows 9000]

The first Wikipedia passages, each in one window of at most 512 tokens: k sorted probabilities with their ids, the mass
outside, gold log-probabilities, byte places. About a minute on one core for 9,000 rows.

Legend: T rows of one document, N rows of all, K ranks, V words.
"""

import argparse
import os
from itertools import cycle
from pathlib import Path

import demo_assets
import numpy as np

from storage_specs.document import CachedDocument, text_document

ROWS = 9000
RANKS = 64
TOKENS = 512
_ARRAYS = ("byte_start", "byte_end", "is_end", "gold_logprob", "tail_mass", "probs", "token_ids")


def real_documents(rows: int = ROWS) -> list[CachedDocument]:
    """Documents with at least that many rows together, k = 64, ids of all 64 ranks; made on the first call."""
    path = demo_assets.home() / "rows" / f"gemma-3-270m-{RANKS}-{rows}.npz"
    if not path.exists():
        with demo_assets.made_alone(path):
            if not path.exists():
                temporary = path.with_name(f".{os.getpid()}.npz")
                np.savez(temporary, **_joined(_scored(rows)))
                temporary.rename(path)
    return _cut(path)


def resampled(documents: list[CachedDocument], rows: int) -> list[CachedDocument]:
    """The documents again and again until they have that many rows.

    Always in the same order: a stretch of fewer rows than all of them have (9,075) holds none twice, and so no chunk or
    page of 8,192 rows is compressed better than rows that never come again.
    """
    found, count = [], 0
    for document in cycle(documents):
        if count >= rows:
            return found
        found.append(document)
        count += len(document.segment)
    raise ValueError("no documents")


def _scored(rows: int) -> list[CachedDocument]:
    import torch
    from real_pair import RealPair, passages, teacher_rows

    from storage_specs.rendering import render
    from storage_specs.windows import cut_windows

    pair = RealPair()
    documents: list[CachedDocument] = []
    for text in passages(100_000):
        if sum(len(document.segment) for document in documents) >= rows:
            return documents
        window = cut_windows(render(pair.tokenizers["teacher"], text_document(text)), TOKENS, 1)[0]
        # The text ends where its window does, so that every byte of it is scored.
        document = text_document(text.encode()[: int(window.byte_end.max())].decode(errors="ignore"))
        window = cut_windows(render(pair.tokenizers["teacher"], document), TOKENS, 1)[0]
        with torch.inference_mode():
            ids = torch.from_numpy(window.ids)[None]
            logits_TV = pair.models["teacher"](ids).logits[0][torch.from_numpy(window.logits_index)].double()
        logprobs_TV = logits_TV - logits_TV.logsumexp(1, keepdim=True)
        top_TK, ids_TK = logprobs_TV.topk(RANKS, dim=1)
        probs_TK = top_TK.exp().numpy()
        gold_T1 = logprobs_TV.gather(1, torch.from_numpy(window.target_ids)[:, None])
        places = teacher_rows(document, window)
        documents.append(
            CachedDocument(
                **{name: getattr(places, name) for name in ("kind", "text", "messages")},
                **{name: getattr(places, name) for name in ("segment", "byte_start", "byte_end", "is_end")},
                gold_logprob=gold_T1[:, 0].numpy().astype(np.float32),
                tail_mass=np.maximum(1 - probs_TK.sum(1), 0).astype(np.float32),
                probs=probs_TK.astype(np.float32),
                token_ids=ids_TK.numpy(),
            )
        )
    raise ValueError(f"the passages have fewer than {rows} rows")


def _joined(documents: list[CachedDocument]) -> dict[str, np.ndarray]:
    arrays = {name: np.concatenate([getattr(document, name) for document in documents]) for name in _ARRAYS}
    text = "\0".join(document.text for document in documents).encode()
    rows_D = np.array([len(document.segment) for document in documents])
    return arrays | {"document_rows": rows_D, "text": np.frombuffer(text, np.uint8)}


def _cut(path: Path) -> list[CachedDocument]:
    stored = np.load(path)
    arrays = {name: stored[name] for name in _ARRAYS}
    offsets = np.cumsum([0, *stored["document_rows"]])
    documents = []
    for number, text in enumerate(stored["text"].tobytes().decode().split("\0")):
        rows = slice(offsets[number], offsets[number + 1])
        document = text_document(text)
        documents.append(
            CachedDocument(
                **vars(document),
                segment=np.zeros(rows.stop - rows.start, np.int64),
                **{name: values[rows] for name, values in arrays.items()},
            )
        )
    return documents


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    made = real_documents(parser.parse_args().rows)
    print(f"{len(made)} documents, {sum(len(document.segment) for document in made)} rows")
