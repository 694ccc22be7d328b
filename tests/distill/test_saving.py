"""What a run leaves behind: generation config, chat template, uploads; and what trackers are told."""

import json
from pathlib import Path
from types import SimpleNamespace

import transformers
from test_command import command
from training import load_tokenizer, trainer
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback

from distill.main import main

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


class Tracker(TrainerCallback):
    """Stands for any tracker: keeps what it is told."""

    def __init__(self):
        self.told = []

    def on_log(self, args, state, control, logs=None, **_):
        self.told.append(dict(logs))


def test_a_tracker_is_told_every_figure(cache_path, student_path, tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "any", Tracker)
    one = trainer(cache_path, student_path, tmp_path, report_to=["any"], loss="ce:1,uld:1.5,mapped:1")
    one.train()
    (tracker,) = [callback for callback in one.callback_handler.callbacks if isinstance(callback, Tracker)]
    first = tracker.told[0]
    assert {"loss", "ce", "uld", "mapped", "uld_width", "compared_student", "data_wait", "learning_rate"} <= set(first)


def test_generation_config_and_chat_template_come_along(cache_path, student_path, tmp_path):
    student, template = tmp_path / "student", tmp_path / "plain.jinja"
    model = AutoModelForCausalLM.from_pretrained(student_path)
    model.generation_config = GenerationConfig(max_new_tokens=7, temperature=0.5, do_sample=True)
    model.save_pretrained(student)
    load_tokenizer(student_path).save_pretrained(student)
    template.write_text(TEMPLATE)
    flags = command(cache_path, student, tmp_path / "out", "--max_steps", "1", "--save_steps", "1")
    assert main([*flags, "--chat_template", str(template)]) == 0
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        said = json.loads((folder / "generation_config.json").read_text())
        assert (said["max_new_tokens"], said["temperature"]) == (7, 0.5)
        assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE


def test_push_to_hub_uploads_the_student_and_no_checkpoint(cache_path, student_path, tmp_path, monkeypatch):
    made, uploads = [], []

    def create_repo(self, repo_id, **options):
        made.append(repo_id)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, **options):
        names = sorted(path.name for path in Path(options["folder_path"]).iterdir())
        uploads.append((options["repo_id"], options["folder_path"], names, options["ignore_patterns"]))
        return SimpleNamespace(is_done=lambda: True, done=lambda: True, result=lambda: None)

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    more = ("--push_to_hub", "--hub_model_id", "someone/student", "--hub_strategy", "end", "--max_steps", "1")
    assert main(command(cache_path, student_path, tmp_path / "out", *more)) == 0
    assert set(made) == {"someone/student"}
    ((repo_id, folder, names, ignored),) = uploads
    assert (repo_id, folder) == ("someone/student", str(tmp_path / "out"))
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= set(names)
    assert "checkpoint-*" in ignored
