"""LoRA: adapters alone are trained, saved, resumed and evaluated; the head is reached through them."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_architectures import MODERN, check, tiny
from test_command import command
from training import bits_per_byte_in
from transformers import AutoModelForCausalLM

from distill.checkpoint import RECORD, write_record
from distill.main import main
from distill.students import load_model
from storage_specs.errors import ConfigError

LORA = ("--use_peft", "--lora_r", "4", "--lora_alpha", "8", "--lora_dropout", "0.1", "--max_steps", "6")


def adapters(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_train_resume_evaluate(cache_path, student_path, tmp_path):
    student = shutil.copytree(student_path, tmp_path / "student")
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    targets = ("--lora_target_modules", "q_proj", "down_proj")
    assert main(command(cache_path, student, straight, *LORA, *targets)) == 0
    found = adapters(straight)
    assert {name.split(".")[-3] for name in found} == {"q_proj", "down_proj"}
    assert all(value.shape[0] == 4 or value.shape[1] == 4 for value in found.values())
    assert not (straight / "model.safetensors").exists()
    described = json.loads((straight / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["lora_dropout"]) == (4, 8, 0.1)

    # The run as it stood after its third step, then the same command: dropout's random states are resumed too.
    shutil.copytree(straight / "checkpoint-3", resumed / "checkpoint-3")
    identity = json.loads((straight / RECORD).read_bytes())["run"]
    write_record(resumed, {"run": identity, "finished": False})
    assert main(command(cache_path, student, resumed, *LORA, *targets)) == 0
    for name, value in found.items():
        assert torch.equal(adapters(resumed)[name], value), name

    merged, base = load_model(str(straight), "float32"), load_model(str(student), "float32")
    changed = [name for name, value in merged.state_dict().items() if not torch.equal(value, base.state_dict()[name])]
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "down_proj"}
    models = ["--model", f"before={student}", "--model", f"after={straight}", "--max_length", "64"]
    assert main(["evaluate", "--cache", str(cache_path), *models, "--output_file", str(tmp_path / "e.json")]) == 0
    figures = bits_per_byte_in(tmp_path / "e.json")
    assert figures["after"] < figures["before"]


def test_gradient_checkpointing_reaches_adapters(cache_path, student_path, tmp_path):
    reentrant = '{"use_reentrant": true}'
    flags = (*LORA, "--gradient_checkpointing", "--gradient_checkpointing_kwargs", reentrant, "--max_steps", "2")
    assert main(command(cache_path, student_path, tmp_path / "a", *flags)) == 0
    assert any(value.abs().max() > 0 for name, value in adapters(tmp_path / "a").items() if "lora_B" in name)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=str)
def test_the_head_is_reached_through_adapters(targets):
    model = get_peft_model(tiny("llama", MODERN, AutoModelForCausalLM), LoraConfig(r=2, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    check(model, encoder_decoder=False)


def test_modules_that_are_not_there_and_adapters_for_a_student(cache_path, student_path, tmp_path):
    with pytest.raises(ConfigError, match="lora_target_modules"):
        main(command(cache_path, student_path, tmp_path / "a", *LORA, "--lora_target_modules", "nowhere"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="merge them first"):
        main(command(cache_path, tmp_path / "adapter", tmp_path / "b"))
    with pytest.raises(ConfigError, match=r"adapters .* cannot be loaded"):
        load_model(str(tmp_path / "adapter"), "float32")
    with pytest.raises(ConfigError, match="lora_r"):
        main(command(cache_path, student_path, tmp_path / "c", "--use_peft", "--lora_r", "0"))
