"""A model's answers to a task: written greedily, or picked among choices by likelihood.

Legend: B examples of one batch, T tokens of the longest prompt (left-padded), N new tokens.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from distill.evaluation.tasks import Example
from distill.scoring import score
from storage_specs.document import Document, chat_document, completion_document
from storage_specs.errors import ConfigError

__all__ = ["Answer", "Answering", "answers", "completed"]


@dataclass(frozen=True, kw_only=True)
class Answering:
    """How a task is put to a model.

    max_new_tokens: the longest answer; stop: texts that end one, themselves left out; batch_size: examples per forward
    pass; max_length: tokens of the longest window where choices are scored; chat_template: for messages, instead of
    the tokenizer's own.
    """

    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    batch_size: int = 8
    max_length: int = 1024
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One. prompt_cut: how many of the prompt's first tokens the model had no room for; nats: of every choice."""

    id: str
    text: str
    prompt_cut: int = 0
    nats: tuple[float, ...] | None = None


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    how: Answering,
    label: str = "answer",
) -> Iterator[list[Answer]]:
    """Batch by batch, the longest prompts first. Raises ConfigError (no room for an answer, no chat template)."""
    if not examples:
        return
    frames = not model.config.is_encoder_decoder
    if examples[0].choices:
        prompts = [(_text(one), one) for one in examples]
    else:
        prompts = [(_prompt_ids(tokenizer, one, how, frames), one) for one in examples]
    prompts.sort(key=lambda each: -len(each[0]))
    give = _picked if examples[0].choices else _written
    total = None if examples[0].choices else sum(len(ids) for ids, _ in prompts)
    with tqdm(total=total, unit="tok", unit_scale=True, desc=label, disable=None) as bar:
        for first in range(0, len(prompts), how.batch_size):
            yield give(model, tokenizer, prompts[first : first + how.batch_size], how, bar)


def completed(example: Example, answer: str) -> Document:
    """The example with an answer, which alone is scored; a space is put between a prompt's last word and an answer."""
    if isinstance(example.prompt, str):
        between = "" if example.prompt[-1].isspace() or answer[:1].isspace() else " "
        return completion_document(example.prompt, between + answer)
    return chat_document([*example.prompt, {"role": "assistant", "content": answer}])


def _prompt_ids(
    tokenizer: PreTrainedTokenizerBase, example: Example, how: Answering, to_be_continued: bool
) -> list[int]:
    if isinstance(example.prompt, str):
        ids = list(tokenizer(example.prompt).input_ids)
        # What frames a whole text must not end the answer before it begins; an encoder reads a whole text.
        return ids[:-1] if to_be_continued and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    if how.chat_template is None and not tokenizer.chat_template:
        raise ConfigError(f"example {example.id} is a chat, but the tokenizer has no template: give --chat_template")
    return tokenizer.apply_chat_template(
        list(example.prompt),
        chat_template=how.chat_template,
        add_generation_prompt=True,
        return_dict=False,
        **(how.chat_template_kwargs or {}),
    )


def _text(example: Example) -> str:
    """Choices are tokenised together with their prompt, by `score`; only the length counts here."""
    return example.prompt if isinstance(example.prompt, str) else "".join(turn["content"] for turn in example.prompt)


@torch.inference_mode()
def _written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[tuple[list[int], Example]],
    how: Answering,
    bar: tqdm,
) -> list[Answer]:
    limit = getattr(model.config, "max_position_embeddings", None)
    apart = model.config.is_encoder_decoder
    room = None if limit is None else limit if apart else limit - how.max_new_tokens
    if limit is not None and how.max_new_tokens >= limit:
        raise ConfigError(f"--max_new_tokens {how.max_new_tokens}: the model reads and writes {limit} tokens in all")
    kept = [ids[-room:] if room is not None else ids for ids, _ in batch]  # the question stands at the end
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    longest = max(map(len, kept))
    # What is continued ends where the answer begins; an encoder's positions begin with its text.
    left = [0 if apart else longest - len(ids) for ids in kept]
    padded = [[pad] * n + ids + [pad] * (longest - n - len(ids)) for n, ids in zip(left, kept, strict=True)]
    ids_BT = torch.tensor(padded, device=model.device)
    mask_BT = torch.zeros_like(ids_BT)
    for row_T, n, ids in zip(mask_BT, left, kept, strict=True):
        row_T[n : n + len(ids)] = 1
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=how.max_new_tokens,
        stop_strings=list(how.stop) or None,
        pad_token_id=pad,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
        bos_token_id=model.generation_config.bos_token_id,
        decoder_start_token_id=model.generation_config.decoder_start_token_id,
    )
    given_BN = model.generate(
        input_ids=ids_BT, attention_mask=mask_BT, generation_config=settings, tokenizer=tokenizer if how.stop else None
    )
    new_BN = given_BN if apart else given_BN[:, longest:]
    found = []
    for (ids, example), short, new_N in zip(batch, kept, new_BN.tolist(), strict=True):
        text = tokenizer.decode(new_N, skip_special_tokens=True)
        end = min((at for stop in how.stop if (at := text.find(stop)) >= 0), default=len(text))
        found.append(Answer(id=example.id, text=text[:end].strip(), prompt_cut=len(ids) - len(short)))
        bar.update(len(ids))
    return found


def _picked(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[tuple[str, Example]],
    how: Answering,
    bar: tqdm,
) -> list[Answer]:
    pairs = [(example, choice) for _, example in batch for choice in example.choices]
    scores = score(
        model,
        tokenizer,
        [completed(example, choice) for example, choice in pairs],
        max_length=how.max_length,
        batch_size=how.batch_size,
        chat_template=how.chat_template,
        chat_template_kwargs=dict(how.chat_template_kwargs or {}),
        bar=bar,
    )
    nats = {
        (example.id, choice): math.fsum(one.nats[~one.is_end])
        for (example, choice), one in zip(pairs, scores, strict=True)
    }
    found = []
    for _, example in batch:
        of_choices = tuple(nats[example.id, choice] for choice in example.choices)
        likeliest = example.choices[of_choices.index(min(of_choices))]
        found.append(Answer(id=example.id, text=likeliest, nats=of_choices))
    return found
