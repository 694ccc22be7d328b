"""`build` from corpus to manifest, on a tiny teacher: coordinates, resuming, refusals, both stores.

Legend: T rows of a document, L tokens, V vocabulary.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_teacher import VOCABULARY, make_tiny_teacher, write_corpus

from cache_builder.build_config import BuildConfig
from cache_builder.builder import build
from cache_builder.engines.transformers import TransformersEngine
from cache_builder.rows import cached_document
from storage_specs.errors import (
    CacheMismatchError,
    ChatTemplateError,
    ConfigError,
    DeviceMemoryError,
    EngineError,
    OutputFolderError,
)
from storage_specs.reader import open_cache

TEXTS = [
    "Bern is a city. " * 8,
    "",
    "a",
    "日本語 e\u0301 😀\r\n\x00 end",
    "  leading and trailing  ",
    "Bern is a city. " * 3,
]
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello 😀 there"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]
FLOAT32 = {"rtol": 1e-4, "atol": 1e-7}  # what the engine's arithmetic may cost


@pytest.fixture
def config(teacher: Path, tmp_path: Path) -> BuildConfig:
    return BuildConfig(
        teacher=str(teacher),
        corpus=str(write_corpus(tmp_path / "corpus.jsonl", TEXTS)),
        output=tmp_path / "cache",
        engine="transformers",
        documents_per_shard=2,
        max_model_len=24,
        window_overlap=6,
    )


def other(config: BuildConfig, **values: Any) -> BuildConfig:
    return dataclasses.replace(config, **values)


def test_every_scored_token_has_one_row_that_equals_the_brute_force(config: BuildConfig, teacher: Path) -> None:
    """Windows are recomputed here from their definition, not from the code under test."""
    config = other(config, profile="exact")
    report = build(config)
    assert report.shards_written == 3
    assert report.work.windows_cut > 0
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    cache = open_cache(config.output)
    assert len(cache) == len(TEXTS)
    for number, text in enumerate(TEXTS):
        document = cache[number]
        assert (document.text, document.kind) == (text, "text")
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = [*encoded["input_ids"], tokenizer.eos_token_id]
        expected_rows = len(ids) - 1 if text else 0
        assert document.segment.tolist() == [0] * expected_rows
        if not expected_rows:
            continue
        assert document.is_end.tolist() == [False] * (expected_rows - 1) + [True]
        assert document.byte_start[1:].tolist() == document.byte_end[:-1].tolist()
        assert document.byte_end[-1] == len(text.encode())
        capacity, position = 23, 1
        while position < len(ids):
            stop = min(len(ids), capacity if position < capacity else position - 6 + capacity)
            start = max(0, stop - capacity)
            with torch.inference_mode():
                logits_LV = model(torch.tensor([ids[start:stop]])).logits[0].double()
            for token in range(position, stop):
                log_probs_V = logits_LV[token - start - 1].log_softmax(-1)
                top_K, row = log_probs_V.exp().sort(descending=True).values[:64].numpy(), token - 1
                np.testing.assert_allclose(document.probs[row], top_K, **FLOAT32)
                np.testing.assert_allclose(document.gold_logprob[row], log_probs_V[ids[token]], atol=1e-4)
                np.testing.assert_allclose(document.tail_mass[row], 1 - top_K.sum(), atol=1e-5)
                first = log_probs_V[document.token_ids[row]].exp().numpy()
                np.testing.assert_allclose(first, top_K[:16], **FLOAT32)
            position = stop


def test_manifest_says_who_made_it_and_counts(config: BuildConfig, teacher: Path) -> None:
    manifest = build(config).manifest
    assert manifest.teacher["name"] == "tiny"
    assert manifest.teacher["dtype"] == "float32"
    assert len(manifest.teacher["weights_digest"]) == len(manifest.tokenizer["digest"]) == 64
    assert manifest.engine["name"] == "transformers"
    assert manifest.engine["version"] == transformers.__version__
    assert (manifest.k, manifest.k_ids, manifest.vocab_size) == (64, 16, VOCABULARY)
    assert manifest.windows == {"max_model_len": 24, "overlap": 6}
    assert manifest.chat_template is None
    assert str(teacher.parent) not in json.dumps(manifest.teacher | manifest.engine | manifest.tokenizer)
    counts = manifest.counts
    cached = [open_cache(config.output)[number] for number in range(len(TEXTS))]
    assert counts["documents"] == len(TEXTS)
    assert counts["rows"] == sum(len(document.segment) for document in cached)
    assert counts["empty_documents"] == sum(len(document.segment) == 0 for document in cached) == 1
    assert counts["unscored_bytes"] == sum(document.unscored_bytes for document in cached)
    vocabulary = open_cache(config.output).vocabulary
    assert len(vocabulary.token_bytes) == VOCABULARY
    assert vocabulary.special_roles[2] == "end_of_turn"


def test_a_bos_token_gives_the_first_token_its_row(config: BuildConfig) -> None:
    build(config)
    with_bos = other(config, bos_token="<|endoftext|>", output=config.output.with_name("bos"))
    report = build(with_bos)
    assert report.manifest.counts["unscored_bytes"] == 0
    plain, bos = open_cache(config.output)[5], open_cache(with_bos.output)[5]
    assert len(bos.segment) == len(plain.segment) + 1
    assert (plain.byte_start[0], bos.byte_start[0]) == (1, 0)


def test_finished_builds_and_finished_shards_are_never_redone(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption between the last two shards: what was scored is written, the rest is scored by the next call."""
    scored: list[str] = []

    def interrupted(document: Any, *rest: Any) -> Any:
        if len(scored) == 4:
            raise KeyboardInterrupt
        scored.append(document.doc_id)
        return cached_document(document, *rest)

    monkeypatch.setattr("cache_builder.pipeline.cached_document", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(config)
    monkeypatch.setattr("cache_builder.pipeline.cached_document", cached_document)
    assert build(config).shards_written == 1
    monkeypatch.setattr(TransformersEngine, "load", lambda self: pytest.fail("the teacher was loaded for nothing"))
    report = build(config)
    assert report.shards_written == 0
    assert report.work.tokens == 0


def test_another_teacher_or_setting_is_refused(config: BuildConfig, smollm2_path: Path, tmp_path: Path) -> None:
    build(config)
    for values in (
        {"teacher": str(make_tiny_teacher(tmp_path / "tiny", smollm2_path, seed=1))},
        {"k": 32},
        {"dtype": "bfloat16"},
        {"max_model_len": 32},
        {"max_documents": 3},
        {"documents_per_shard": 3},
    ):
        with pytest.raises(CacheMismatchError):
            build(other(config, **values))
    assert build(config).shards_written == 0


def test_a_folder_that_holds_something_else_is_left_alone(config: BuildConfig) -> None:
    config.output.mkdir()
    (config.output / "thesis.txt").write_text("mine")
    with pytest.raises(OutputFolderError):
        build(config)
    assert [file.name for file in config.output.iterdir()] == ["thesis.txt"]


def test_both_stores_hold_the_same_rows(config: BuildConfig) -> None:
    build(config)
    build(arrow := other(config, store="arrow", output=config.output.with_name("arrow")))
    for number in range(len(TEXTS)):
        one, two = (dataclasses.asdict(open_cache(item.output)[number]) for item in (config, arrow))
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_equal(one[name], two[name])


def test_no_ids_no_vocabulary(config: BuildConfig) -> None:
    build(other(config, k_ids=0))
    cache = open_cache(config.output)
    assert cache.vocabulary is None
    assert cache[0].token_ids is None


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}])
def test_chat_scores_assistant_turns_with_the_teachers_template(config: BuildConfig, kwargs: dict[str, Any]) -> None:
    Path(config.corpus).write_text(json.dumps({"messages": CHAT}))
    manifest = build(other(config, max_model_len=128, chat_template_kwargs=kwargs)).manifest
    assert manifest.chat_template["kwargs"] == kwargs
    assert len(manifest.chat_template["digest"]) == 64
    document = open_cache(config.output)[0]
    assert sorted(set(document.segment.tolist())) == [1, 3]
    for segment in (1, 3):
        rows = document.segment == segment
        message = document.messages[segment]
        assert document.byte_start[rows][0] == message.byte_start
        assert document.byte_end[rows][-1] == message.byte_end
        assert document.is_end[rows].tolist() == [False] * (rows.sum() - 1) + [True]
    assert document.unscored_bytes == 0
    assert manifest.counts["end_rows"] == 2


def test_completion_scores_the_completion(config: BuildConfig) -> None:
    Path(config.corpus).write_text(json.dumps({"prompt": "The capital of France is", "completion": " Paris."}))
    build(config)
    document = open_cache(config.output)[0]
    assert document.segment.tolist() == [1] * len(document.segment)
    assert (document.byte_start[0], document.byte_end[-1]) == (24, 31)
    assert document.is_end.tolist() == [False] * (len(document.segment) - 1) + [True]


def test_chat_without_a_template_names_the_flag_and_takes_the_file(
    config: BuildConfig, teacher: Path, tmp_path: Path
) -> None:
    Path(config.corpus).write_text(json.dumps({"messages": CHAT[:2]}))
    base = other(config, teacher=str(shutil.copytree(teacher, tmp_path / "base")), max_model_len=64)
    (tmp_path / "base" / "chat_template.jinja").unlink()
    with pytest.raises(ChatTemplateError, match="--chat-template"):
        build(base)
    assert not config.output.exists()
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (tmp_path / "plain.jinja").write_text(template)
    manifest = build(other(base, chat_template=str(tmp_path / "plain.jinja"))).manifest
    assert manifest.counts["rows"] > 0
    assert manifest.counts["end_rows"] == 0


def test_settings_that_cannot_be(config: BuildConfig) -> None:
    for values, message in (
        ({"k": VOCABULARY + 1}, f"vocabulary size, {VOCABULARY}"),
        ({"k": 8, "k_ids": 9}, "k_ids is 9, but must be from 0 to k, which is 8"),
        ({"k": 0}, "k is 0"),
        ({"store": "hdf5"}, "store is 'hdf5'"),
        ({"engine": "llama"}, "engine is 'llama'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"max_model_len": 257}, "at most 256 tokens"),
        ({"window_overlap": 23}, "overlap"),
        ({"teacher": "/nowhere/to/be"}, "no such folder"),
        ({"revision": "main"}, "has no revision 'main'"),
        ({"score_roles": ("assistant", "tool")}, "never a tool's"),
        ({"score_roles": ("",)}, "must name roles"),
        ({"chat_template": "absent.jinja"}, "absent.jinja: cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(other(config, **values))
    assert not config.output.exists()
    assert BuildConfig(teacher="t", corpus="c", output=Path("o"), k=8).ids_kept == 8


def test_weights_digest_follows_content_not_place(teacher: Path, tmp_path: Path, smollm2_path: Path) -> None:
    from cache_builder.teacher import find_teacher

    same = find_teacher(str(make_tiny_teacher(tmp_path / "same", smollm2_path)))
    changed = find_teacher(str(make_tiny_teacher(tmp_path / "changed", smollm2_path, seed=5)))
    first = find_teacher(str(teacher))
    assert first.weights_digest == same.weights_digest != changed.weights_digest
    (tmp_path / "same" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no weight files"):
        find_teacher(str(tmp_path / "same"))


def test_damaged_weights_are_refused_instead_of_random_ones_used(
    config: BuildConfig, smollm2_path: Path, tmp_path: Path
) -> None:
    file = make_tiny_teacher(tmp_path / "tiny", smollm2_path) / "model.safetensors"
    whole, name = load_file(file), "model.layers.1.mlp.up_proj.weight"
    assert "lm_head.weight" not in whole, "tied weights are stored once, and are not missing"
    damaged = other(config, teacher=str(file.parent))
    save_file({key: value for key, value in whole.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(EngineError, match=rf"1 weights are missing .*\({name}\)"):
        build(damaged)
    save_file(whole | {name: whole[name][:5].contiguous()}, file, {"format": "pt"})
    with pytest.raises(EngineError, match="cannot load it"):
        build(other(damaged, output=tmp_path / "shape"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(EngineError, match="cannot load it"):
        build(other(damaged, output=tmp_path / "truncated"))


def test_a_tokenizer_of_another_teacher_is_found_before_the_folder_is_claimed(
    config: BuildConfig, smollm2_path: Path
) -> None:
    """The first document's ids all exist in this teacher; only a later one's do not."""
    write_corpus(Path(config.corpus), ["", "日本語 😀"])
    with pytest.raises(EngineError, match=f"outside the teacher's vocabulary of {VOCABULARY}"):
        build(other(config, tokenizer=str(smollm2_path)))
    assert not config.output.exists()


@pytest.mark.parametrize("mode", ["score", "generate"])
def test_a_build_that_runs_out_of_memory_keeps_its_shards(
    config: BuildConfig, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where windows, or prompts, of more than 12 tokens are too much, until they are not."""
    if mode == "generate":
        Path(config.corpus).write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a", "b", TEXTS[-1])))
        config = other(config, mode=mode, max_model_len=64, window_overlap=None, max_tokens=2)
    else:
        write_corpus(Path(config.corpus), ["a b c", "b c d", TEXTS[0]])
    real = transformers.LlamaModel.forward

    def forward(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        if input_ids.shape[1] > 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has less.")
        return real(self, input_ids=input_ids, **options)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.LlamaModel, "forward", forward)
        of = r"a window of 23 tokens" if mode == "score" else r"a prompt of \d+ tokens and up to 2 more"
        with pytest.raises(DeviceMemoryError, match=f"{of}: out of memory .*; finished shards are kept"):
            build(config)
    report = build(config)
    assert report.shards_written == 1
    assert report.manifest.counts["documents"] == 3
