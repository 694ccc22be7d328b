"""Encoder-decoder students (the paper's mT0): prompts are read, completions written, rows stand at the same bytes.

With the Unigram tokenizer of T5, which loses white space and folds characters.
"""

import numpy as np
import pytest
import torch
from reference_losses import cached_uld
from test_command import command
from torch.nn.functional import cross_entropy
from training import bits_per_byte_in, config
from transformers import T5Config, T5ForConditionalGeneration

from distill import CachedDistillationTrainer, CachedDocuments, DistillationCollator, align
from distill.encoder_decoder import decoder_start_of, encoder_decoder_pairs
from distill.main import main
from distill.student_inputs import StudentInputs
from storage_specs import chat_document, completion_document, open_cache, text_document
from storage_specs.errors import ConfigError

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"


def test_a_completion_is_read_and_written(t5_tokenizer):
    document = completion_document("Where is  Paris?", "  In France, \ufb01nally.")
    ((encoder_E, tokens),) = encoder_decoder_pairs(t5_tokenizer, document, 0, 64)
    assert t5_tokenizer.decode(encoder_E) == "Where is Paris?</s>"
    assert tokens.prefix_ids.tolist() == [0]
    assert t5_tokenizer.decode(tokens.ids) == "In France, finally.</s>"
    data = document.text.encode()
    said = [data[a:b].decode() for a, b in zip(tokens.byte_start, tokens.byte_end, strict=True)]
    assert "".join(said) == "  In France, \ufb01nally."  # dropped spaces belong to the token behind them
    assert tokens.segment.tolist() == [1] * len(tokens.ids)
    assert tokens.is_end.tolist() == [False] * (len(tokens.ids) - 1) + [True]
    assert tokens.byte_start[-1] == tokens.byte_end[-1] == len(data)
    assert tokens.scored.all()
    # What is longer than a window loses its beginning, not its end.
    ((short_E, _),) = encoder_decoder_pairs(t5_tokenizer, document, 0, 3)
    assert short_E.tolist() == encoder_E[-3:].tolist()


def test_texts_have_nothing_to_read_and_chats_one_pair_for_each_turn(t5_tokenizer):
    ((encoder_E, tokens),) = encoder_decoder_pairs(t5_tokenizer, text_document("Some text."), 0, 64)
    assert t5_tokenizer.decode(encoder_E) == "</s>"
    assert t5_tokenizer.decode(tokens.ids) == "Some text.</s>"
    turns = [("user", "Hello?"), ("assistant", "Yes."), ("user", "Why?"), ("assistant", "Because.")]
    chat = chat_document([{"role": role, "content": content} for role, content in turns])
    first, second = encoder_decoder_pairs(t5_tokenizer, chat, 0, 64, TEMPLATE)
    assert t5_tokenizer.decode(first[1].ids) == "Yes.</s>"
    assert first[1].segment[0] == 1
    assert t5_tokenizer.decode(second[1].ids) == "Because.</s>"
    assert "Yes." in t5_tokenizer.decode(second[0])
    assert "Because" not in t5_tokenizer.decode(second[0])
    data = chat.text.encode()
    assert data[second[1].byte_start[0] : second[1].byte_end[-1]].decode() == "Because."
    assert encoder_decoder_pairs(t5_tokenizer, completion_document("only a prompt", ""), 0, 64) == []


@pytest.mark.parametrize("max_length", [20, 200])
def test_rows_stand_where_the_teacher_stood(prompts_path, t5_tokenizer, tmp_path, max_length):
    cache = open_cache(prompts_path)
    options = config(tmp_path, max_length=max_length)
    collator = DistillationCollator(t5_tokenizer, options, cache, decoder_start=0)
    documents = [cache[0], cache[7], cache[31]]
    batch = collator(documents)
    decoder_ids = batch["decoder_input_ids"].flatten()
    # Position i of the decoder predicts its input i + 1, and at a window's end the last target.
    inner = batch["decoder_attention_mask"].flatten()[batch["label_index_R"] + 1] == 1
    following = decoder_ids[batch["label_index_R"] + 1]
    assert (following[inner] == batch["label_ids_R"][inner]).all()
    inputs = StudentInputs(t5_tokenizer, max_length=max_length, window_overlap=options.window_overlap, decoder_start=0)
    compared, rows = [], 0
    for document in documents:
        seen = np.zeros(len(document.segment), dtype=int)
        for window in inputs.windows([document])[0]:
            index_N, row_N = align(document, window)
            at = np.searchsorted(window.logits_index, index_N)
            content = ~window.is_end[at]
            np.testing.assert_array_equal(window.segment[at], document.segment[row_N])
            # The teacher's token begins where the student's does, or in the spaces that its tokenizer dropped.
            assert (document.byte_start[row_N][content] >= window.byte_start[at][content]).all()
            assert (document.byte_start[row_N][content] <= window.token_start[at][content]).all()
            np.testing.assert_array_equal(window.is_end[at], document.is_end[row_N])
            seen[row_N] += 1
            compared.append(document.probs[row_N])
        assert seen.max() == 1
        rows += seen.sum()
    np.testing.assert_array_equal(batch["teacher_probs_NK"], np.concatenate(compared))
    assert rows / batch["teacher_rows"] > 0.4


def test_loss_is_its_definition(prompts_path, mt0_path, t5_tokenizer, tmp_path):
    model = T5ForConditionalGeneration.from_pretrained(mt0_path)
    args = config(tmp_path, max_length=64)
    one = CachedDistillationTrainer(model, args, CachedDocuments(prompts_path), t5_tokenizer)
    batch = one.data_collator([one.train_dataset[n] for n in (0, 3, 8)])
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    logits_PV = model(**{name: batch[name] for name in names}).logits.flatten(0, 1)
    ce = cross_entropy(logits_PV[batch["label_index_R"]].double(), batch["label_ids_R"])
    at_NV = logits_PV[batch["student_index_N"]]
    uld = cached_uld(at_NV, batch["teacher_probs_NK"], batch["teacher_tail_N"]).mean()
    torch.testing.assert_close(one.compute_loss(model, batch).double(), ce + 1.5 * uld, rtol=1e-5, atol=1e-6)


def test_train_and_evaluate(prompts_path, mt0_path, tmp_path):
    out = tmp_path / "student"
    flags = command(prompts_path, mt0_path, out, "--max_steps", "20", "--loss", "ce:1,uld:1,mapped:1")
    assert main(flags) == 0
    models = ["--model", f"before={mt0_path}", "--model", f"after={out}", "--max_length", "64"]
    assert main(["evaluate", "--cache", str(prompts_path), *models, "--output_file", str(tmp_path / "e.json")]) == 0
    figures = bits_per_byte_in(tmp_path / "e.json")
    assert figures["after"] < 0.97 * figures["before"]


def test_what_cannot_be(prompts_path, t5_tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="packing"):
        DistillationCollator(t5_tokenizer, config(tmp_path, packing=True), open_cache(prompts_path), decoder_start=0)
    nothing = T5Config(is_encoder_decoder=True)
    nothing.decoder_start_token_id = nothing.bos_token_id = nothing.pad_token_id = None
    with pytest.raises(ConfigError, match="decoder_start_token_id"):
        decoder_start_of(nothing)
