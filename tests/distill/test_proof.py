"""scripts/proof.py: its grid, cells that are killed or there already, the shuffled control, and the README's tables."""

import hashlib
import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import proof
import proof_table
import proof_tasks
import pytest
import torch
from cache_making import tiny_student, write_cache
from proof_cell import Laboratory, measure, train_once
from proof_documents import View, shuffled_rows
from proof_grid import ARMS, BLOCKS, KEY, RATES, VARIED, Block, Cell, best_rate, cells_of, rates_to_try
from proof_rows import append_row
from proof_stages import Stages
from proof_teacher import NO_LABEL, example_of, fine_tune, padded
from result_table import read_rows
from transformers import AutoModelForCausalLM

from storage_specs import completion_document, open_cache, text_document
from storage_specs.errors import ConfigError, NonFiniteLossError

SCRIPTS = Path(proof.__file__).parent
CORE = next(block for block in BLOCKS if block.core)
ONE_CELL = ["--scale", "tiny", "--tasks", "wikipedia", "--students", "smollm2", "--seeds", "0", "--rates", "1e-4"]


def wikipedia_cell(arm: str, **other: object) -> Cell:
    return Cell(
        **{"scale": "tiny", "task": "wikipedia", "student": "smollm2", "learning_rate": 1e-3, "seed": 0} | other,
        arm=arm,
    )


def digest(model: torch.nn.Module) -> str:
    weights = b"".join(value.float().numpy().tobytes() for _, value in sorted(model.state_dict().items()))
    return hashlib.sha256(weights).hexdigest()


@pytest.fixture(scope="module")
def work(wiki_texts, gemma_tokenizer, tmp_path_factory) -> Path:
    """A work folder with a cache of random rows in the place of the real one."""
    folder = tmp_path_factory.mktemp("proof")
    documents = [text_document(text[:200]) for text in wiki_texts[:50]]
    settings = Stages(work=folder, scale="tiny").cache_settings("wikipedia", "given")
    path = folder / "tiny" / "caches" / "wikipedia-given"
    write_cache(path, documents, gemma_tokenizer, k=16, k_ids=16)
    path.with_name(f"{path.name}.made.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def laboratory(work, student_path) -> Laboratory:
    return Laboratory(Stages(work=work, scale="tiny", student=str(student_path)))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains(laboratory, arm):
    model, trained = train_once(laboratory, wikipedia_cell(arm))
    assert trained["tokens"] > 100
    assert trained["train_ce"] > 0
    assert digest(model) != digest(laboratory.weights("smollm2"))


def test_a_cell_is_measured_on_documents_that_chose_nothing(laboratory):
    row = measure(laboratory, wikipedia_cell("ce"))
    assert (row["steps"], row["metric"]) == (3, "")
    assert row["bits_per_byte"] not in (0, row["untrained_bits_per_byte"], row["validation_bits_per_byte"])
    validation, test = laboratory.measured_on("wikipedia")
    assert row["test_documents"] == len(test) == len(validation)
    assert not {one.doc_id for one in validation} & {one.doc_id for one in test}


def test_a_task_has_a_taught_teacher_that_also_writes_answers(student_path, smollm2_tokenizer, tmp_path):
    """From the task's file on: fine-tuned teacher, cache, student, test answers; nothing of a passage in two parts."""
    teacher = tiny_student(tmp_path / "teacher", smollm2_tokenizer, seed=1)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    laboratory = Laboratory(Stages(work=tmp_path, scale="tiny", teacher=str(teacher), student=str(student_path)))
    rows = {}
    for answers in ("given", "teacher"):
        rows[answers] = measure(laboratory, wikipedia_cell("mapped", task="disfl_qa", answers=answers))
    given, written = rows["given"], rows["teacher"]
    assert given["metric"] == "f1"
    assert given["other_scores"].startswith("exact_match=")
    assert 0 <= given["score"] <= 100
    assert given["teacher_bits_per_byte"] == written["teacher_bits_per_byte"] != given["untrained_bits_per_byte"]
    assert given["cache_id"] != written["cache_id"]
    assert given["bits_per_byte"] != written["bits_per_byte"]
    manifest = laboratory.cache("disfl_qa", "teacher").manifest
    assert manifest.generation["temperature"] == 0
    base = AutoModelForCausalLM.from_pretrained(teacher).state_dict()
    taught = AutoModelForCausalLM.from_pretrained(laboratory.stages.teacher_path("disfl_qa")).state_dict()
    assert any(not torch.equal(base[name], taught[name].float()) for name in base)
    prompts = [{one.prompt for one in part.examples} for part in proof_tasks.parts("disfl_qa").values()]
    assert not set.intersection(*prompts)


def test_a_stage_made_with_other_settings_is_refused(tmp_path, student_path, monkeypatch):
    stages = Stages(work=tmp_path, scale="tiny", student=str(student_path))
    path = tmp_path / "tiny" / "students" / "smollm2-10"
    killed = tmp_path / "tiny" / "students" / ".smollm2-10"  # by one that was to be made otherwise
    killed.mkdir(parents=True)
    path.with_name("smollm2-10.made.json").write_text('{"layers"')
    monkeypatch.setattr("proof_stages.LAYERS", 1)
    assert AutoModelForCausalLM.from_pretrained(stages.student_path("smollm2-10")).config.num_hidden_layers == 1
    assert stages.student_path("smollm2-10") == path
    monkeypatch.setattr("proof_stages.LAYERS", 2)
    with pytest.raises(ConfigError, match=r"smollm2-10 was made with other settings \(layers\)"):
        stages.student_path("smollm2-10")
    path.with_name("smollm2-10.made.json").unlink()
    with pytest.raises(ConfigError, match=r"other settings \(whole, layers\)"):
        stages.student_path("smollm2-10")


def test_a_teacher_learns_the_answers_of_padded_examples_as_of_each_alone(student_path, smollm2_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(student_path, dtype=torch.float32).eval()
    documents = [completion_document("a prompt " * n, " and what follows" * (1 + n % 3)) for n in (2, 9, 4)]
    examples = [example_of(smollm2_tokenizer, document, 512) for document in documents]
    nats = []
    for example in examples:
        logprobs_TV = model(torch.from_numpy(example["input_ids"])[None]).logits[0].log_softmax(1)
        at = np.flatnonzero(example["labels"] != NO_LABEL)
        nats += (-logprobs_TV[at - 1, example["labels"][at]]).tolist()
    together = model(**padded(examples)).loss.item()
    assert together == pytest.approx(np.mean(nats), rel=1e-5)


def test_a_cell_learns_from_what_it_says_and_from_nothing_else(laboratory):
    """The same cell twice gives the same student; other rows, fewer ids, fewer documents, another order another one."""
    cells = {
        "mapped": wikipedia_cell("mapped"),
        "again": wikipedia_cell("mapped"),
        "shuffled": wikipedia_cell("mapped shuffled"),
        "k_ids": wikipedia_cell("mapped", k_ids=4),
        "fraction": wikipedia_cell("mapped", fraction=0.5),
        "seed": wikipedia_cell("mapped", seed=1),
    }
    students = {name: digest(train_once(laboratory, cell)[0]) for name, cell in cells.items()}
    assert students["again"] == students["mapped"]
    assert len(set(students.values())) == len(cells) - 1


def test_shuffled_rows_are_the_same_rows_at_other_places_of_their_document(work):
    cache = open_cache(work / "tiny" / "caches" / "wikipedia-given")
    own = cache.columns(0)
    moved = shuffled_rows(own, seed=0)
    for name in ("segment", "byte_start", "byte_end", "is_end", "row_offsets"):
        np.testing.assert_array_equal(getattr(moved, name), getattr(own, name))
    ends = own.is_end
    assert ends.any()
    np.testing.assert_array_equal(moved.probs[ends], own.probs[ends])
    for first, last in zip(own.row_offsets[:-1], own.row_offsets[1:], strict=True):
        whole = [
            np.column_stack([one.gold_logprob, one.tail_mass, one.probs, one.token_ids])[first:last]
            for one in (own, moved)
        ]
        assert (whole[0] != whole[1]).any() or last - first < 3
        np.testing.assert_array_equal(*(rows[np.lexsort(rows.T)] for rows in whole))


def test_a_view_shows_fewer_ids_and_documents_of_the_same_cache(work):
    cache = open_cache(work / "tiny" / "caches" / "wikipedia-given")
    half = View(cache, k_ids=3, fraction=0.5)
    assert half.read_columns(0).token_ids.shape[1] == half.manifest.k_ids == 3
    np.testing.assert_array_equal(half.read_columns(0).token_ids, cache.columns(0).token_ids[:, :3])
    np.testing.assert_array_equal(half.rows_D[cache.held_out_D], cache.rows_D[cache.held_out_D])
    trained = ~cache.held_out_D & (cache.rows_D > 0)
    assert 0 < np.count_nonzero(half.rows_D[trained]) < np.count_nonzero(trained)
    with pytest.raises(ValueError, match="holds the ids of 16 ranks"):
        View(cache, k_ids=17)


def test_a_killed_cell_leaves_no_row_and_the_same_command_measures_it(work, laboratory, tmp_path):
    results = tmp_path / "proof.csv"
    flags = [*ONE_CELL, "--arms", "ce", "--work", str(work), "--results", str(results)]
    sleeper = (
        "import sys, time, proof; say = lambda line: print(line, flush=True);"
        "proof.measure_cells(proof.arguments(sys.argv[1:]), lambda cell: time.sleep(600), say)"
    )
    process = subprocess.Popen([sys.executable, "-c", sleeper, *flags], cwd=SCRIPTS, stdout=subprocess.PIPE, text=True)
    assert "wikipedia / smollm2 / ce" in process.stdout.readline()
    options = proof.arguments(flags)
    said: list[str] = []
    proof.measure_cells(options, lambda cell: pytest.fail("another process has it"), said.append)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not results.exists()
    assert said == []
    proof.measure_cells(options, lambda cell: measure(laboratory, cell), said.append)
    (row,) = read_rows(results)
    assert (row["arm"], row["learning_rate"], row["seed"]) == ("ce", "0.0001", "0")
    assert float(row["bits_per_byte"]) > 0
    proof.measure_cells(options, lambda cell: pytest.fail("it is measured"), said.append)
    assert len(read_rows(results)) == 1
    assert proof.listing(options).startswith("measured")


def test_a_cell_that_fails_leaves_no_row_and_the_next_ones_are_measured(work, tmp_path):
    options = proof.arguments(
        [*ONE_CELL, "--arms", "ce", "uld", "--work", str(work), "--results", str(tmp_path / "proof.csv")]
    )
    said: list[str] = []

    def measure_or_fail(cell: Cell) -> dict[str, object]:
        if cell.arm == "ce":
            raise MemoryError("no room")
        return {"bits_per_byte": 1.0, "validation_bits_per_byte": 1.0, "seconds": 1.0, "metric": ""}

    assert not proof.measure_cells(options, measure_or_fail, said.append)
    assert [row["arm"] for row in read_rows(options.results)] == ["uld"]
    assert any("FAILED: MemoryError: no room" in line for line in said)


def test_a_rate_that_diverges_is_measured_and_never_the_best(laboratory):
    def diverge(*_: object) -> None:
        raise NonFiniteLossError("the loss is nan")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("proof_cell.train_once", diverge)
        row = measure(laboratory, wikipedia_cell("ce"))
    finite = wikipedia_cell("ce", learning_rate=1e-4)
    rows = [
        {name: str(value) for name, value in (dict(zip(KEY, cell.key, strict=True)) | figures).items()}
        for cell, figures in ((wikipedia_cell("ce"), row), (finite, {"validation_bits_per_byte": 9.0}))
    ]
    assert row["bits_per_byte"] == float("inf")
    assert best_rate([wikipedia_cell("ce"), finite], rows) == 1e-4


def test_cells_not_measured_are_listed_as_such_and_the_budget_starts_none(tmp_path):
    options = proof.arguments(
        ["--scale", "gpu", "--core", "--results", str(tmp_path / "none.csv"), "--budget_seconds", "0", "--list"]
    )
    proof.measure_cells(options, lambda cell: pytest.fail("no time for it"), print)
    lines = proof.listing(options).splitlines()
    assert len(lines) == 1 + 3 * 5 * (4 + 2)
    assert all(line.startswith("not measured") for line in lines[:-1])
    assert lines[-1].startswith("0 cells measured, 90 not measured")


def test_a_torn_line_is_no_row_and_does_not_harm_the_next(tmp_path):
    results = tmp_path / "proof.csv"
    append_row(results, {"a": 1, "b": 0.25})
    with results.open("a") as file:
        file.write("2")
    append_row(results, {"a": 3, "b": "x, y"})
    assert read_rows(results) == [{"a": "1", "b": "0.25"}, {"a": "3", "b": "x, y"}]


MORE_IDS = next(block for block in BLOCKS if block.k_ids == 64 and block.arms == ("mapped",))  # varies CORE


def made_up_rows(block: Block, bits: dict[str, float]) -> list[dict[str, str]]:
    """Rows of all cells of a block: an arm's bits, worse at the ends of its rates, and a little more for each seed."""
    rows: list[dict[str, str]] = []
    middle = sorted(block.rates_at("gpu"))[2]
    for _ in range(2):
        for cell in cells_of(block, "gpu", rows):
            if cell.learning_rate is None or cell.key in proof.done_keys(rows):
                continue
            value = bits[cell.arm] + 0.001 * cell.seed + (0.5 if cell.learning_rate != middle else 0)
            figures = {"bits_per_byte": value, "validation_bits_per_byte": value, "teacher_bits_per_byte": 0.8}
            figures |= {"untrained_bits_per_byte": 7, "steps": 1, "batch": 1, "train_documents": 1}
            figures |= {"test_documents": 1, "test_bytes": 1000, "metric": "", "machine": "m", "bytes_per_row": 40}
            rows.append({name: str(value) for name, value in (dict(zip(KEY, cell.key, strict=True)) | figures).items()})
    return rows


def test_the_best_rate_of_seed_0_is_the_rate_of_the_others_and_of_what_varies_them():
    block = CORE
    assert [cell.learning_rate for cell in cells_of(block, "gpu", [])][-2:] == [None, None]
    rows = made_up_rows(block, dict.fromkeys(block.arms, 1.0))
    assert len(rows) == 5 * (4 + 2)
    later = [cell for cell in cells_of(block, "gpu", rows) if cell.seed]
    assert {cell.learning_rate for cell in later} == {RATES[block.student][2]}
    varied = MORE_IDS
    assert {cell.learning_rate for cell in cells_of(varied, "gpu", rows)} == {RATES[block.student][2]}
    assert best_rate([wikipedia_cell("ce")], rows) is None


def test_an_arm_that_is_best_at_an_end_is_tried_beyond_it():
    rows = made_up_rows(CORE, dict.fromkeys(CORE.arms, 1.0))
    lowest = str(RATES[CORE.student][0])
    for row in rows:
        if row["arm"] == "uld" and row["learning_rate"] == lowest:
            row["validation_bits_per_byte"] = "0.5"
    cells = [cell for cell in cells_of(CORE, "gpu", rows) if cell.arm == "uld"]
    assert [cell.learning_rate for cell in cells if not cell.seed] == [4e-3, 1e-3, 2e-3, 8e-3, 5e-4]
    assert {cell.learning_rate for cell in cells if cell.seed} == {None}
    (figure,) = proof_table.figures_of(replace(CORE, arms=("uld",)), "gpu", rows)
    assert proof_table.rate_text(figure, CORE) == "0.001 (4 of 5 tried, the end of them)"
    downhill = [
        row | {"learning_rate": f"{2.0**-halvings * 1e-3:g}", "validation_bits_per_byte": str(0.4 - halvings)}
        for row in rows
        if row["arm"] == "uld" and row["learning_rate"] == lowest
        for halvings in range(1, 9)
    ]
    assert rates_to_try(CORE, "gpu", "uld", rows + downhill)[0] == 1e-3 / 8


def test_every_cell_of_the_grid_can_get_its_rate():
    def tuned_as(block: Block, arm: str) -> tuple:
        return (*(getattr(block, name) for name in VARIED if name != "k_ids"), tuple(block.rates_at("gpu")), arm)

    tuned = {tuned_as(block, arm) for block in BLOCKS if block.tuned for arm in block.arms}
    assert {tuned_as(block, arm) for block in BLOCKS for arm in block.arms} == tuned


def test_the_table_says_what_is_gained_what_is_lost_and_what_nobody_knows():
    block = CORE
    bits = {"ce": 1.3, "uld": 1.31, "mapped": 1.25, "mapped+likelihood": 1.2995, "uld shuffled": 1.32}
    table = proof_table.block_table(block, "gpu", made_up_rows(block, bits))
    assert "| mapped (`ce:1,mapped:1`) | 0.004 | 3 | 1.2510 ± 0.0010 | **+0.0500** | +10% |" in table
    assert "| uld shuffled (`ce:1,uld:1.5`) | 0.004 | 3 | 1.3210 ± 0.0010 | **-0.0200** | -4% |" in table
    assert "Better than CE: mapped. Worse than CE: uld, uld shuffled. Neither, or too few seeds to say: mapped" in table


def test_the_table_says_what_hindsight_and_other_steps_would_change():
    bits = dict.fromkeys(CORE.arms, 1.3) | {"mapped": 1.25}
    rows = made_up_rows(CORE, bits)
    table = proof_table.block_table(CORE, "gpu", rows)
    assert "which validation did not choose" not in table
    assert proof_table.whatever_the_steps("gpu", rows) is None
    for row in rows:
        if (row["arm"], row["learning_rate"], row["seed"]) == ("ce", "0.001", "0"):
            row["bits_per_byte"] = "1.28"
    table = proof_table.block_table(CORE, "gpu", rows)
    said = "At 0.001, which validation did not choose, ce had 1.2800 on seed 0 (at the rate that it chose 1.3000)."
    assert said in table
    longer = next(block for block in BLOCKS if block.longer == 4)
    more = [row | {"steps": "4"} for row in made_up_rows(longer, {"ce": 1.9, "mapped": 1.26, "mapped 3": 1.1})]
    said = proof_table.whatever_the_steps("gpu", rows + more)
    assert "ce 1.3010 ± 0.0010 after 1, mapped 3 1.1010 ± 0.0010 after 4: +0.2000, +40% of the gap" in said
    assert proof_table.whatever_the_steps("gpu", [row for row in rows + more if row["arm"] == "ce"]) is None
    assert proof_table.whatever_the_steps("gpu", [row for row in rows + more if row["arm"] != "ce"]) is None
    one_seed = [row for row in rows + more if row["arm"] != "mapped 3" or row["seed"] == "0"]
    assert "mapped 1.2510" in proof_table.whatever_the_steps("gpu", one_seed)


def test_cells_that_vary_the_ids_are_shown_whichever_seeds_they_have():
    varied = MORE_IDS
    rows = made_up_rows(CORE, dict.fromkeys(CORE.arms, 1.3))
    rows += [row | {"k_ids": "64"} for row in rows if row["arm"] == varied.arms[0] and row["seed"] == "2"]
    assert f"| {varied.arms[0]} | 64 | 40.0 | 1 |" in proof_table.k_ids_table("gpu", rows)


def test_the_readme_shows_what_the_rows_say():
    text = proof_table.README.read_text(encoding="utf8")
    assert proof_table.written_into(text, read_rows(proof.RESULTS)) == text


@pytest.mark.parametrize(("named", "expected"), [("", []), ("1,GPU-7", ["1", "GPU-7"]), (None, ["0", "1"])])
def test_workers_share_the_gpus_that_they_may_use(
    named: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert proof.visible_gpus() == expected


def test_a_teacher_that_is_not_finite_is_not_kept(student_path, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [completion_document(f"Question {number}? Answer:", " yes") for number in range(4)]
    settings = {"batch": 4, "max_length": 64, "epochs": 1}
    fine_tune(student_path, documents, tmp_path, rate=1e-4, **settings)
    tuned, base = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path, student_path))
    assert digest(tuned) != digest(base)
    with pytest.raises(NonFiniteLossError, match="are not finite"):
        fine_tune(student_path, documents, tmp_path / "no", rate=math.inf, **settings)
    assert not (tmp_path / "no").exists()
