"""Processes under torchrun, gloo on the CPU: the loss curve and the weights of one process at equal global batch.

Tolerance: 2e-5 relative on every logged loss, 2e-4 absolute on weights of the order of 1e-1 to 1 after 8 AdamW steps,
but for one in 10^5: what differs is only the order in which float32 gradients are summed, and AdamW divides a gradient
of nearly nothing by itself.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_command import command

from distill.checkpoint import RECORD, write_record
from distill.main import main

ROOT = Path(__file__).parents[2]
STEPS = 8
FSDP = ("--fsdp", "--fsdp_config", json.dumps({"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}))
LOSS = ("--loss", "ce:1,uld:1.5,mapped:0.5")


def launch(processes, arguments, check=True, program=("-m", "distill")):
    """A program under torchrun; its processes share one core here."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    start = (*torchrun, *program) if processes > 1 else program
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *start, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def flags(cache_path, student_path, out, documents, *more):
    size = ("--per_device_train_batch_size", str(documents), "--max_steps", str(STEPS), "--save_steps", "3")
    return command(cache_path, student_path, out, *size, *LOSS, *more)


def losses(out):
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    told = ("loss", "ce", "uld", "mapped", "kl", "jsd")
    return [[line[name] for name in told if name in line] for line in history if "ce" in line]


@pytest.fixture(scope="module")
def one_process(cache_path, student_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    launch(1, flags(cache_path, student_path, out, 4))
    return out


def same(out, expected, file="model.safetensors") -> None:
    for found, wanted in zip(losses(out), losses(expected), strict=True):
        assert found == pytest.approx(wanted, rel=2e-5)
    found, wanted = (load_file(folder / file) for folder in (out, expected))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        apart = (found[name] - value).abs()
        assert (apart > 2e-4).sum() <= 1e-5 * apart.numel(), name
        assert apart.max() < 2e-3, name


@pytest.mark.parametrize(
    ("processes", "more"),
    [(2, ()), (4, ()), (2, FSDP), (4, FSDP)],
    ids=["ddp2", "ddp4", "fsdp2-2", "fsdp2-4"],
)
def test_ranks_learn_what_one_process_learns(cache_path, student_path, one_process, tmp_path, processes, more):
    """6 or 7 steps are an epoch, and its last batch is incomplete: on 4 ranks some hold nothing of it."""
    out, resumed = tmp_path / "whole", tmp_path / "resumed"
    arguments = flags(cache_path, student_path, out, 4 // processes, *more)
    launch(processes, arguments)
    same(out, one_process)
    # As it stood after its third step; the same command goes on.
    shutil.copytree(out / "checkpoint-3", resumed / "checkpoint-3")
    write_record(resumed, {"run": json.loads((out / RECORD).read_bytes())["run"], "finished": False})
    done = launch(processes, flags(cache_path, student_path, resumed, 4 // processes, *more))
    assert "resuming from" in done.stderr
    same(resumed, one_process)


def test_every_kind_of_student_and_loss_under_two_ranks(
    cache_path, chat_cache_path, student_path, prompts_path, mt0_path, tmp_path
):
    """LoRA, packing and an encoder-decoder under FSDP2; KL and JSD of the teacher's own tokenizer under DDP."""
    of_t5 = ("--fsdp", "--fsdp_config", FSDP[2].replace("LlamaDecoderLayer", "T5Block"))
    cases = {
        "lora": (cache_path, student_path, FSDP, (*LOSS, "--use_peft", "--lora_r", "4", "--lora_dropout", "0")),
        "packing": (cache_path, student_path, FSDP, (*LOSS, "--packing")),
        "seq2seq": (prompts_path, mt0_path, of_t5, LOSS),
        "kl": (chat_cache_path, student_path, (), ("--loss", "ce:1,kl:1,jsd:0.5")),
    }
    steps = ("--max_steps", "3", "--save_strategy", "no", "--per_device_train_batch_size")
    runs = []
    for name, (cache, student, parallel, more) in cases.items():
        assert main(command(cache, student, tmp_path / f"{name}-1", *steps, "4", *more)) == 0
        runs.append(command(cache, student, tmp_path / f"{name}-2", *steps, "2", *more, *parallel))
    launch(2, [json.dumps(runs)], program=(str(Path(__file__).with_name("rank_cases.py")),))
    for name in cases:
        file = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
        same(tmp_path / f"{name}-2", tmp_path / f"{name}-1", file)
