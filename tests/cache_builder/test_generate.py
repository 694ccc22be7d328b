"""`build --mode generate` on a tiny teacher: rows of the tokens that were drawn, resuming, verification, prompts.

Legend: L tokens, V vocabulary, K ranks.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from building import digests
from tiny_teacher import VOCABULARY

from cache_builder.build_config import BuildConfig
from cache_builder.builder import build
from cache_builder.engines.transformers_generate import TransformersGenerator, draw
from cache_builder.inspection import build_summary
from cache_builder.preparation import prepare
from cache_builder.shard_worker import ShardWorker
from storage_specs.document import is_held_out
from storage_specs.errors import CacheMismatchError, ConfigError
from storage_specs.generated import REFUSED, prompt_of
from storage_specs.reader import open_cache
from storage_specs.verification import verify_cache

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a river 😀"}]
RECORDS = [
    {"prompt": "The capital of France is", "completion": " old", "source": "a"},
    {"messages": [*CHAT, {"role": "assistant", "content": "old"}]},
    {"prompt": "日本語4"},
    {"prompt": "The capital of France is"},
]


@pytest.fixture
def config(teacher: Path, tmp_path: Path) -> BuildConfig:
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    return BuildConfig(
        teacher=str(teacher),
        corpus=str(tmp_path / "prompts.jsonl"),
        output=tmp_path / "cache",
        engine="transformers",
        profile="exact",
        mode="generate",
        documents_per_shard=3,
        max_tokens=9,
        n=2,
        temperature=0.8,
        top_p=0.9,
        top_k=50,
        seed=5,
    )


def other(config: BuildConfig, **values: Any) -> BuildConfig:
    return dataclasses.replace(config, **values)


def test_every_row_is_the_brute_force_distribution_of_a_token_that_was_drawn(
    config: BuildConfig, teacher: Path
) -> None:
    """Prompts rendered by transformers itself, one forward pass over all tokens, each draw repeated."""
    prepared = prepare(config)
    recipe = prepared.recipe
    assert len(prepared.documents) == 8
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    worker = ShardWorker(recipe, prepared.engine)
    for number in (0, 3, 5):
        prompt = worker.prompt(prepared.documents[number], worker.samples[number])
        record = RECORDS[number // 2]
        text = record.get("prompt") or tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        assert prompt.ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
        (made,) = TransformersGenerator(prepared.engine, recipe.sampling, worker.words).generate([prompt])
        with torch.inference_mode():
            logits_LV = model(torch.tensor([[*prompt.ids, *made.ids]])).logits[0]
        random = torch.Generator().manual_seed(prompt.seed)
        for row, token in enumerate(made.ids):
            position = len(prompt.ids) - 1 + row
            log_probs_V = logits_LV[position].double().log_softmax(-1)
            sorted_V = log_probs_V.exp().sort(descending=True).values.numpy()
            np.testing.assert_allclose(made.scores.probs[row], sorted_V[:64], atol=1e-6)
            np.testing.assert_allclose(made.scores.tail_mass[row], sorted_V[64:].sum(), atol=1e-5)
            np.testing.assert_allclose(made.scores.gold_logprob[row], log_probs_V[token], atol=1e-4)
            assert draw(logits_LV[position], recipe.sampling, random) == token
    worker.engine.close()


def test_the_cache_holds_prompts_completions_and_settings(config: BuildConfig) -> None:
    manifest = build(config).manifest
    assert verify_cache(config.output).ok
    cache = open_cache(config.output)
    assert len(cache) == 8
    for number, document in enumerate(cache):
        record = RECORDS[number // 2]
        expected = record.get("prompt") or "".join(turn["content"] for turn in CHAT)
        assert prompt_of(document).text == expected
        assert document.text.startswith(expected)
        last = document.messages[-1]
        assert (last.role, last.scored) == ("assistant" if "messages" in record else "completion", True)
        assert not any(message.scored for message in document.messages[:-1])
        about = document.metadata["generation"]
        assert about["sample"] == (number % 2 if number < 6 else number - 4)  # the first prompt comes again as the last
        assert len(document.segment) == about["tokens"] == 9 or about["finish_reason"] != "length"
    kept = [item for item in cache if item.metadata["generation"]["finish_reason"] != REFUSED]  # half a character
    assert len({document.text for document in kept}) == len(kept) > 3
    assert cache.held_out_D.tolist() == [is_held_out(prompt_of(document).doc_id) for document in cache]
    assert np.flatnonzero(cache.held_out_D).tolist() == [4, 5]  # both samples of one prompt
    assert manifest.held_out == {"rule": "crc32c(prompt_id) % 10 == 0", "documents": 2}
    assert manifest.corpus["documents"] == manifest.counts["documents"] == 8
    assert manifest.windows["overlap"] == 0
    sampling = {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "n": 2, "seed": 5, "max_tokens": 9, "stop": []}
    assert manifest.generation == {**sampling, "stop_token_ids": [2], "refused": 8 - len(kept)}
    assert len(cache.vocabulary.token_bytes) == VOCABULARY


def test_an_interrupted_build_goes_on_to_the_same_bytes(config: BuildConfig) -> None:
    build(other(config, output=config.output.with_name("whole")))
    whole = digests(config.output.with_name("whole"))
    assert build(other(config, shard_range=(1, 2))).shards_missing == 2
    build(config)
    assert digests(config.output) == whole
    (config.output / "manifest.json").unlink()
    (config.output / "shards" / "000000.json").unlink()
    assert build(config).shards_written == 1
    assert digests(config.output) == whole


def test_other_sampling_is_another_cache(config: BuildConfig) -> None:
    build(config)
    for values in ({"seed": 6}, {"temperature": 0.7}, {"n": 1}, {"max_tokens": 8}, {"stop": ("x",)}):
        with pytest.raises(CacheMismatchError):
            build(other(config, **values))


def test_a_record_that_answers_other_prompts_is_not_believed(config: BuildConfig) -> None:
    build(config)
    swapped = other(config, output=config.output.with_name("swapped"))
    lines = Path(config.corpus).read_text().splitlines()
    (config.output.parent / "other.jsonl").write_text("\n".join(reversed(lines)))
    build(other(swapped, corpus=str(config.output.parent / "other.jsonl")))
    (config.output / "manifest.json").unlink()
    for file in (swapped.output / "shards").rglob("000000*/**/*"):
        if file.is_file():
            target = config.output / file.relative_to(swapped.output)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    (config.output / "shards" / "000000.json").write_bytes((swapped.output / "shards" / "000000.json").read_bytes())
    assert build(config).shards_written == 1
    assert verify_cache(config.output).ok


def test_end_tokens_stop_strings_and_bytes_that_are_no_text(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy over planted logits: the tiny teacher itself never says anything."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.teacher)
    smile = tokenizer("😀", add_special_tokens=False)["input_ids"]
    hello = tokenizer("Hello there.", add_special_tokens=False)["input_ids"]
    plans = {
        "ends": [*hello, 2],
        "cut": [*hello, *smile[:-1]],
        "broken": [smile[-1], *hello, 2],
        "stops": hello + hello,
    }
    script: list[int] = []
    monkeypatch.setattr(
        "cache_builder.engines.transformers_generate.draw", lambda logits_V, sampling, random: script.pop(0)
    )
    expected = {"ends": ("Hello there.", 1), "cut": ("Hello there.", 0), "broken": ("", 0), "stops": ("Hello", 0)}
    for name, plan in plans.items():
        script[:] = plan
        Path(config.corpus).write_text(json.dumps({"prompt": "Say: "}))
        values = {"temperature": 0.0, "top_p": None, "top_k": None, "n": 1, "max_tokens": len(plan)}
        one = other(config, **values, output=config.output / name, stop=(" there",) if name == "stops" else None)
        manifest = build(one).manifest
        document = open_cache(one.output)[0]
        assert (document.text, int(document.is_end.sum())) == ("Say: " + expected[name][0], expected[name][1])
        assert manifest.generation["refused"] == (name == "broken")
        assert verify_cache(one.output).ok


def test_prompts_that_do_not_fit_and_options_that_do_not_apply(config: BuildConfig) -> None:
    with pytest.raises(ConfigError, match="leaves no room in 5 tokens"):
        build(other(config, max_model_len=5))
    assert not config.output.exists()
    assert open_cache(build_output(other(config, max_model_len=14, n=1)))[1].metadata["generation"]["tokens"] <= 14
    for values, message in (
        ({"kind": "chat"}, "kind is for texts that are scored"),
        ({"min_bytes": 3}, "min_bytes is for texts"),
        ({"mode": "sample"}, "mode is 'sample'"),
        ({"mode": "score"}, "temperature, top_p, top_k, n, seed, max_tokens: for completions"),
    ):
        with pytest.raises(ConfigError, match=message):
            other(config, **values)


def test_completions_without_room_for_max_tokens_are_counted(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three prompts the middle one leaves two tokens; of its two samples one ends by itself there."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.teacher)
    prompts = ["one", "one two three four", "one two"]
    assert [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in prompts] == [1, 4, 2]
    Path(config.corpus).write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    word = tokenizer(" one", add_special_tokens=False)["input_ids"][0]
    script = [*[word] * 8, word, 2, word, word, *[word] * 8]
    monkeypatch.setattr(
        "cache_builder.engines.transformers_generate.draw", lambda logits_V, sampling, random: script.pop(0)
    )
    config = other(config, max_tokens=4, max_model_len=6)
    report = build(config)
    assert not script
    assert report.work.cut_short == 1
    assert capsys.readouterr().err.splitlines()[0] == (
        "max_tokens 4: 1 of 3 prompts leave less room in max_model_len 6 (the longest, of 4 tokens, leaves 2), where "
        "their completions may be cut; --max_model_len 8 would have room for all"
    )
    summary = build_summary(report, config.output)
    assert "\n1 completions were cut by max_model_len, before max_tokens; 0 were refused" in summary
    abouts = [document.metadata["generation"] for document in open_cache(config.output)]
    assert [(about["finish_reason"], about["tokens"]) for about in abouts] == [
        *[("length", 4)] * 2,
        ("stop", 2),
        ("length", 2),
        *[("length", 4)] * 2,
    ]
    roomy = other(config, output=config.output.with_name("roomy"), max_model_len=8)
    script[:] = [word] * 24
    report = build(roomy)
    assert report.work.cut_short == 0
    assert "max_tokens" not in build_summary(report, roomy.output)
    assert "max_tokens" not in capsys.readouterr().err


def test_max_tokens_that_no_prompt_leaves_is_refused(config: BuildConfig) -> None:
    with pytest.raises(ConfigError, match="max_tokens is 60, but a prompt and its completion have 60 tokens together"):
        build(other(config, max_tokens=60, max_model_len=60))
    assert not config.output.exists()


def build_output(config: BuildConfig) -> Path:
    Path(config.corpus).write_text("\n".join([json.dumps({"prompt": "one two"})] * 2))
    build(config)
    return config.output
