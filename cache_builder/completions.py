"""What the teacher wrote becomes a document: the prompt, the completion as a last message, and a row per token.

Ids are never tokenised again: each token's bytes are its own, and all of them joined are the text.

Legend: G generated tokens, T rows of the document, K top-k ranks, I ranks whose ids are kept.
"""

import codecs
from collections.abc import Sequence

import numpy as np

from cache_builder.engines.generating import Generation
from storage_specs.document import CachedDocument, Document, Message
from storage_specs.errors import TokenizerError
from storage_specs.generated import KEY, REFUSED
from storage_specs.vocabulary import spans_of_ids


def completed(
    prompt: Document, generation: Generation, words: Sequence[bytes | None], sample: int, k_ids: int
) -> CachedDocument:
    """The finished document of one sample.

    Cut by length, it ends with its last whole character, and has no end row; ended by a stop string, it ends before
    that, and has none either. Bytes that are not UTF-8 are refused: the document is left empty and without rows.
    """
    if generation.ids is None:
        pieces = list(generation.pieces or [])
    else:
        pieces = [words[token] if 0 <= token < len(words) else None for token in generation.ids.tolist()]
    tokens, finish_reason, ended = len(pieces), generation.finish_reason, generation.ended
    if finish_reason != "stop":
        pieces = pieces[: _whole_characters([piece or b"" for piece in pieces])]
    elif ended:
        pieces.pop()
    try:
        if generation.stop_reason is not None:
            pieces = _before(generation.stop_reason.encode(), pieces)
        spans_G2 = spans_of_ids(pieces, np.arange(len(pieces)))
        data = b"".join(piece or b"" for piece in pieces)
    except TokenizerError:
        spans_G2, data, finish_reason, ended = np.zeros((0, 2), dtype=np.int64), b"", REFUSED, False
    rows = len(spans_G2)
    if ended and data:  # as in `render`: a completion without bytes has no end row
        rows, spans_G2 = rows + 1, np.concatenate([spans_G2, [[len(data), len(data)]]])
    start = len(prompt.text.encode())
    role = "assistant" if prompt.kind == "chat" else "completion"
    message = Message(role=role, byte_start=start, byte_end=start + len(data), scored=True)
    about = {"finish_reason": finish_reason, "sample": sample, "tokens": tokens}
    if generation.stop_reason is not None:
        about["stop_reason"] = generation.stop_reason
    scores = generation.scores
    is_end_T = np.zeros(rows, dtype=bool)
    is_end_T[rows - 1 :] = ended
    return CachedDocument(
        kind=prompt.kind,
        text=prompt.text + data.decode(),
        messages=(*prompt.messages, message),
        metadata=prompt.metadata | {KEY: about},
        segment=np.full(rows, len(prompt.messages), dtype=np.int64),
        # a row starts where the token before it ended; without dropped bytes that is where its own token starts
        byte_start=start + spans_G2[:, 0],
        byte_end=start + spans_G2[:, 1],
        is_end=is_end_T,
        gold_logprob=scores.gold_logprob[:rows],
        tail_mass=scores.tail_mass[:rows],
        probs=scores.probs[:rows],
        token_ids=scores.token_ids[:rows, :k_ids] if k_ids else None,
        tail_bins=None if scores.tail_bins is None else scores.tail_bins[:rows],
    )


def _before(stop: bytes, pieces: Sequence[bytes | None]) -> list[bytes | None]:
    """The tokens that begin before a stop string, the last one cut. Raises TokenizerError where it is not in them."""
    place = b"".join(piece or b"" for piece in pieces).find(stop)
    if place < 0:
        raise TokenizerError(f"the stop string {stop!r} is not in the completion that it ended")
    before, begin = [], 0
    for piece in pieces:
        if begin >= place:
            break
        before.append(piece and piece[: place - begin])
        begin += len(piece or b"")
    return before


def _whole_characters(pieces: Sequence[bytes]) -> int:
    """How many leading tokens end at a character's end, leaving out as few as that takes at the end of the text."""
    count = len(pieces)
    while count:
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            decoder.decode(b"".join(pieces[:count]))
        except UnicodeDecodeError:
            return len(pieces)  # broken in the middle, which no cutting mends: it will be refused
        if not decoder.getstate()[0]:
            return count
        count -= 1
    return 0
