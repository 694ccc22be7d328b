"""`distill` as a process: help without torch, one-line errors, interruption at any time, the same command resumes."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from forked import Held, distill
from safetensors.torch import load_file, save_file
from training import bits_per_byte_in

from distill.checkpoint import RECORD, begin, check_checkpoint, last_whole_checkpoint, saving, write_record
from distill.main import main
from distill.students import load_model, load_tokenizer
from distill.train import _StopOnInterrupt, make_config
from storage_specs import open_cache
from storage_specs.command_line import run
from storage_specs.errors import (
    CacheMismatchError,
    CheckpointError,
    ConfigError,
    NotACacheError,
    OutputFolderError,
    StorageFullError,
    TokenizerError,
)

ROOT = Path(__file__).parents[2]


def command(cache_path, student_path, output_dir, *more: str) -> list[str]:
    return [
        *("train", "--model_name_or_path", str(student_path), "--cache", str(cache_path)),
        *("--output-dir", str(output_dir), "--max-length", "48", "--per_device_train_batch_size", "2"),
        *(
            "--max_steps",
            "30",
            "--save_steps",
            "3",
            "--learning_rate",
            "1e-2",
            "--seed",
            "7",
            "--use_cpu",
            "--logging_steps",
            "1",
            *more,
        ),
    ]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["evaluate", "--help"], ["bench", "--help"]], ids=str
)
def test_help_imports_nothing_heavy(arguments):
    code = f"import sys; from distill.main import main\ntry: main({arguments!r})\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'numpy', 'pyarrow', 'zarr'} & set(sys.modules), sys.modules"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "distill" in done.stdout


def test_train_evaluate_and_train_again(cache_path, student_path, tmp_path, capsys):
    out = tmp_path / "student"
    flags = command(cache_path, student_path, out, "--max_steps=3", "--loss", "ce:1,uld:1.5,mapped:0.5")
    assert main(flags) == 0
    text = capsys.readouterr().err
    assert "of the teacher's rows" in text
    assert "find a student word" in text
    record = json.loads((out / RECORD).read_bytes())
    assert record["finished"]
    assert record["steps"] == 3
    assert record["run"]["cache_id"] == open_cache(cache_path).manifest.cache_id
    assert (out / "tokenizer.json").exists()
    before = (out / "model.safetensors").read_bytes()
    assert main(flags) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before
    models = ["--model", f"before={student_path}", "--model", f"after={out}", "--max_length", "64"]
    assert main(["evaluate", "--cache", str(cache_path), *models, "--output_file", str(tmp_path / "e.json")]) == 0
    figures = bits_per_byte_in(tmp_path / "e.json")
    assert figures["after"] < figures["before"]
    assert "bits/byte" in capsys.readouterr().out


def test_errors_come_before_the_model_is_loaded(cache_path, student_path, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.train.load_model", lambda *_: pytest.fail("the model was loaded"))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")

    def flags(*more: str, cache=cache_path, out=tmp_path / "out") -> list[str]:
        return command(cache, student_path, out, *more)

    for error, words, arguments in [
        (CacheMismatchError, "teacher_name", flags("--teacher-name", "another")),
        (CacheMismatchError, "cache_id", flags("--cache_id", "0" * 64)),
        (CacheMismatchError, "teacher_tokenizer_digest", flags("--teacher_tokenizer_digest", "0")),
        (CacheMismatchError, "corpus_digest", flags("--corpus_digest", "0")),
        (NotACacheError, "nowhere", flags(cache=tmp_path / "nowhere")),
        (OutputFolderError, "thesis.tex", flags(out=foreign)),
        (ConfigError, "learning_rate", flags("--lerning_rate", "1")),
        (ConfigError, "bananas", flags("--max_steps", "bananas")),
        (ConfigError, "dtype", flags("--dtype", "int3")),
        (ConfigError, "JSON object", flags("--chat_template_kwargs", "[1]")),
        (ConfigError, "nowhere", [*flags(), "--model_name_or_path", "./nowhere"]),
        (OutputFolderError, "cannot be read", flags(out=foreign / "thesis.tex" / "out")),
        (ConfigError, "chat_template", flags("--chat-template", str(tmp_path / "none.jinja"))),
        (ConfigError, "unknown command", ["trian"]),
        (ConfigError, "NAME=MODEL", ["evaluate", "--cache", str(cache_path), "--model", "x"]),
    ]:
        with pytest.raises(error, match=words):
            main(arguments)
    assert (foreign / "thesis.tex").read_text() == "precious"
    assert not (tmp_path / "out").exists()


def test_a_slow_tokenizer_is_refused(cache_path, student_path, tmp_path, monkeypatch):
    from transformers import ByT5Tokenizer

    monkeypatch.setattr("distill.train.load_tokenizer", lambda name: ByT5Tokenizer())
    with pytest.raises(TokenizerError, match="fast"):
        main(command(cache_path, student_path, tmp_path / "out"))


def test_another_run_in_the_same_folder_is_refused(cache_path, student_path, tmp_path, capsys):
    assert main(command(cache_path, student_path, tmp_path, "--max_steps", "1")) == 0
    with pytest.raises(CheckpointError, match="loss 'ce:1,mapped:1', now 'ce:1'"):
        main(command(cache_path, student_path, tmp_path, "--max_steps", "1", "--loss", "ce:1"))


@pytest.mark.parametrize(
    "more", [["--max_grad_norm", "0.01"], ["--adam_beta2", "0.5"], ["--bf16"], ["--dtype", "bfloat16"]], ids=str
)
def test_every_argument_that_changes_the_weights_makes_another_run(cache_path, student_path, tmp_path, more):
    write_record(tmp_path, {"run": identity_of(command(cache_path, student_path, tmp_path)), "finished": True})
    elsewhere = ["--logging_steps", "5", "--save_steps", "9", "--per_device_train_batch_size", "1"]
    assert main(command(cache_path, student_path, tmp_path, *elsewhere, "--gradient_accumulation_steps", "2")) == 0
    with pytest.raises(CheckpointError, match=more[0][2:]):
        main(command(cache_path, student_path, tmp_path, *more))


def identity_of(arguments: list[str]) -> dict:
    """What `distill train` would record for these flags."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.train.begin", lambda folder, run, replaced: seen.append(run))
        main(arguments)
    return seen[0]


def test_other_weights_under_the_same_path_make_another_run(cache_path, student_path, tmp_path):
    student = shutil.copytree(student_path, tmp_path / "student")
    flags = command(cache_path, student, tmp_path / "out")
    write_record(tmp_path / "out", {"run": identity_of(flags), "finished": True})
    assert main(flags) == 0
    weights = load_file(student / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, student / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="student_digest"):
        main(flags)


def test_weights_that_are_missing_misshapen_or_cut_off_are_refused(student_path, tmp_path):
    file = shutil.copytree(student_path, tmp_path / "student") / "model.safetensors"
    whole = load_file(file)
    assert "lm_head.weight" not in whole  # tied, and no reason to refuse
    load_model(str(file.parent), "float32")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in whole.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=name):
        load_model(str(file.parent), "float32")
    save_file(whole | {name: whole[name][:-1].clone()}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"cannot be loaded|wrong shape"):
        load_model(str(file.parent), "float32")
    save_file(whole, file, {"format": "pt"})
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(str(file.parent), "float32")


@contextmanager
def file_size_limit(size: int):
    """No file grows beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_failed_writes_of_every_library_are_a_full_disk(tmp_path):
    values = {"a": torch.zeros(100_000)}
    for write in (
        lambda: torch.save(values, tmp_path / "a.pt"),
        lambda: save_file(values, tmp_path / "a.safetensors"),
        lambda: (tmp_path / "a").write_bytes(bytes(400_000)),
    ):
        with file_size_limit(20_480), pytest.raises(StorageFullError), saving(tmp_path):
            write()
    with pytest.raises(RuntimeError, match="shapes"), saving(tmp_path):
        raise RuntimeError("shapes differ")
    with pytest.raises(OutputFolderError, match="cannot be written"):
        write_record(tmp_path / "a" / "b", {})


def test_resume_from_checkpoint_true_is_the_last_whole_one(cache_path, student_path, tmp_path, capsys):
    flags = command(cache_path, student_path, tmp_path, "--max_steps", "2", "--save_steps", "1")
    assert main(flags) == 0
    record = json.loads((tmp_path / RECORD).read_bytes())
    write_record(tmp_path, record | {"finished": False})
    assert main([*flags, "--resume_from_checkpoint", "True"]) == 0
    assert "resuming from the last whole checkpoint" in capsys.readouterr().err


def test_a_students_chat_template_is_saved_and_used(chat_cache_path, student_path, tmp_path):
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    flags = ["--max_steps", "1", "--chat_template", str(template)]
    assert main(command(chat_cache_path, student_path, tmp_path / "out", *flags)) == 0
    assert load_tokenizer(str(tmp_path / "out")).chat_template == template.read_text()


@pytest.mark.parametrize(
    "more",
    [
        ["--batch_size", "0"],
        ["--max_documents", "0"],
        ["--max_length", "-1"],
        ["--output_file", "."],
        ["--output_file", "FILE/deep/evaluation.json"],
        ["--chat_template", "nowhere.jinja"],
        ["--chat_template_kwargs", "{"],
        ["--chat_template_kwargs", "[]"],
        ["--lm_eval_num_fewshot", "-1"],
    ],
    ids=str,
)
def test_what_evaluate_refuses_before_it_scores(cache_path, student_path, tmp_path, monkeypatch, more):
    monkeypatch.setattr("distill.evaluation.evaluate.evaluate", lambda *_, **__: pytest.fail("it scored"))
    (tmp_path / "file").touch()
    more = [word.replace("FILE", str(tmp_path / "file")) for word in more]
    with pytest.raises(ConfigError, match=more[0][2:]):
        main(["evaluate", "--cache", str(cache_path), "--model", f"x={student_path}", *more])


def test_errors_are_one_line_and_exit_code_2(cache_path, student_path, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        run(main, command(cache_path, student_path, tmp_path, "--align", "observed"))
    assert left.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        ("--per_device_train_batch_size", "0"),
        ("--gradient_accumulation_steps", "-1"),
        ("--max_steps", "0"),
        ("--seed", "-1"),
        ("--label_smoothing_factor", "0.1"),
    ],
)
def test_values_out_of_range_are_refused(cache_path, student_path, tmp_path, flags):
    with pytest.raises(ConfigError, match=flags[0].removeprefix("--")):
        main(command(cache_path, student_path, tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()


def test_a_student_with_missing_or_truncated_weights_is_refused(cache_path, student_path, tmp_path):
    """transformers would fill what is missing with random values."""
    broken = shutil.copytree(student_path, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if "mlp" not in name}, broken / "model.safetensors")
    with pytest.raises(ConfigError, match="weights are missing"):
        main(command(cache_path, broken, tmp_path / "run"))
    whole = (student_path / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        main(["evaluate", "--cache", str(cache_path), "--model", f"broken={broken}"])


def test_evaluate_refuses_before_scoring(cache_path, student_path, tmp_path):
    words = ["evaluate", "--cache", str(cache_path), "--model", f"one={student_path}"]
    for flags in (("--batch_size", "0"), ("--max_documents", "-1"), ("--output_file", str(tmp_path))):
        with pytest.raises(ConfigError, match=flags[0].removeprefix("--")):
            main([*words, *flags])


def test_a_full_disk_is_one_line_and_the_same_command_resumes(cache_path, student_path, tmp_path):
    """A real failure to write: the kernel refuses files over 200 kB, which the weights are."""
    words = [sys.executable, "-m", "distill", *command(cache_path, student_path, tmp_path / "run", "--max_steps", "3")]
    limited = "import resource, os; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000,) * 2); "
    limited += f"os.execv({words[0]!r}, {words!r})"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    failed = subprocess.run(
        [sys.executable, "-c", limited], capture_output=True, text=True, env=environment, check=False
    )
    assert failed.returncode == 2, failed.stderr
    assert "could not be written" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert main(words[3:]) == 0


def test_a_killed_writers_leftover_does_not_lock_the_folder(tmp_path):
    (tmp_path / f".{RECORD}").touch()
    assert begin(tmp_path, {"cache_id": "any"})


def test_a_repaired_cache_is_accepted_when_told_so(tmp_path):
    before, now = {"cache_id": "a", "seed": 1}, {"cache_id": "c", "seed": 1}
    for folder in (tmp_path, tmp_path / "checkpoint-3"):
        write_record(folder, {"run": before, "finished": False})
    (tmp_path / "checkpoint-3" / "optimizer.pt").touch()
    with pytest.raises(CheckpointError, match="--accept_repaired"):
        begin(tmp_path, now)
    with pytest.raises(CheckpointError, match="cache_id"):
        check_checkpoint(tmp_path / "checkpoint-3", now, replaced=["b"])
    assert begin(tmp_path, now, replaced=["a", "b"])
    check_checkpoint(tmp_path / "checkpoint-3", now, replaced=["a", "b"])
    with pytest.raises(CheckpointError, match="seed"):
        begin(tmp_path, now | {"seed": 2}, replaced=["a"])


def test_values_are_typed_as_training_arguments_are(tmp_path):
    config = make_config(
        {
            "output_dir": str(tmp_path),
            "bf16": "false",
            "learning_rate": "3e-4",
            "report_to": ["none"],
            "chat_template_kwargs": {"enable_thinking": "false"},
            "gradient_checkpointing": True,
            "use_cpu": True,
            "warmup_steps": 7,
            "run_name": None,
        }
    )
    assert (config.bf16, config.learning_rate, config.warmup_steps) == (False, 3e-4, 7)
    assert config.gradient_checkpointing
    assert config.report_to == []
    assert config.chat_template_kwargs == {"enable_thinking": False}
    assert not config.remove_unused_columns


def test_sigkill_and_ctrl_c_lose_nothing(cache_path, student_path, tmp_path):
    """Killed after its first checkpoint, then interrupted, then left alone: the weights of a run that was not."""
    straight, stopped, said = tmp_path / "straight", tmp_path / "stopped", tmp_path / "said"
    flags = command(cache_path, student_path, stopped)
    assert main(command(cache_path, student_path, straight)) == 0

    held = Held("distill.trainer:CachedDistillationTrainer._save_checkpoint", 1)
    with distill(flags, said, held) as process:
        held.wait_until_reached(process)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    whole = last_whole_checkpoint(stopped)
    assert whole.name == "checkpoint-3"
    assert not json.loads((stopped / RECORD).read_bytes())["finished"]
    # A checkpoint that the kill left half-written: newer than all, and without its record.
    (stopped / "checkpoint-29").mkdir()
    (stopped / "checkpoint-29" / "model.safetensors").write_bytes(b"half")

    held = Held("distill.progress:TokenProgress.on_log", 1)
    with distill(flags, said, held) as process:
        held.wait_until_reached(process)
        os.kill(process.pid, signal.SIGINT)
        held.release()
        process.join()
        assert process.exitcode == 130, said.read_text()
    assert f"resuming from {whole}\n" in said.read_text()
    assert "step 4/30 " in said.read_text()
    assert "interrupted: saving a checkpoint" in said.read_text()
    assert last_whole_checkpoint(stopped).name == "checkpoint-5"

    assert main(flags) == 0
    expected, found = (load_file(folder / "model.safetensors") for folder in (straight, stopped))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value.equal(found[name]), name


def test_ctrl_c_in_the_middle_of_a_line_ends_nothing(monkeypatch, capfd):
    """A buffered stream that is being written to must not be written to by the handler."""

    class Interrupted(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: memoryview) -> int:
            signal.raise_signal(signal.SIGINT)
            return len(data)

    stop = _StopOnInterrupt()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(Interrupted()), line_buffering=True))
    with stop.listening():
        print("step 1", file=sys.stderr)
    monkeypatch.undo()
    assert stop.interrupted
    assert "Ctrl-C again to stop at once" in capfd.readouterr().err
