"""Logits of the real pair (Gemma-3-270M base, SmolLM2-135M-Instruct) on the same text, at the same places.

Legend: N compared rows, T teacher rows, U teacher words, V student words.
"""

import json
from collections.abc import Iterator

import demo_assets
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.alignment import align
from storage_specs.document import CachedDocument, Document, text_document
from storage_specs.rendering import render
from storage_specs.windows import Window, cut_windows


class RealPair:
    """Both models in float32, loaded once."""

    def __init__(self) -> None:
        folders = {"teacher": demo_assets.gemma_path(), "student": demo_assets.smollm2_path()}
        self.tokenizers = {name: AutoTokenizer.from_pretrained(path) for name, path in folders.items()}
        self.models = {
            name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            for name, path in folders.items()
        }

    def compared(
        self, texts: list[str], tokens: int = 128, mode: str = "boundary"
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Per text (teacher_logits_NU, student_logits_NV) at the places that `align` pairs among the first tokens."""
        for text in texts:
            document = text_document(text)
            teacher, teacher_LU = self.scored("teacher", document, tokens)
            student, student_LV = self.scored("student", document, tokens)
            student_N, teacher_N = align(teacher_rows(document, teacher), student, mode)
            yield teacher_LU[teacher.logits_index[teacher_N]], student_LV[student_N]

    def scored(self, name: str, document: Document, tokens: int) -> tuple[Window, torch.Tensor]:
        """The first window of `tokens` tokens, and the model's logits (L, V) on it."""
        window = cut_windows(render(self.tokenizers[name], document), tokens, 1)[0]
        with torch.inference_mode():
            logits_LV = self.models[name](torch.from_numpy(window.ids)[None]).logits[0]
        return window, logits_LV.clone()


def teacher_rows(document: Document, window: Window) -> CachedDocument:
    """The coordinates of the teacher's rows as a cached document, without distributions."""
    nothing_T = np.zeros(len(window.segment), np.float32)
    return CachedDocument(
        kind=document.kind,
        text=document.text,
        messages=document.messages,
        segment=window.segment,
        byte_start=window.byte_start,
        byte_end=window.byte_end,
        is_end=window.is_end,
        gold_logprob=nothing_T,
        tail_mass=nothing_T,
        probs=nothing_T[:, None],
    )


def passages(count: int, least_bytes: int = 400) -> list[str]:
    """The first Wikipedia passages that are long enough."""
    lines = demo_assets.wikipedia_path().read_text(encoding="utf8").splitlines()
    texts = (json.loads(line)["text"] for line in lines)
    return [text for text in texts if len(text.encode()) >= least_bytes][:count]
