"""Two students with different tokenizers learn from one cache at the same time."""

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import tokenizer_assets
from cache_making import tiny_student
from forked import distill
from transformers import PreTrainedTokenizerFast


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


@pytest.fixture(scope="module")
def students(smollm2_tokenizer, tmp_path_factory):
    """Tiny models with the real tokenizers of SmolLM2 and of Pythia."""
    folder = tmp_path_factory.mktemp("two_students")
    pythia = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_assets.load("pythia"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    return {
        "smollm2": tiny_student(folder / "smollm2", smollm2_tokenizer),
        "pythia": tiny_student(folder / "pythia", pythia),
    }


def test_two_students_at_once(cache_path, students, tmp_path):
    before = digest(cache_path)
    flags = "--max_steps=6 --max_length=48 --per_device_train_batch_size=4 --learning_rate=1e-2 --logging_steps=1"
    more = "--use_cpu --save_strategy=no --loss=ce:1,uld:1.5,mapped:1,likelihood:1 --max_grad_norm=1"
    with ExitStack() as running:
        processes = {
            name: running.enter_context(
                distill(
                    [
                        *("train", "--cache", str(cache_path), "--model_name_or_path", str(student)),
                        *("--output_dir", str(tmp_path / name), *flags.split(), *more.split()),
                    ],
                    tmp_path / f"{name}.txt",
                )
            )
            for name, student in students.items()
        }
        for name, process in processes.items():
            process.join()
            assert process.exitcode == 0, (tmp_path / f"{name}.txt").read_text()
    compared = []
    for name, student in students.items():
        record = json.loads((tmp_path / name / "distill.json").read_bytes())
        state = json.loads((tmp_path / name / "trainer_state.json").read_bytes())
        lines = [line for line in state["log_history"] if "loss" in line]
        assert record["finished"]
        assert record["run"]["student"] == str(student)
        assert len(lines) == 6
        assert lines[-1]["ce"] < lines[0]["ce"]
        assert all(line[loss] > 0 for line in lines for loss in ("uld", "mapped", "likelihood"))
        compared.append((record["run"]["cache_id"], record["comparison"]["pairs"]))
    # One cache, two tokenisations of it.
    assert compared[0][0] == compared[1][0]
    assert compared[0][1] != compared[1][1]
    assert digest(cache_path) == before
