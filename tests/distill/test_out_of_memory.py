"""Memory that is too small, raised from the model: typed, in one line, what was learned kept, and smaller goes on."""

import json

import pytest
import torch
from training import trainer
from transformers import LlamaForCausalLM, LlamaModel

from distill.checkpoint import last_whole_checkpoint
from distill.main import main
from distill.trainer_setup import setting_up
from storage_specs.command_line import run
from storage_specs.errors import ConfigError, DeviceMemoryError

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB."


@pytest.fixture
def small(monkeypatch):
    """Models hold so many rows of tokens at a time, from the so-manieth forward pass on."""
    limit = {"rows": 1000, "from": 0, "passes": 0}
    real = LlamaModel.forward

    def forward(self, input_ids=None, **options):
        limit["passes"] += 1
        if len(input_ids) > limit["rows"] and limit["passes"] > limit["from"]:
            raise torch.OutOfMemoryError(CUDA)
        return real(self, input_ids=input_ids, **options)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    return limit


def command(cache_path, student_path, output_dir, documents, micro_batches):
    return [
        *("train", "--model_name_or_path", str(student_path), "--cache", str(cache_path), "--use_cpu"),
        *("--output_dir", str(output_dir), "--max_length", "256", "--max_steps", "6", "--learning_rate", "1e-2"),
        *("--per_device_train_batch_size", str(documents), "--gradient_accumulation_steps", str(micro_batches)),
    ]


def test_training_keeps_its_last_step_and_goes_on_with_smaller_micro_batches(
    cache_path, student_path, tmp_path, small, capsys
):
    """The second micro-batch of the fifth step does not fit; the weights in the end are those of a run that fits."""
    assert main(command(cache_path, student_path, tmp_path / "whole", 4, 2)) == 0
    tried = small["passes"] - 12  # passes by which a head is tried out
    small |= {"rows": 2, "from": small["passes"] + tried + 9}
    with pytest.raises(SystemExit) as left:
        run(main, command(cache_path, student_path, tmp_path / "out", 4, 2))
    assert left.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: step 5, a micro-batch of 4 documents in 4 x ")
    assert "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB" in line
    assert "the same command resumes after step 4: try half the --per_device_train_batch_size" in line
    assert last_whole_checkpoint(tmp_path / "out").name == "checkpoint-4"
    assert main(command(cache_path, student_path, tmp_path / "out", 2, 4)) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_bytes())
    assert state["global_step"] == 6
    whole, resumed = (LlamaForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "out"))
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-3, atol=1e-4)


def test_a_first_step_that_does_not_fit_leaves_nothing(cache_path, student_path, tmp_path, small):
    small["rows"] = 2
    one = trainer(cache_path, student_path, tmp_path)
    with pytest.raises(DeviceMemoryError, match=r"^step 1, .*the same command begins again"):
        one.train()
    assert last_whole_checkpoint(tmp_path) is None
    assert all(value.grad is None for value in one.model.parameters())


def test_half_a_step_of_the_optimizer_is_not_saved(cache_path, student_path, tmp_path, monkeypatch):
    one = trainer(cache_path, student_path, tmp_path, save_strategy="steps", save_steps=1)
    real = torch.optim.AdamW.step

    def step(self, *arguments, **options):
        if one.state.global_step == 2:
            raise torch.OutOfMemoryError(CUDA)
        return real(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(DeviceMemoryError, match=r"^the optimizer, .*resumes after step 2"):
        one.train()
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-2"


def test_held_out_text_and_weights_that_do_not_fit(cache_path, student_path, tmp_path, small, monkeypatch):
    options = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 5, "loss": "ce:1"}
    one = trainer(cache_path, student_path, tmp_path, **options)
    real = one.evaluate

    def evaluate(*arguments, **named):
        small["rows"] = 0
        return real(*arguments, **named)

    monkeypatch.setattr(one, "evaluate", evaluate)
    with pytest.raises(DeviceMemoryError, match=r"^held-out documents, 5 x 48 tokens: .*--per_device_eval_batch_size"):
        one.train()
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-2"
    with pytest.raises(DeviceMemoryError, match="the student's weights: out of memory"), setting_up():
        raise torch.OutOfMemoryError(CUDA)
    with pytest.raises(ConfigError, match="RuntimeError: else"), setting_up():
        raise RuntimeError("else")


def test_a_look_ahead_that_does_not_fit_is_put_back_before_anything_is_saved(
    cache_path, student_path, tmp_path, monkeypatch
):
    """Its second step fails, behind one of the optimizer; the checkpoint is that of a run that never looked ahead."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    plain = trainer(cache_path, student_path, tmp_path / "plain", **options)
    plain.train()
    looking = {"eval_strategy": "steps", "eval_steps": 2, "look_ahead_steps": 2, "save_strategy": "no"}
    one = trainer(cache_path, student_path, tmp_path / "out", **options | looking)
    real, steps = one.compute_loss, []

    def compute_loss(*arguments, **named):
        steps.append(one.is_looking_ahead)
        if sum(steps) == 2:
            raise torch.OutOfMemoryError(CUDA)
        return real(*arguments, **named)

    monkeypatch.setattr(one, "compute_loss", compute_loss)
    with pytest.raises(DeviceMemoryError, match=r"^held-out .*resumes after step 2.*no --look_ahead_steps"):
        one.train()
    assert steps == [False, False, True, True]
    expected, found = (
        LlamaForCausalLM.from_pretrained(tmp_path / name / "checkpoint-2").state_dict() for name in ("plain", "out")
    )
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_evaluation_goes_on_with_smaller_batches(cache_path, student_path, tmp_path, small):
    """What was answered before is not asked again."""
    task = tmp_path / "task.jsonl"
    prompts = [{"prompt": "one " * (20 - n), "answer": "two"} for n in range(12)]
    task.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    flags = ["evaluate", "--model", f"s={student_path}", "--task", str(task), "--max_new_tokens", "1"]
    assert main([*flags, "--output_file", str(tmp_path / "whole.json")]) == 0
    flags += ["--output_file", str(tmp_path / "e.json"), "--batch_size"]
    small |= {"rows": 3, "from": small["passes"] + 2}
    with pytest.raises(DeviceMemoryError, match=r"^model s, 4 prompts .* at a time: .*try a smaller --batch_size"):
        main([*flags, "4"])
    answered = (tmp_path / "e.json.partial" / "s.jsonl").read_text().splitlines()
    assert main([*flags, "2"]) == 0
    found, whole = ((tmp_path / f"{name}.json.predictions" / "s.jsonl").read_text() for name in ("e", "whole"))
    assert found.splitlines()[: len(answered)] == answered
    assert sorted(found.splitlines()[1:]) == sorted(whole.splitlines()[1:])


def test_a_review_names_what_did_not_fit(cache_path, student_path, tmp_path, small):
    small["rows"] = 0
    flags = ["review", "--cache", str(cache_path), "--model", f"s={student_path}", "--max_length", "48"]
    with pytest.raises(DeviceMemoryError, match=r"^model s, 8 windows of at most 48 .*try a smaller --batch_size"):
        main([*flags, "--output_file", str(tmp_path / "sheet.csv")])
