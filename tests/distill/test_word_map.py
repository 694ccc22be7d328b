"""Teacher ids to student words, on the real pair and on special cases."""

import time

import numpy as np
import pytest

from distill.word_map import NO_WORD, map_words, same_words
from storage_specs import special_roles, token_bytes
from storage_specs.errors import ConfigError
from storage_specs.vocabulary import token_with_role, tokenizer_digest


@pytest.fixture(scope="module")
def gemma_words(gemma_tokenizer, smollm2_tokenizer):
    started = time.process_time()
    words = map_words(token_bytes(gemma_tokenizer), special_roles(gemma_tokenizer), smollm2_tokenizer)
    assert time.process_time() - started < 60, "262,144 ids take a few seconds of computing"
    return words


def test_words_are_the_students_tokens_inside_running_text(gemma_words, gemma_tokenizer, smollm2_tokenizer):
    spelled = token_bytes(smollm2_tokenizer)
    teacher = {bytes_: token_id for token_id, bytes_ in enumerate(token_bytes(gemma_tokenizer))}
    for text in (b"the", b" the", b"ing", b" Paris", b"\n\n", b"12", b" "):
        if text in teacher:
            word = gemma_words.words_U[teacher[text]]
            expected = smollm2_tokenizer("x" + text.decode() if text[:1] in b" \n" else "." + text.decode()).input_ids[
                1
            ]
            assert word == expected, text
    words_U, special = gemma_words.words_U, special_roles(gemma_tokenizer)
    ordinary = [
        (bytes_, spelled[words_U[token_id]])
        for bytes_, token_id in teacher.items()
        if bytes_ and words_U[token_id] != NO_WORD and token_id not in special
    ]
    assert np.mean([bytes_.startswith(word) for bytes_, word in ordinary]) > 0.9999
    assert gemma_words.mapped_ids > 0.97


def test_special_tokens_map_by_role(gemma_words, gemma_tokenizer, smollm2_tokenizer):
    roles = special_roles(gemma_tokenizer)
    student_roles = special_roles(smollm2_tokenizer)
    found = {role: gemma_words.words_U[token_id] for token_id, role in roles.items() if role != "other"}
    # SmolLM2 has one token for EOS and the end of a turn.
    assert found["eos"] == found["end_of_turn"] == token_with_role(student_roles, "end_of_turn")
    assert found["bos"] == token_with_role(student_roles, "bos")
    others = [token_id for token_id, role in roles.items() if role == "other"]
    assert (gemma_words.words_U[others] == NO_WORD).all()


def test_bytes_that_are_not_text(smollm2_tokenizer):
    spelled = token_bytes(smollm2_tokenizer)
    words = map_words([b"\xe6", b"\xff", None, b"", b"<|im_start|>", "日".encode()], {}, smollm2_tokenizer).words_U
    assert spelled[words[0]] == b"\xe6"
    assert b"\xff" not in spelled
    assert words[1:5].tolist() == [NO_WORD] * 4
    assert "日".encode().startswith(spelled[words[5]])


def test_shares(gemma_words):
    mapped = int(np.flatnonzero(gemma_words.words_U != NO_WORD)[0])
    unmapped = int(np.flatnonzero(gemma_words.words_U == NO_WORD)[0])
    ids_NI = np.array([[mapped, unmapped], [mapped, mapped]])
    probs_NK = np.array([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
    assert gemma_words.mapped_mass(ids_NI, probs_NK) == pytest.approx(0.625)
    assert gemma_words.mapped_mass(ids_NI[:0], probs_NK[:0]) == 0


def test_equal_bytes_keeps_whole_words_only(gemma_words, gemma_tokenizer, smollm2_tokenizer):
    spelled, roles = token_bytes(gemma_tokenizer), special_roles(gemma_tokenizer)
    equal = map_words(spelled, roles, smollm2_tokenizer, "equal_bytes")
    of_student = token_bytes(smollm2_tokenizer)
    kept = equal.words_U != NO_WORD
    assert 0.1 < kept.mean() < gemma_words.mapped_ids
    assert (equal.words_U[kept] == gemma_words.words_U[kept]).all()
    for token_id in np.flatnonzero(kept).tolist()[::50]:
        assert token_id in roles or of_student[equal.words_U[token_id]] == spelled[token_id]
    for token_id in np.flatnonzero(~kept & (gemma_words.words_U != NO_WORD)).tolist()[::50]:
        assert of_student[gemma_words.words_U[token_id]] != spelled[token_id]
    with pytest.raises(ConfigError, match="first_token"):
        map_words(spelled, roles, smollm2_tokenizer, "by_sound")


def test_the_same_words_only_for_the_same_tokenizer(gemma_tokenizer, smollm2_tokenizer):
    spelled = token_bytes(smollm2_tokenizer)
    digest = tokenizer_digest(smollm2_tokenizer)
    for teacher_digest, teacher_bytes in (
        (digest, spelled),
        ("another file of the same vocabulary", spelled),
        (digest, [*spelled, None, None]),  # a model's vocabulary is often rounded up
        (None, [*spelled, None]),
    ):
        words_U = same_words(teacher_digest, teacher_bytes, smollm2_tokenizer).words_U
        assert words_U[: len(spelled)].tolist() == list(range(len(spelled)))
        assert (words_U[len(spelled) :] == NO_WORD).all()
    assert same_words(None, token_bytes(gemma_tokenizer), smollm2_tokenizer) is None
    assert same_words(None, [*spelled[:-1], b"other"], smollm2_tokenizer) is None
    assert same_words(None, [*spelled, b"one more"], smollm2_tokenizer) is None
