"""Documents become windows, and the engine's scores of them become the document's rows.

Legend: T rows of one document, R rows of one window, K top-k ranks, I ranks whose ids are kept, J tail bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from cache_builder.engines.base import WindowScores
from storage_specs.document import CachedDocument, Document
from storage_specs.rendering import render
from storage_specs.windows import Window, cut_windows


@dataclass(frozen=True, kw_only=True)
class Cutter:
    """Renders documents with the teacher's tokenizer and cuts them to what the engine can take.

    capacity, overlap: tokens. bos_token: put in front where the tokenizer puts none, or None.
    """

    tokenizer: Any
    chat_template: str | None
    chat_template_kwargs: dict[str, Any]
    bos_token: str | None
    capacity: int
    overlap: int

    def windows(self, document: Document) -> list[Window]:
        """The document's windows; none where it has no scored token. TokenizerError, ChatTemplateError, ConfigError."""
        sequence = render(
            self.tokenizer,
            document,
            chat_template=self.chat_template,
            chat_template_kwargs=self.chat_template_kwargs,
            bos_token=self.bos_token,
        )
        return cut_windows(sequence, self.capacity, self.overlap)


def cached_document(
    document: Document,
    windows: Sequence[Window],
    scores: Sequence[WindowScores],
    k: int,
    k_ids: int,
    bins: int | None = None,
) -> CachedDocument:
    """The rows of all windows, in text order. `k_ids` 0 leaves the ids out; bins: J, or None for no tail bins."""
    probs_TK = _joined([score.probs for score in scores], (0, k), np.float32)
    token_ids_TI = _joined([score.token_ids[:, :k_ids] for score in scores], (0, k_ids), np.int64)
    return CachedDocument(
        **{item.name: getattr(document, item.name) for item in fields(Document)},
        segment=_joined([window.segment for window in windows], (0,), np.int64),
        byte_start=_joined([window.byte_start for window in windows], (0,), np.int64),
        byte_end=_joined([window.byte_end for window in windows], (0,), np.int64),
        is_end=_joined([window.is_end for window in windows], (0,), np.bool_),
        gold_logprob=_joined([score.gold_logprob for score in scores], (0,), np.float32),
        tail_mass=_joined([score.tail_mass for score in scores], (0,), np.float32),
        probs=probs_TK,
        token_ids=token_ids_TI if k_ids else None,
        tail_bins=None if bins is None else _joined([score.tail_bins for score in scores], (0, bins), np.float32),
    )


def _joined(parts: list[np.ndarray], empty: tuple[int, ...], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(empty, dtype)
