"""Five real kills in a row, at random steps, within and across epochs: the batches and weights of a run left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

from distill.checkpoint import last_whole_checkpoint

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MICRO_BATCHES, STEPS = 2, 30


def start(*arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE, HERE.parent)))}
    words = [sys.executable, str(HERE / "killed_run.py"), *map(str, arguments)]
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)


def lines(log):
    return log.read_text().splitlines() if log.exists() else []


def test_five_resumes_after_sigkill(cache_path, student_path, tmp_path):
    expected_log, log, out = tmp_path / "expected", tmp_path / "log", tmp_path / "out"
    with start(cache_path, student_path, tmp_path / "whole", expected_log) as process:
        _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    expected = lines(expected_log)
    assert len(expected) == MICRO_BATCHES * STEPS
    whole = [expected[n : n + MICRO_BATCHES] for n in range(0, len(expected), MICRO_BATCHES)]
    moments = random.Random(7)
    for _ in range(5):
        before = len(lines(log))
        with start(cache_path, student_path, out, log) as process:
            wanted, until = before + 2 * moments.randint(2, 6), time.monotonic() + 300
            while len(lines(log)) < wanted and process.poll() is None and time.monotonic() < until:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert last_whole_checkpoint(out) is not None
    with start(cache_path, student_path, out, log) as process:
        _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    # Every batch that was ever fed at a step is the one that the run left alone fed there.
    fed = {line for step in whole for line in step}
    assert set(lines(log)) == fed
    assert len(lines(log)) > len(expected)
    found, wanted = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert value.equal(found[name]), name
