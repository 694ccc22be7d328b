"""What a run tells is the same on one process and under torchrun: every loss, held-out bits per byte, and probes.

With `samples` a mean over ranks of their documents' means is the mean over all documents, so that even the gradients of
one micro-batch of each rank are those of one micro-batch of one process.
"""

import json

import pytest
from test_command import command
from test_ranks import FSDP, launch

LOSS = "ce:1,uld:1,hybrid:0.5,likelihood:1"
TELLING = ("--probe_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "no")
TOLD = ("ce", "uld", "hybrid", "likelihood", "uld_width", "hybrid_width", "compared_student", "eval_bits_per_byte")
PROBED = ("uld_cosine", "hybrid_norm_ratio", "likelihood_cosine", "gain_ce", "gain_mixture", "held_out_norm")


def told(cache_path, student_path, out, processes, *more):
    size = ("--per_device_train_batch_size", str(4 // processes), "--max_steps", "4", "--loss", LOSS)
    arguments = command(cache_path, student_path, out, *size, "--loss_normalization", "samples", *TELLING, *more)
    launch(processes, arguments)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {name: [line[name] for line in history if name in line] for name in TOLD + PROBED}


@pytest.fixture(scope="module")
def one_process(cache_path, student_path, tmp_path_factory):
    found = told(cache_path, student_path, tmp_path_factory.mktemp("figures") / "one", 1)
    assert {name: len(values) for name, values in found.items()} == {
        **{name: 4 for name in TOLD[:-1]},
        **{name: 2 for name in (TOLD[-1], *PROBED)},
    }
    return found


@pytest.mark.parametrize("more", [(), FSDP], ids=["ddp2", "fsdp2-2"])
def test_two_ranks_tell_what_one_process_tells(cache_path, student_path, one_process, tmp_path, more):
    found = told(cache_path, student_path, tmp_path / "two", 2, *more)
    for name in TOLD:
        assert found[name] == pytest.approx(one_process[name], rel=1e-4), name
    for name in PROBED:
        assert found[name] == pytest.approx(one_process[name], rel=2e-3, abs=1e-4), name
