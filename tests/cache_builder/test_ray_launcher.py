"""`--launcher ray` on a real local cluster: two actors on the CPU, one of them killed in mid-build."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from building import digests, records, slow_disk, start_build, wait_until
from tiny_teacher import write_corpus

from cache_builder.main import main
from cache_builder.ray_launcher import ray_actors
from storage_specs.errors import ConfigError, EngineError

SHARDS = 16


def test_an_actor_that_is_killed_loses_only_what_it_had_open(
    tmp_path: Path, teacher: Path, wiki_texts: list[str]
) -> None:
    write_corpus(tmp_path / "corpus.jsonl", [text[:400] for text in wiki_texts[: 2 * SHARDS]])
    values = {"teacher": teacher, "corpus": tmp_path / "corpus.jsonl", "engine": "transformers"}
    flags = [f"--{name}={value}" for name, value in {**values, "documents_per_shard": 2, "max_model_len": 64}.items()]
    assert main(["build", *flags, "--output", str(tmp_path / "alone")]) == 0
    output = tmp_path / "cache"
    slow = slow_disk(tmp_path / "slow", 0.01, output, most=4)
    process = start_build([*flags, "--launcher=ray", "--data-parallel-size=2"], output, slow.environment)

    def actors() -> list[int]:
        return [actor for actor in actors_now() if below(actor, process.pid)]

    wait_until(lambda: len(records(output)) >= 2 and len(actors()) == 2, process)
    os.kill(actors()[0], signal.SIGKILL)
    slow.open()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err.count("is lost, others go on: Ray lost an actor") == 1
    assert digests(output) == digests(tmp_path / "alone")


def actors_now() -> list[int]:
    """Processes that run our actor, which Ray names after its class."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if (entry / "cmdline").read_bytes().startswith(b"ray::_Actor"):
                    found.append(int(entry.name))
            except OSError:  # it has ended meanwhile
                continue
    return sorted(found)


def below(process: int, ancestor: int) -> bool:
    """Whether a process descends from another (Linux)."""
    while process > 1:
        if process == ancestor:
            return True
        try:
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"pip install '\.\[ray\]'"), ray_actors(None, 1, 0):
        pass


def cluster_of(*nodes: dict[str, float], broken: str = "") -> Any:
    """What `ray` says of a cluster with these resources, or of none."""

    def init(**options: Any) -> None:
        if broken:
            raise ConnectionError(broken)

    alive = [{"Alive": True, "Resources": node} for node in nodes]
    dead = [{"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}]
    return SimpleNamespace(
        is_initialized=lambda: False, init=init, shutdown=lambda: None, nodes=lambda: dead + alive, put=lambda value: 0,
        remote=lambda **resources: lambda actor: SimpleNamespace(remote=lambda shared, number: resources),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "gpus", "room", "resources"),
    [
        ([{"CPU": 2.0}, {"CPU": 1.0}], 1, 3, {"num_cpus": 1}),
        ([{"CPU": 64.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 3.0}], 2, 5, {"num_gpus": 2}),
    ],
)
def test_actors_that_would_wait_for_ever_are_refused(
    nodes: list[dict[str, float]], gpus: int, room: int, resources: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", cluster_of(*nodes))
    with ray_actors(None, room, gpus) as pool:
        assert pool.actors == [resources] * room
    with pytest.raises(ConfigError, match=f"have room for {room} actors"), ray_actors(None, room + 1, gpus):
        pass


def test_no_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", cluster_of(broken="nobody\nthere"))
    with pytest.raises(EngineError, match=r"ConnectionError: nobody there.*RAY_ADDRESS"), ray_actors(None, 1, 1):
        pass


def test_ray_is_imported_only_where_it_is_asked_for() -> None:
    code = "import sys, cache_builder.builder; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
