"""Held-out bits per byte while a student trains: the figure of `distill evaluate`, and the best checkpoint by it."""

import pytest
from training import config, load_tokenizer, trainer, weights

from distill.evaluation.answering import Answering
from distill.evaluation.evaluate import Evaluation, evaluate
from storage_specs import open_cache
from storage_specs.errors import AlignmentError, ConfigError

OPTIONS = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}


def evaluated(one):
    return [line for line in one.state.log_history if "eval_bits_per_byte" in line]


def test_it_is_the_figure_of_evaluate(cache_path, student_path, tmp_path, capsys):
    one = trainer(cache_path, student_path, tmp_path / "run", **OPTIONS)
    one.train()
    lines = evaluated(one)
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[1]["eval_bits_per_byte"] < lines[0]["eval_bits_per_byte"]
    assert one.model.training
    one.save_model(str(tmp_path / "student"))
    load_tokenizer(student_path).save_pretrained(tmp_path / "student")
    how = Answering(max_length=one.args.max_length)
    models = {"student": str(tmp_path / "student")}
    report = evaluate(Evaluation(models=models, cache=open_cache(cache_path), how=how))
    bits = {name: model.metrics["bits_per_byte"].value for name, model in report.models.items()}
    assert lines[1]["eval_bits_per_byte"] == pytest.approx(bits["student"], rel=1e-5)
    assert lines[1]["eval_teacher_bits_per_byte"] == pytest.approx(bits["teacher"], rel=1e-6)
    assert lines[1]["eval_documents"] == report.subjects["cache"]["documents"]
    assert "eval_bits_per_byte" in capsys.readouterr().err


def test_evaluating_changes_no_step(cache_path, student_path, tmp_path):
    runs = []
    for name, options in (("with", OPTIONS), ("without", {"max_steps": 4})):
        one = trainer(cache_path, student_path, tmp_path / name, **options)
        one.train()
        runs.append(weights(one))
    assert all((runs[0][name] == value).all() for name, value in runs[1].items())


def test_epochs_and_fewer_documents(cache_path, student_path, tmp_path):
    options = {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch", "max_eval_documents": 1}
    one = trainer(cache_path, student_path, tmp_path, **options)
    one.train()
    assert [line["epoch"] for line in evaluated(one)] == [1, 2]
    assert {line["eval_documents"] for line in evaluated(one)} == {1}


def test_the_best_checkpoint_is_the_one_of_fewest_bits(cache_path, student_path, tmp_path):
    """A learning rate at which every step makes it worse: the first checkpoint stays, and is what the run ends with."""
    one = trainer(
        cache_path,
        student_path,
        tmp_path,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        learning_rate=0.5,
        lr_scheduler_type="constant",
    )
    assert (one.args.metric_for_best_model, one.args.greater_is_better) == ("bits_per_byte", False)
    one.train()
    bits = [line["eval_bits_per_byte"] for line in evaluated(one)]
    best = bits.index(min(bits)) + 1
    assert best < 3
    assert one.state.best_metric == min(bits)
    assert one.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{best}"}
    assert one.evaluate()["eval_bits_per_byte"] == pytest.approx(min(bits), rel=1e-6)


def test_what_cannot_be_measured(cache_without_held_out, student_path, tmp_path):
    with pytest.raises(ConfigError, match="bits_per_byte is what is measured"):
        config(tmp_path, metric_for_best_model="eval_loss", **OPTIONS)
    assert not config(tmp_path, metric_for_best_model="eval_bits_per_byte", **OPTIONS).greater_is_better
    with pytest.raises(AlignmentError, match="no held-out documents"):
        trainer(cache_without_held_out, student_path, tmp_path, **OPTIONS)
