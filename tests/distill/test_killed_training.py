"""Five real kills in a row, at random steps, within and across epochs: the batches and weights of a run left alone."""

import random
import time

from forked import forked
from killed_run import MICRO_BATCHES, STEPS, train_and_log
from safetensors.torch import load_file

from distill.checkpoint import last_whole_checkpoint


def lines(log):
    return log.read_text().splitlines() if log.exists() else []


def left_alone(*arguments):
    with forked(train_and_log, *arguments) as process:
        process.join()
        assert process.exitcode == 0


def test_five_resumes_after_sigkill(cache_path, student_path, tmp_path):
    expected_log, log, out = tmp_path / "expected", tmp_path / "log", tmp_path / "out"
    left_alone(cache_path, student_path, tmp_path / "whole", expected_log)
    expected = lines(expected_log)
    assert len(expected) == MICRO_BATCHES * STEPS
    moments = random.Random(7)
    for kill in range(5):
        steps = moments.randint(2, 6)
        # Killed somewhere in the two steps behind, a checkpoint among them; the first time in the midst of a step.
        hold = MICRO_BATCHES * (steps + (2 if kill else 0))
        wanted = len(lines(log)) + MICRO_BATCHES * steps
        with forked(train_and_log, cache_path, student_path, out, log, hold) as process:
            while len(lines(log)) < wanted:
                assert process.is_alive()
                time.sleep(0.005)
            process.kill()
            process.join()
            assert process.exitcode == -9
    assert last_whole_checkpoint(out) is not None
    left_alone(cache_path, student_path, out, log)
    # Every batch that was ever fed at a step is the one that the run left alone fed there.
    assert set(lines(log)) == set(expected)
    assert len(lines(log)) > len(expected)
    found, wanted = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert value.equal(found[name]), name
