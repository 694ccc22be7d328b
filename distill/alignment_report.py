"""`distill align-report`: what a student would learn from a cache, and where not, before any model is loaded.

The teacher's tokenisation is the cache's rows; its tokenizer is not needed. Shares are over whole documents; what
windows cost is counted apart.

Legend: T teacher rows of a document, N groups, D tenths of a document.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distill.alignment import align, align_groups
from distill.numerals import numeral_rows
from storage_specs.document import CachedDocument
from storage_specs.errors import AlignmentError
from storage_specs.rendering import TokenSequence, render
from storage_specs.vocabulary import tokenizer_digest
from storage_specs.windows import Window, cut_windows

WORST_DOCUMENTS, WORST_STRINGS = 10, 20
TENTHS = 10
WHOLE_DOCUMENT = 2**40  # tokens: one window
GOLD_RANKS = (1, 2, 4, 8, 16, 32, 64)
# Judgement, not measurement: what share of the student's positions must be compared for a verdict.
ENOUGH, TOO_FEW = 0.5, 0.1
MANY_NUMERALS = 0.05


@dataclass(kw_only=True)
class Report:
    """Counts over documents; shares are properties or are worked out by `facts`. byte_groups: bytes in groups of
    (student tokens, teacher tokens), group_sizes: how many such groups."""

    k: int
    same_tokenizer: bool
    max_length: int
    documents: int = 0
    scored_bytes: int = 0
    unscored_bytes: int = 0
    teacher_rows: int = 0
    student_positions: int = 0
    pairs: Counter = field(default_factory=Counter)
    merged_rows: int = 0
    merged_positions: int = 0
    positional_same_byte: int = 0
    windows: int = 0
    cut_documents: int = 0
    groups_cut_by_windows: int = 0
    numerals: int = 0
    group_sizes: Counter = field(default_factory=Counter)
    group_bytes: Counter = field(default_factory=Counter)
    gold_ranks: Counter = field(default_factory=Counter)
    tenths_D3: np.ndarray = field(default_factory=lambda: np.zeros((TENTHS, 3)))
    document_shares: list[tuple[float, str, str]] = field(default_factory=list)
    strings: Counter = field(default_factory=Counter)
    string_tokens: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)

    def add(self, document: CachedDocument, sequence: TokenSequence, overlap: int) -> None:
        """Count one document; `sequence` is the student's rendering of it."""
        whole = cut_windows(sequence, WHOLE_DOCUMENT, 1)
        spans = document.scored_spans
        size = int((spans[:, 1] - spans[:, 0]).sum())
        self.documents += 1
        self.scored_bytes += size
        self.unscored_bytes += document.unscored_bytes
        self.teacher_rows += len(document.segment)
        self._add_teacher(document)
        if not whole:
            self.document_shares.append((0.0, document.doc_id, document.text[:160]))
            return
        (window,) = whole
        self.student_positions += len(window.segment)
        for mode in ("boundary", "positional", "merge"):
            index_N, row_N = align(document, window, mode)
            self.pairs[mode] += len(row_N)
            if mode == "positional":
                own_N = np.searchsorted(window.logits_index, index_N)
                self.positional_same_byte += int((window.byte_start[own_N] == document.byte_start[row_N]).sum())
        share = self._add_groups(document, window) / max(1, size)
        self.document_shares.append((share, document.doc_id, document.text[:160]))
        windows = cut_windows(sequence, self.max_length, overlap)
        self.windows += len(windows)
        if len(windows) > 1:
            self.cut_documents += 1
            inside = sum(len(align_groups(document, each)) for each in windows)
            self.groups_cut_by_windows += len(align_groups(document, window)) - inside

    def _add_teacher(self, document: CachedDocument) -> None:
        """Top-k mass and entropy by tenth of the rows, gold ranks, numerals."""
        rows = len(document.segment)
        self.numerals += int(numeral_rows(document).sum())
        tenth_T = np.arange(rows) * TENTHS // max(1, rows)
        masses = np.concatenate([document.probs, document.tail_mass[:, None]], axis=1).astype(np.float64)
        entropy_T = -(masses * np.log(np.where(masses > 0, masses, 1))).sum(1)
        for column, value_T in enumerate((np.ones(rows), 1 - document.tail_mass, entropy_T)):
            self.tenths_D3[:, column] += np.bincount(tenth_T, weights=value_T, minlength=TENTHS)
        gold_T = np.exp(document.gold_logprob.astype(np.float64))
        # Stored values are rounded: what is larger by less than a thousandth is the gold token itself.
        rank_T = 1 + (document.probs > gold_T[:, None] * 1.001).sum(1)
        bucket_T = np.searchsorted(GOLD_RANKS, rank_T)
        for bucket, count in zip(*np.unique(bucket_T, return_counts=True), strict=True):
            last = GOLD_RANKS[bucket] if bucket < len(GOLD_RANKS) else 0
            first = GOLD_RANKS[bucket - 1] + 1 if bucket else 1
            inside = str(last) if first == last else f"{first}-{last}"
            self.gold_ranks[inside if 0 < last <= self.k else f"over {first - 1}"] += int(count)

    def _add_groups(self, document: CachedDocument, window: Window) -> int:
        """Returns the document's bytes in one-to-one groups."""
        groups = align_groups(document, window)
        sizes_N2 = groups.sizes
        self.merged_positions += int(sizes_N2[:, 0].sum())
        self.merged_rows += int(sizes_N2[:, 1].sum())
        start_N, end_N = document.byte_start[groups.teacher_first], document.byte_end[groups.teacher_last]
        content_N = ~document.is_end[groups.teacher_first]
        kinds, kind_N = np.unique(sizes_N2, axis=0, return_inverse=True)
        kind_N = kind_N.reshape(-1)
        counts = np.bincount(kind_N[content_N], minlength=len(kinds))
        bytes_of = np.bincount(kind_N[content_N], weights=(end_N - start_N)[content_N], minlength=len(kinds))
        for kind, count, size in zip(map(tuple, kinds.tolist()), counts.tolist(), bytes_of.tolist(), strict=True):
            if count:
                self.group_sizes[kind] += count
                self.group_bytes[kind] += int(size)
        data = document.text.encode()
        for n in np.flatnonzero(sizes_N2.max(axis=1, initial=0) > 1).tolist():
            string = _shown(data[start_N[n] : end_N[n]])
            # Every token beyond the first that is not compared makes a string worse.
            self.strings[string] += int(sizes_N2[n].sum()) - 2
            if string not in self.string_tokens:
                own = range(int(groups.student_first[n]), int(groups.student_last[n]) + 1)
                theirs = range(int(groups.teacher_first[n]), int(groups.teacher_last[n]) + 1)
                self.string_tokens[string] = (
                    tuple(_shown(data[document.byte_start[t] : document.byte_end[t]]) for t in theirs),
                    tuple(_shown(data[window.token_start[r] : window.byte_end[r]]) for r in own),
                )
        one_to_one_N = content_N & (sizes_N2 == 1).all(1)
        return int((end_N - start_N)[one_to_one_N].sum())

    def facts(self) -> dict[str, Any]:
        """Everything as JSON values; shares are of 1."""
        rows, positions, size = max(1, self.teacher_rows), max(1, self.student_positions), max(1, self.scored_bytes)
        kinds = sorted(self.group_sizes, key=lambda kind: -self.group_bytes[kind])
        _, mass_D, entropy_D = self.tenths_D3.T
        shares = {
            "boundary": (self.pairs["boundary"], self.pairs["boundary"]),
            "positional": (self.pairs["positional"], self.pairs["positional"]),
            "merge": (self.merged_rows, self.merged_positions),
        }
        facts = {
            "documents": self.documents,
            "scored_bytes": self.scored_bytes,
            "bytes_without_teacher_row": self.unscored_bytes / size,
            "teacher_rows": self.teacher_rows,
            "student_positions": self.student_positions,
            "same_tokenizer": self.same_tokenizer,
            "one_to_one_bytes": self.group_bytes[1, 1] / size,
            "grouped_bytes": sum(self.group_bytes.values()) / size,
            "modes": {
                mode: {"pairs": self.pairs[mode], "teacher_rows": of_rows / rows, "student_positions": own / positions}
                for mode, (of_rows, own) in shares.items()
            },
            "positional_at_same_byte": self.positional_same_byte / max(1, self.pairs["positional"]),
            "groups": [
                {"student": s, "teacher": t, "groups": self.group_sizes[s, t], "bytes": self.group_bytes[s, t] / size}
                for s, t in kinds
            ],
            "windows": {
                "max_length": self.max_length,
                "windows": self.windows,
                "documents_of_several": self.cut_documents,
                "groups_cut": self.groups_cut_by_windows,
            },
            "numerals": self.numerals / rows,
            "top_k_mass": float(mass_D.sum() / rows),
            "entropy_nats_at_least": float(entropy_D.sum() / rows),
            "along_the_text": [
                {"top_k_mass": m / max(1, n), "entropy_nats_at_least": e / max(1, n)}
                for n, m, e in self.tenths_D3.tolist()
            ],
            "gold_rank": {name: count / rows for name, count in sorted(self.gold_ranks.items(), key=_rank_order)},
            "worst_documents": [
                {"one_to_one_bytes": share, "doc_id": doc_id, "text": text}
                for share, doc_id, text in sorted(self.document_shares)[:WORST_DOCUMENTS]
            ],
            "worst_strings": [
                {
                    "string": string,
                    "uncompared_tokens": lost,
                    "teacher": list(self.string_tokens[string][0]),
                    "student": list(self.string_tokens[string][1]),
                }
                for string, lost in sorted(self.strings.items(), key=lambda item: (-item[1], item[0]))[:WORST_STRINGS]
            ],
        }
        return facts | {"verdict": verdict(facts)}


def alignment_report(
    documents: Sequence[CachedDocument],
    tokenizer: Any,
    *,
    teacher_digest: str | None = None,
    max_length: int = 1024,
    window_overlap: int | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The facts of `Report` for these documents and a student's tokenizer. Raises AlignmentError without documents,
    TokenizerError, ChatTemplateError, ConfigError."""
    if not len(documents):
        raise AlignmentError("there is no document with teacher rows to report on")
    report = Report(
        k=documents[0].probs.shape[1],
        same_tokenizer=teacher_digest is not None and teacher_digest == tokenizer_digest(tokenizer),
        max_length=max_length,
    )
    for number in range(len(documents)):
        document = documents[number]
        sequence = render(tokenizer, document, chat_template, chat_template_kwargs)
        report.add(document, sequence, window_overlap or max(1, max_length // 8))
    return report.facts()


def verdict(facts: dict[str, Any]) -> str:
    """go | go with mode X | no-go because, in words."""
    boundary, merge = facts["modes"]["boundary"], facts["modes"]["merge"]
    compared = max(boundary["student_positions"], boundary["teacher_rows"])
    grouped = facts["grouped_bytes"]
    if not boundary["pairs"]:
        return "no-go because the two tokenisations share not one boundary: check that the student is the one you mean"
    if compared < TOO_FEW:
        return (
            f"no-go because only {boundary['student_positions']:.0%} of the student's positions and "
            f"{boundary['teacher_rows']:.0%} of the teacher's rows stand at one place: most of the cache would be idle"
        )
    if compared < ENOUGH and merge["student_positions"] > boundary["student_positions"]:
        words = (
            f"go with --align merge --loss ce:1,uld:1.5: only {boundary['student_positions']:.0%} of the student's "
            "positions are compared at boundaries, but groups over the same bytes hold "
            f"{merge['student_positions']:.0%} of them"
        )
    else:
        words = (
            f"go: --align boundary compares {boundary['student_positions']:.0%} of the student's positions and "
            f"{boundary['teacher_rows']:.0%} of the teacher's rows"
        )
    if grouped < ENOUGH:
        words += f"; but only {grouped:.0%} of the bytes lie in groups that close, the rest is read and not compared"
    if facts["numerals"] > MANY_NUMERALS:
        words += f"; {facts['numerals']:.0%} of the rows are numerals, where sorted L1 (uld, hybrid) can harm: "
        words += "try --skip-numerals"
    if facts["same_tokenizer"]:
        words += "; teacher and student have the same tokenizer, so every position should be compared"
    return words


def _rank_order(item: tuple[str, int]) -> tuple[bool, int]:
    return item[0].startswith("over"), int(item[0].removeprefix("over ").partition("-")[0])


def _shown(data: bytes) -> str:
    """Bytes as text; parts of a character as \\x.."""
    return data.decode(errors="backslashreplace")
