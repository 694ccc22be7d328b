"""A batch holds every scored token of its documents once, and the teacher's rows where both stand."""

from dataclasses import replace

import numpy as np
import pytest
from training import config

from distill import CachedDocuments, DistillationCollator, align
from distill.comparison import compare
from distill.trainer import CachedDistillationTrainer  # noqa: F401 (the batch's reader)
from distill.word_map import NO_WORD, WordMap
from storage_specs import cut_windows, open_cache, render
from storage_specs.errors import AlignmentError, ConfigError, TokenizerError


@pytest.mark.parametrize("max_length", [24, 200])
def test_batch_is_its_documents(cache_path, smollm2_tokenizer, tmp_path, max_length):
    cache = open_cache(cache_path)
    collator = DistillationCollator(
        smollm2_tokenizer, config(tmp_path, max_length=max_length, loss="uld:1,mapped:1"), cache
    )
    documents = [cache[3], cache[11], cache[21]]
    batch = collator(documents)
    length = batch["input_ids"].shape[1]
    assert length <= max_length
    flat = batch["input_ids"].flatten()
    index_R, targets_R = batch["label_index_R"], batch["label_ids_R"]
    assert (flat[index_R + 1] == targets_R).all()
    assert (batch["attention_mask"].flatten()[index_R + 1] == 1).all()
    assert (index_R.diff() > 0).all()
    # All scored tokens but a text's first, which nothing predicts, each once and in order.
    for number, document in enumerate(documents):
        sequence = render(smollm2_tokenizer, document)
        rows = np.flatnonzero(sequence.scored)
        assert targets_R[batch["label_sample_R"] == number].tolist() == sequence.ids[rows[rows > 0]].tolist()
    # The teacher's rows, one by one.
    n, b = 0, 0
    for number, document in enumerate(documents):
        for window in cut_windows(render(smollm2_tokenizer, document), max_length, max(1, max_length // 8)):
            index_N, row_N = align(document, window)
            part = slice(n, n + len(row_N))
            assert batch["student_index_N"][part].tolist() == (b * length + index_N).tolist()
            assert (batch["sample_N"][part] == number).all()
            np.testing.assert_array_equal(batch["teacher_probs_NK"][part], document.probs[row_N])
            np.testing.assert_array_equal(batch["teacher_tail_N"][part], document.tail_mass[row_N])
            words = collator.word_map.words_U[document.token_ids[row_N]]
            np.testing.assert_array_equal(batch["words_NI"][part], words)
            n, b = n + len(row_N), b + 1
    assert n == len(batch["student_index_N"]) > 0
    assert b == len(batch["input_ids"])
    assert set(batch["student_index_N"].tolist()) <= set(index_R.tolist())
    assert batch["teacher_rows"] == sum(len(document.segment) for document in documents)
    assert batch["doc_ids"] == [document.doc_id for document in documents]


def test_chats_mask_what_the_assistant_did_not_say(chat_cache_path, smollm2_tokenizer, tmp_path):
    cache = open_cache(chat_cache_path)
    batch = DistillationCollator(smollm2_tokenizer, config(tmp_path, max_length=256), cache)([cache[0]])
    text = smollm2_tokenizer.decode(batch["label_ids_R"])
    said = [m for m in cache[0].messages if m.role == "assistant"]
    expected = "".join(cache[0].content(cache[0].messages.index(m)) + "<|im_end|>" for m in said)
    assert text == expected
    # The teacher's tokenizer is the student's: every position is compared, the end of each turn too.
    assert batch["student_index_N"].tolist() == batch["label_index_R"].tolist()


def test_without_a_teacher_no_row_is_read(cache_path, smollm2_tokenizer, tmp_path):
    cache = open_cache(cache_path, ids=False)
    batch = DistillationCollator(smollm2_tokenizer, config(tmp_path, loss="ce:1"), cache)([cache[3]])
    assert "teacher_probs_NK" not in batch
    assert "student_index_N" not in batch


def test_a_batch_without_scored_tokens_is_one_step_of_nothing(cache_path, smollm2_tokenizer, tmp_path):
    cache = open_cache(cache_path)
    empty = next(document for document in cache if len(document.segment) == 0)
    batch = DistillationCollator(smollm2_tokenizer, config(tmp_path), cache)([empty])
    assert batch["input_ids"].shape == (1, 1)
    assert len(batch["label_index_R"]) == len(batch["student_index_N"]) == 0


def test_training_and_held_out_documents_are_all_documents_with_rows(cache_path):
    cache = open_cache(cache_path)
    training, held_out = CachedDocuments(cache), CachedDocuments(cache, held_out=True)
    ids = [{dataset[n].doc_id for n in range(len(dataset))} for dataset in (training, held_out)]
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == {document.doc_id for document in cache if len(document.segment)}
    assert sum(training.documents_per_shard) == len(training)


def test_slow_tokenizers_and_caches_without_ids_are_refused(cache_path, smollm2_tokenizer, tmp_path):
    from transformers import ByT5Tokenizer

    cache = open_cache(cache_path, ids=False)
    with pytest.raises(TokenizerError, match="fast"):
        DistillationCollator(ByT5Tokenizer(), config(tmp_path), cache)
    with pytest.raises(ConfigError, match="ids=True"):
        DistillationCollator(smollm2_tokenizer, config(tmp_path, loss="mapped:1"), cache)
    cache.manifest = replace(cache.manifest, k_ids=0)
    with pytest.raises(ConfigError, match=r"--loss ce:1,uld:1\.5.*--k-ids"):
        DistillationCollator(smollm2_tokenizer, config(tmp_path, loss="mapped:1"), cache)


def test_a_student_without_one_of_the_teachers_words_is_refused(cache_path, smollm2_tokenizer, tmp_path):
    """Before any weights are loaded; a loss that needs no words goes on."""
    cache = open_cache(cache_path)
    documents = [cache[3], cache[11]]
    for loss in ("ce:1,mapped:1", "ce:1,hybrid:1"):
        collator = DistillationCollator(smollm2_tokenizer, config(tmp_path, loss=loss), cache)
        assert compare(documents, collator).mapped_mass > 0
        collator.word_map = WordMap(words_U=np.full_like(collator.word_map.words_U, NO_WORD))
        with pytest.raises(AlignmentError, match="not one of the teacher's likeliest words in 2 documents"):
            compare(documents, collator)
    assert compare(documents, DistillationCollator(smollm2_tokenizer, config(tmp_path), cache)).mapped_mass is None
