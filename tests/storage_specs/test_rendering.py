"""Coordinates of rendered documents against an oracle that follows every byte of a rendering written by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizer_assets
from chat_templates import CHATML, GEMMA, LLAMA2, LLAMA3, LLAMA31, ZEPHYR
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nasty_strings import NASTY
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from storage_specs.document import Document, chat_document, completion_document, text_document
from storage_specs.encoding import encode
from storage_specs.errors import ChatTemplateError, TokenizerError
from storage_specs.rendering import TokenSequence, chat_template_digest, render

SMOLLM2_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
FEW = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
CONTENT = st.text(st.sampled_from("ab \n\t\u00a0é😀"), max_size=8) | st.sampled_from(
    [
        "assistant",
        "user",
        "<|im_end|>",
        "<|im_start|>user\n",
        "\n\nassistant\n",
        "system",
        "",
        "a",
        "<",
        "zq0Content0qz",
    ]
)
TALK = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system", "tool"]), CONTENT), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(smollm2_path)


@pytest.fixture(scope="module")
def gemma(gemma_path: Path) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_file(str(gemma_path / "tokenizer.json"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module")
def llama3() -> PreTrainedTokenizerFast:
    backend = tokenizer_assets.load("llama3")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=LLAMA3
    )


def check(
    tokenizer: Any, document: Document, sequence: TokenSequence, parts: list[tuple[str, int, int]], ends: set[str]
) -> None:
    """`parts` is the rendering by hand: (string, segment or -1, bytes of the content trimmed in front); BOS left out.

    Follows every byte: where does it come from, which token has it, which tokens start where.
    """
    places: list[tuple[int, int]] = []  # per byte of the rendering: (segment, byte of the document's text)
    content_end: dict[int, int] = {}  # segment: where its content ends in the rendering
    for string, segment, trimmed in parts:
        start = document.messages[segment].byte_start + trimmed if segment >= 0 else 0
        places += [(segment, start + n if segment >= 0 else -1) for n in range(len(string.encode()))]
        if segment >= 0:
            content_end[segment] = len(places)
    text = "".join(string for string, _, _ in parts)
    plain = encode(tokenizer, [text], add_special_tokens=False)[0]
    count = len(plain.ids)
    assert sequence.ids.tolist()[:count] == plain.ids.tolist()
    done_in: dict[int, int] = {}  # segment: document byte up to which tokens have come
    behind = {}  # the first token behind a content: its segment
    for segment, end in content_end.items():
        behind[next((token for token, start in enumerate(plain.spans[:, 0].tolist()) if start >= end), None)] = segment
    end_ids = {tokenizer.convert_tokens_to_ids(name) for name in ends}
    for token, (start, stop) in enumerate(plain.spans.tolist()):
        own = places[start:stop]
        assert own, "these tokenizers invent nothing"
        segment, first = own[0]
        got = (
            sequence.segment[token],
            sequence.byte_start[token],
            sequence.token_start[token],
            sequence.byte_end[token],
        )
        if segment >= 0:
            message = document.messages[segment]
            same = [byte for where, byte in own if where == segment]
            assert got == (segment, done_in.get(segment, message.byte_start), first, same[-1] + 1)
            assert not sequence.is_end[token]
            assert sequence.scored[token] == message.scored
        elif token in behind and int(plain.ids[token]) in end_ids:
            message = document.messages[behind[token]]
            assert got == (behind[token], message.byte_end, message.byte_end, message.byte_end)
            assert sequence.is_end[token]
            assert sequence.scored[token] == (message.scored and message.byte_end > message.byte_start)
        else:
            assert got == (-1, -1, -1, -1)
            assert not sequence.is_end[token]
            assert not sequence.scored[token]
        for where, byte in own:
            if where >= 0:
                done_in[where] = byte + 1


def said(text: str, segment: int) -> tuple[str, int, int]:
    return text, segment, 0


def trimmed(text: str, segment: int) -> tuple[str, int, int]:
    kept = text.strip()
    return kept, segment, len(text[: text.index(kept)].encode())


def by_hand(talk: list[tuple[str, str]], opening: str = "<|im_start|>{}\n") -> list[tuple[str, int, int]]:
    parts = []
    for segment, (role, content) in enumerate(talk):
        parts += [said(opening.format(role), -1), said(content, segment), said("<|im_end|>\n", -1)]
    return parts


def turns(talk: list[tuple[str, str]]) -> Document:
    return chat_document([{"role": role, "content": content} for role, content in talk])


@FEW
@given(talk=TALK)
def test_smollm2s_own_template(smollm2: PreTrainedTokenizerFast, talk: list[tuple[str, str]]) -> None:
    parts = by_hand(talk) if talk[0][0] == "system" else [said(SMOLLM2_SYSTEM, -1), *by_hand(talk)]
    sequence = render(smollm2, turns(talk))
    assert len(sequence.prefix_ids) == 0
    check(smollm2, turns(talk), sequence, parts, {"<|im_end|>"})


@pytest.mark.parametrize(("template", "opening"), [(CHATML, "<|im_start|>{}\n"), (ZEPHYR, "<|{}|>\n")])
@FEW
@given(talk=TALK)
def test_chatml_and_zephyr(
    smollm2: PreTrainedTokenizerFast, template: str, opening: str, talk: list[tuple[str, str]]
) -> None:
    if template == ZEPHYR:  # it knows no tools
        talk = [(role, content) for role, content in talk if role != "tool"] or [("user", "a")]
    sequence = render(smollm2, turns(talk), chat_template=template)
    check(smollm2, turns(talk), sequence, by_hand(talk, opening), {"<|im_end|>"})


@FEW
@given(talk=TALK)
def test_llama3_trims_and_writes_its_bos(llama3: PreTrainedTokenizerFast, talk: list[tuple[str, str]]) -> None:
    sequence = render(llama3, turns(talk))
    assert sequence.prefix_ids.tolist() == [128_000]
    parts = []
    for segment, (role, content) in enumerate(talk):
        header = f"<|start_header_id|>{role}<|end_header_id|>\n\n"
        parts += [said(header, -1), trimmed(content, segment), said("<|eot_id|>", -1)]
    check(llama3, turns(talk), sequence, parts, {"<|eot_id|>"})


@FEW
@given(contents=st.lists(CONTENT, min_size=1, max_size=4))
def test_gemma_trims_and_calls_the_assistant_model(gemma: PreTrainedTokenizerFast, contents: list[str]) -> None:
    talk = [(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]
    sequence = render(gemma, turns(talk), chat_template=GEMMA)
    assert sequence.prefix_ids.tolist() == [2]
    parts = []
    for segment, (role, content) in enumerate(talk):
        header = f"<start_of_turn>{'model' if role == 'assistant' else role}\n"
        parts += [said(header, -1), trimmed(content, segment), said("<end_of_turn>\n", -1)]
    check(gemma, turns(talk), sequence, parts, {"<end_of_turn>"})


def test_llama2_puts_the_system_message_into_a_user_turn(smollm2: PreTrainedTokenizerFast) -> None:
    talk = [("system", "Be brief."), ("user", "hello "), ("assistant", " hi there")]
    sequence = render(smollm2, turns(talk), chat_template=LLAMA2)
    text = turns(talk).text.encode()
    # The template's space in front of an answer makes one token with its first word, which starts outside of it.
    for segment, content in [(0, b"Be brief."), (1, b"hello"), (2, b" there")]:
        mine = sequence.segment == segment
        spans = zip(sequence.token_start[mine].tolist(), sequence.byte_end[mine].tolist(), strict=True)
        assert b"".join(text[start:end] for start, end in spans) == content
    assert not sequence.is_end.any(), "a space stands between the content and EOS"


def tokens(sequence: TokenSequence, tokenizer: Any, segment: int) -> list[str]:
    return tokenizer.convert_ids_to_tokens(sequence.ids[sequence.segment == segment].tolist())


def test_a_template_newline_that_swallows_a_content_byte(smollm2: PreTrainedTokenizerFast) -> None:
    sequence = render(smollm2, turns([("assistant", "\n\nfoo")]), chat_template=CHATML)
    mine = sequence.segment == 0
    assert tokens(sequence, smollm2, 0) == ["Ċ", "foo", "<|im_end|>"]
    assert sequence.byte_start[mine].tolist() == [1, 2, 5], "byte 0 is read with the template's newline"


def test_end_tokens_written_in_a_content_are_content(smollm2: PreTrainedTokenizerFast) -> None:
    sequence = render(smollm2, turns([("assistant", "a<|im_end|>")]), chat_template=CHATML)
    mine = sequence.segment == 0
    assert tokens(sequence, smollm2, 0) == ["a", "<|im_end|>", "<|im_end|>"]
    assert sequence.is_end[mine].tolist() == [False, False, True]
    assert sequence.byte_end[mine].tolist() == [1, 11, 11]


def test_an_empty_turn_is_not_scored(smollm2: PreTrainedTokenizerFast) -> None:
    sequence = render(smollm2, turns([("user", "a"), ("assistant", "")]))
    assert not sequence.scored.any()
    assert sequence.is_end.sum() == 2


def test_a_template_that_skips_empty_contents(smollm2: PreTrainedTokenizerFast) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.content %}[{{ m.content }}]{% endif %}<|im_end|>{% endfor %}"
    )
    sequence = render(
        smollm2, turns([("assistant", ""), ("user", "hey"), ("assistant", "you")]), chat_template=template
    )
    assert tokens(sequence, smollm2, 2) == ["you"]
    assert tokens(sequence, smollm2, 0) == []


def test_tool_calls_and_template_arguments_reach_the_template(smollm2: PreTrainedTokenizerFast) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}{{ '\n' + m.content }}"
        "{% for call in m.tool_calls or [] %}<call>{{ call.name }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{{ closing }}"
    )
    document = chat_document(
        [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
            {"role": "tool", "content": "sunny", "name": "look"},
            {"role": "assistant", "content": "It is sunny."},
        ]
    )
    sequence = render(smollm2, document, chat_template=template, chat_template_kwargs={"closing": "THE END"})
    text = smollm2.decode(sequence.ids.tolist())
    assert "<call>look</call>" in text
    assert "tool look\nsunny" in text
    assert text.endswith("THE END")
    scored = smollm2.decode(sequence.ids[sequence.scored].tolist())
    assert scored == "It is sunny.<|im_end|>"


CALL = [{"type": "function", "function": {"name": "look", "arguments": {"where": "Ulm"}}}]


@pytest.mark.parametrize("arguments", [{}, {"date_string": "26 Jul 2024"}], ids=["today", "fixed"])
def test_injected_system_prompts_dates_tool_calls_and_results(
    llama3: PreTrainedTokenizerFast, arguments: dict[str, str]
) -> None:
    document = chat_document(
        [
            {"role": "user", "content": " weather? "},
            {"role": "assistant", "content": "", "tool_calls": CALL},
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "It is sunny."},
        ]
    )
    sequence = render(llama3, document, chat_template=LLAMA31, chat_template_kwargs=arguments)
    text = llama3.decode(sequence.ids.tolist())
    assert arguments.get("date_string", "Today Date: ") in text
    assert '{"name": "look", "arguments": {"where": "Ulm"}}' in text
    assert "ipython<|end_header_id|>\n\nsunny" in text
    assert llama3.decode(sequence.ids[sequence.scored].tolist()) == "It is sunny.<|eot_id|>"
    # What the template made up has no coordinate.
    placed = llama3.decode(sequence.ids[sequence.segment >= 0].tolist())
    assert placed == "weather?<|eot_id|>sunny<|eot_id|>It is sunny.<|eot_id|>"
    assert sequence.prefix_ids.tolist() == [llama3.bos_token_id]


def test_a_scored_content_that_the_template_drops_for_a_tool_call_is_refused(llama3: PreTrainedTokenizerFast) -> None:
    document = chat_document(
        [{"role": "user", "content": "w?"}, {"role": "assistant", "content": "I look.", "tool_calls": CALL}]
    )
    with pytest.raises(ChatTemplateError, match="drops a scored one"):
        render(llama3, document, chat_template=LLAMA31)


def test_a_content_before_a_tool_call_is_scored_without_an_end(smollm2: PreTrainedTokenizerFast) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ '\n' }}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
        "<|im_end|>\n{% endfor %}"
    )
    document = chat_document(
        [{"role": "user", "content": "w?"}, {"role": "assistant", "content": "I look.", "tool_calls": CALL}]
    )
    sequence = render(smollm2, document, chat_template=template)
    assert smollm2.decode(sequence.ids[sequence.scored].tolist()) == "I look."
    assert not sequence.is_end[sequence.scored].any()


@pytest.mark.parametrize("template", [CHATML, ZEPHYR], ids=["chatml", "zephyr"])
def test_a_prefilled_assistant_turn_has_no_end(smollm2: PreTrainedTokenizerFast, template: str) -> None:
    document = turns([("user", "count"), ("assistant", "one"), ("user", "on"), ("assistant", "two, three")])
    sequence = render(smollm2, document, chat_template=template, chat_template_kwargs={"continue_final_message": True})
    scored = [smollm2.decode([token]) for token in sequence.ids[sequence.scored].tolist()]
    assert "".join(scored) == "one<|im_end|>two, three"
    assert sequence.is_end[sequence.scored].sum() == 1
    assert int(sequence.byte_end.max()) == len(document.text)


def test_a_generation_prompt_is_the_templates(smollm2: PreTrainedTokenizerFast) -> None:
    document = turns([("user", "count"), ("assistant", "one")])
    sequence = render(smollm2, document, chat_template=CHATML, chat_template_kwargs={"add_generation_prompt": True})
    assert smollm2.decode(sequence.ids.tolist()).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert (sequence.segment[-3:] == -1).all()


def test_roles_decide_what_is_scored(smollm2: PreTrainedTokenizerFast) -> None:
    talk = [{"role": role, "content": content} for role, content in (("user", "a"), ("assistant", "b"), ("tool", "c"))]
    sequence = render(smollm2, chat_document(talk, score_roles=("user", "tool")), chat_template=CHATML)
    assert smollm2.decode(sequence.ids[sequence.scored].tolist()) == "a<|im_end|>"


@pytest.mark.parametrize(
    "change", ["m.content | upper", "m.content ~ m.content", "m.content | replace('a', 'b')", "'nothing'"]
)
def test_templates_that_alter_contents_are_refused(smollm2: PreTrainedTokenizerFast, change: str) -> None:
    template = "{% for m in messages %}<|im_start|>{{ " + change + " }}<|im_end|>{% endfor %}"
    with pytest.raises(ChatTemplateError, match="alters the contents"):
        render(smollm2, turns([("user", "a"), ("assistant", "ab")]), chat_template=template)


def test_messages_that_are_not_scored_may_be_left_out(smollm2: PreTrainedTokenizerFast) -> None:
    template = "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    sequence = render(smollm2, turns([("system", "x"), ("assistant", "y")]), chat_template=template)
    assert set(sequence.segment.tolist()) == {-1, 1}


def test_no_template_and_templates_that_refuse(gemma: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ChatTemplateError, match="--chat-template FILE"):
        render(gemma, turns([("user", "a")]))
    with pytest.raises(ChatTemplateError, match="System role not supported"):
        render(gemma, turns([("system", "a")]), chat_template=GEMMA)
    with pytest.raises(ChatTemplateError, match="load the tokenizer with transformers"):
        render(gemma.backend_tokenizer, turns([("user", "a")]), chat_template=CHATML)


def check_plain(tokenizer: Any, document: Document, prefix: list[int], bos_token: str | None = None) -> TokenSequence:
    sequence = render(tokenizer, document, bos_token=bos_token)
    assert sequence.prefix_ids.tolist() == prefix
    assert sequence.ids[-1] == tokenizer.eos_token_id
    parts = [(document.content(n), n, 0) for n in range(len(document.messages))]
    check(tokenizer, document, sequence, parts, set())
    last, end = document.messages[-1], len(document.text.encode())
    assert sequence.is_end.tolist() == [False] * (len(sequence.ids) - 1) + [True]
    row = (sequence.segment[-1], sequence.byte_start[-1], sequence.token_start[-1], sequence.byte_end[-1])
    assert row == (len(document.messages) - 1, end, end, end)
    assert sequence.scored[-1] == (last.byte_end > last.byte_start)
    return sequence


@pytest.mark.parametrize("text", [text for text in NASTY if not any(mark in text for mark in "\x04\x06")])
def test_plain_text(gemma: PreTrainedTokenizerFast, smollm2: PreTrainedTokenizerFast, text: str) -> None:
    check_plain(gemma, text_document(text), prefix=[2])
    check_plain(smollm2, text_document(text), prefix=[])


PAIRS = [
    ("Q: a\nA:", " b"),
    ("ab", "cd"),
    ("", "all"),
    ("prompt", ""),
    ("a\n", "\n\nb"),
    ("😀", "é"),
    ("", ""),
    ("a ", "b"),
]


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_completions_are_one_string(
    gemma: PreTrainedTokenizerFast, smollm2: PreTrainedTokenizerFast, prompt: str, completion: str
) -> None:
    check_plain(gemma, completion_document(prompt, completion), prefix=[2])
    check_plain(smollm2, completion_document(prompt, completion), prefix=[])


def test_a_token_over_the_seam_belongs_to_the_prompt(smollm2: PreTrainedTokenizerFast) -> None:
    sequence = render(smollm2, completion_document("x hel", "lo there"))
    rows = list(zip(sequence.segment, sequence.byte_start, sequence.byte_end, sequence.scored, strict=True))
    assert smollm2.convert_ids_to_tokens(sequence.ids.tolist()) == ["x", "Ġhello", "Ġthere", "<|im_end|>"]
    assert rows == [(0, 0, 1, False), (0, 1, 5, False), (1, 7, 13, True), (1, 13, 13, True)]


def test_prefixes(gemma: PreTrainedTokenizerFast, smollm2: PreTrainedTokenizerFast) -> None:
    assert check_plain(smollm2, text_document("ab"), [0], bos_token="<|endoftext|>").scored.all()
    check_plain(gemma, text_document("ab"), [2], bos_token="<bos>")
    with pytest.raises(TokenizerError, match="--bos-token '<nope>'"):
        render(smollm2, text_document("ab"), bos_token="<nope>")
    chat = render(smollm2, turns([("assistant", "a")]), chat_template=ZEPHYR, bos_token="<|endoftext|>")
    assert chat.prefix_ids.tolist() == [0]
    assert chat.ids[0] != 0


def test_bare_tokenizers_frame_texts_and_name_no_eos() -> None:
    sequence = render(tokenizer_assets.load("bert"), text_document("ab ab"))
    assert sequence.prefix_ids.tolist() == [tokenizer_assets.load("bert").token_to_id("[CLS]")]
    assert sequence.byte_start.tolist() == [0, 2], "the dropped space is a gap in front of the second token"
    assert sequence.token_start.tolist() == [0, 3]
    assert not sequence.is_end.any()
    llama2 = render(tokenizer_assets.load("llama2"), text_document("日"))
    assert llama2.prefix_ids.tolist() == [1]
    assert np.stack([llama2.byte_start, llama2.byte_end], axis=1).tolist() == [[0, 0], [0, 3]]
    assert llama2.segment.tolist() == [0, 0]
    assert llama2.scored.all()


def test_the_tail_of_a_character_belongs_to_its_segment() -> None:
    sequence = render(tokenizer_assets.load("qwen3"), completion_document("\u0344", "x"))
    assert sequence.segment.tolist() == [0, 0, 0, 1]
    sequence = render(tokenizer_assets.load("qwen3"), text_document("\u0300\u0344"))
    assert sequence.segment.tolist() == [0, 0, 0, 0]
    assert sequence.byte_end.tolist() == [2, 4, 4, 4]


def test_template_digests() -> None:
    assert chat_template_digest(None) is None
    assert chat_template_digest(CHATML) != chat_template_digest(ZEPHYR)
