"""The Trainer: exact weighting under accumulation, exact resuming, logs, and errors that name their cause."""

import json
import shutil

import pytest
import torch
from reference_losses import cached_uld, mapped
from training import trainer, weights

from distill.checkpoint import RECORD, last_whole_checkpoint
from storage_specs.errors import AlignmentError, CheckpointError, ConfigError, NonFiniteLossError

WEIGHTS = {"loss": "ce:0.5,uld:1.5,mapped:0.7"}


@pytest.mark.parametrize("normalization", ["tokens", "samples"])
def test_loss_is_its_definition(cache_path, student_path, tmp_path, normalization):
    one = trainer(cache_path, student_path, tmp_path, loss_normalization=normalization, **WEIGHTS)
    batch = one.data_collator([one.train_dataset[n] for n in (0, 5, 9)])
    loss = one.compute_loss(one.model, batch)
    logits_PV = one.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
    ce_R = torch.nn.functional.cross_entropy(
        logits_PV[batch["label_index_R"]].double(), batch["label_ids_R"], reduction="none"
    )
    at_NV = logits_PV[batch["student_index_N"]]
    uld_N = cached_uld(at_NV, batch["teacher_probs_NK"], batch["teacher_tail_N"])
    mapped_N = mapped(at_NV, batch["teacher_probs_NK"], batch["words_NI"])

    def mean(values, samples):
        if normalization == "tokens":
            return values.mean()
        return torch.stack([values[samples == sample].mean() for sample in samples.unique()]).mean()

    expected = (
        0.5 * mean(ce_R, batch["label_sample_R"])
        + 1.5 * mean(uld_N, batch["sample_N"])
        + 0.7 * mean(mapped_N, batch["sample_N"])
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalization", ["tokens", "samples"])
def test_accumulation_changes_nothing(cache_path, student_path, tmp_path, normalization):
    """8 documents of unequal lengths at once, or one by one: the same loss, the same weights after three steps."""
    options = {"loss_normalization": normalization, "optim": "sgd", **WEIGHTS}
    runs = []
    for size, steps in ((8, 1), (2, 4), (1, 8)):
        one = trainer(
            cache_path,
            student_path,
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            **options,
        )
        one.train()
        runs.append((weights(one), [line["loss"] for line in one.state.log_history if "loss" in line]))
    for other, losses in runs[1:]:
        assert losses == pytest.approx(runs[0][1], rel=1e-5)
        for name, value in runs[0][0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


def test_log_tells_each_term_apart(cache_path, student_path, tmp_path):
    one = trainer(cache_path, student_path, tmp_path, logging_steps=3, **WEIGHTS)
    one.train()
    (line,) = [line for line in one.state.log_history if "loss" in line]
    assert line["loss"] == pytest.approx(0.5 * line["ce"] + 1.5 * line["uld"] + 0.7 * line["mapped"], rel=1e-4)
    # How far the ULD may be from the one of whole vocabularies: 2 min(T, S), in the mean.
    assert 0 < line["uld_width"] <= 2
    assert 0 < line["compared_student"] <= 1
    assert 0 < line["compared_teacher"] <= 1
    assert line["tokens"] == one.step_log.tokens_seen > 0
    assert one.comparison.pairs > 0
    assert "of the teacher's rows" in str(one.comparison)
    assert "find a student word" in str(one.comparison)


def recorded(one):
    """Record every batch that a trainer feeds, as (input_ids, doc_ids)."""
    batches, original = [], one.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        batches.append((inputs["input_ids"].clone(), list(inputs["doc_ids"])))
        return original(model, inputs, *args, **kwargs)

    one.compute_loss = compute_loss
    return batches


@pytest.mark.parametrize("stops", [[2], [3, 5, 6, 7, 8]], ids=str)
def test_resuming_is_as_if_nothing_had_happened(cache_path, student_path, tmp_path, stops):
    """6 steps per epoch, 9 in all: stops mid-epoch, at an epoch's end, and several in a row."""
    options = {
        "max_steps": 9,
        "save_strategy": "steps",
        "save_steps": 1,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "cosine",
        "save_total_limit": 2,
    }
    straight = trainer(cache_path, student_path, tmp_path / "straight", **options)
    expected = recorded(straight)
    straight.train()
    assert straight.batches.steps == 6
    seen = []
    for stop in [*stops, None]:
        one = trainer(cache_path, student_path, tmp_path / "stopped", **options)
        batches = recorded(one)
        if stop is not None:
            one.add_callback(stop_at(stop))
        one.train(resume_from_checkpoint=last_whole_checkpoint(tmp_path / "stopped"))
        seen += batches
    assert len(seen) == len(expected) == 18
    for (ids, documents), (expected_ids, expected_documents) in zip(seen, expected, strict=True):
        assert documents == expected_documents
        assert torch.equal(ids, expected_ids)
    for name, value in weights(straight).items():
        assert torch.equal(weights(one)[name], value), name
    assert len(list((tmp_path / "stopped").glob("checkpoint-*"))) == 2


def stop_at(step):
    from transformers import TrainerCallback

    class StopAt(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step >= step

    return StopAt()


def test_resuming_from_the_very_last_checkpoint_takes_no_further_step(cache_path, student_path, tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    first = trainer(cache_path, student_path, tmp_path, **options)
    first.train()
    again = trainer(cache_path, student_path, tmp_path, **options)
    batches = recorded(again)
    again.train(resume_from_checkpoint=True)
    assert batches == []
    assert again.state.global_step == 3
    for name, value in weights(first).items():
        assert torch.equal(weights(again)[name], value)


def test_checkpoints_of_another_cache_or_half_written_are_refused(cache_path, chat_cache_path, student_path, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    trainer(cache_path, student_path, tmp_path, **options).train()
    other = trainer(chat_cache_path, student_path, tmp_path, **options)
    with pytest.raises(CheckpointError, match="cache_id"):
        other.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-2" / RECORD).unlink()
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-1"
    same = trainer(cache_path, student_path, tmp_path, **options)
    with pytest.raises(CheckpointError, match="not written to its end"):
        same.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    shutil.rmtree(tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        same.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_the_model_alone_is_not_resumed_from(cache_path, student_path, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    trainer(cache_path, student_path, tmp_path, **options).train()
    with pytest.raises(CheckpointError, match="holds no optimizer"):
        trainer(cache_path, student_path, tmp_path, **options).train(resume_from_checkpoint=True)


def test_a_checkpoint_written_anew_is_not_whole_meanwhile(cache_path, student_path, tmp_path, monkeypatch):
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer(cache_path, student_path, tmp_path, **options).train()
    whole = tmp_path / "checkpoint-1" / RECORD
    assert whole.exists()
    seen = []
    monkeypatch.setattr("transformers.Trainer._save_checkpoint", lambda *_: seen.append(whole.exists()))
    trainer(cache_path, student_path, tmp_path, **options).train()
    assert seen == [False]
    assert whole.exists()


def test_checkpoint_record_names_the_cache(cache_path, student_path, tmp_path):
    one = trainer(cache_path, student_path, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    one.train()
    record = json.loads((tmp_path / "checkpoint-1" / RECORD).read_bytes())
    assert record["run"]["cache_id"] == one.train_dataset.cache.manifest.cache_id


def test_nan_names_the_documents(cache_path, student_path, tmp_path):
    one = trainer(cache_path, student_path, tmp_path)
    batches = recorded(one)
    with torch.no_grad():
        one.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError) as error:
        one.train()
    assert all(doc_id in str(error.value) for doc_id in batches[0][1])


def test_nothing_to_compare_is_an_error(cache_path, student_path, tmp_path, monkeypatch):
    import distill.collator

    nothing = torch.zeros(0, dtype=torch.int64).numpy()
    monkeypatch.setattr(distill.collator, "align", lambda document, window, mode: (nothing, nothing))
    with pytest.raises(AlignmentError, match="positional"):
        trainer(cache_path, student_path, tmp_path).train()


@pytest.mark.parametrize(
    "wrong",
    [
        {"align": "observed"},
        {"align": "merge", "loss": "ce:1,mapped:1"},
        {"loss_normalization": "words"},
        {"loss": "ce:1,uld:-1"},
        {"mapping": "by_sound"},
        {"jsd_beta": 1.0},
        {"likelihood_temperature": 0.0},
        {"probe_steps": -1},
        {"max_eval_documents": 0},
        {"metric_for_best_model": "loss"},
        {"metric_for_best_model": "bits_per_byte", "greater_is_better": True},
        {"max_length": 1},
        {"window_overlap": 48},
        {"dataloader_num_workers": 2},
        {"remove_unused_columns": True},
        {"eval_strategy": "sometimes"},
        {"save_strategy": "sometimes"},
        {"per_device_train_batch_size": 100, "dataloader_drop_last": True},
        {"train_sampling_strategy": "sequential"},
        {"on_corrupt": "ignore"},
        {"per_device_train_batch_size": 0},
        {"gradient_accumulation_steps": 0},
        {"seed": -1},
        {"max_steps": 0},
        {"max_steps": -1, "num_train_epochs": 0},
        {"label_smoothing_factor": 0.1},
        {"chat_template_kwargs": "[1]"},
        {"report_to": "nowhere"},
        {"lr_scheduler_type": "sideways"},
        {"lr_scheduler_kwargs": {"sideways": 1}},
        {"optim": "adamw_bnb_8bit"},
        {"auto_find_batch_size": True},
        {"max_grad_norm": float("nan")},
        {"learning_rate": float("inf")},
    ],
    ids=str,
)
def test_impossible_settings(cache_path, student_path, tmp_path, wrong):
    with pytest.raises(ConfigError, match=r"\w"):
        trainer(cache_path, student_path, tmp_path, **wrong).train()


def test_a_package_that_is_missed_is_named(cache_path, student_path, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.config.is_liger_kernel_available", lambda: False)
    with pytest.raises(ConfigError, match="liger-kernel"):
        trainer(cache_path, student_path, tmp_path, use_liger_kernel=True)
