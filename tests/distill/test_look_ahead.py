"""Look-aheads: their figures by a loop written by hand, runs that do not notice them, a warning that tells harm."""

import copy
from types import SimpleNamespace

import bench_look_ahead
import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from reference_losses import cached_uld
from result_table import read_rows
from torch.nn.functional import cross_entropy
from training import config, load_tokenizer, trainer, weights
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from distill import CachedDistillationTrainer, CachedDocuments
from distill.look_ahead import _compared, check_look_ahead, look_ahead_warning
from distill.loss_mixture import LossMixture
from distill.run_state import RunState, draws_kept
from distill.scoring import SharedSums, score, shared_sums, teacher_scores
from distill.students import with_adapters
from storage_specs.errors import ConfigError, NonFiniteLossError

CE, MIXTURE = "eval_ahead_ce_bits_per_byte", "eval_ahead_mixture_bits_per_byte"
DIFFERENCE, ERROR = "eval_ahead_difference", "eval_ahead_difference_error"
COUNTING = {"max_length": 96, "per_device_train_batch_size": 8, "eval_strategy": "steps", "eval_steps": 1}


def evaluations(one):
    return [line for line in one.state.log_history if "eval_bits_per_byte" in line]


def look_aheads(one):
    return [line for line in evaluations(one) if CE in line]


# ---- the figures, by hand


def gradients(model, batches, mixture):
    """Of one step: CE by its labels, ULD by its compared rows, counted over all micro-batches."""
    labels, pairs = (sum(len(batch[name]) for batch in batches) for name in ("label_index_R", "student_index_N"))
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
        loss = cross_entropy(logits[batch["label_index_R"]], batch["label_ids_R"], reduction="sum") / labels
        if mixture:
            compared = logits[batch["student_index_N"]]
            loss = loss + 1.5 * cached_uld(compared, batch["teacher_probs_NK"], batch["teacher_tail_N"]).sum() / pairs
        loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()


def step(model, optimizer, batches, *, mixture, length=None):
    """Returns the length of the gradient, which is brought to `length` first and then clipped at 1."""
    own = gradients(model, batches, mixture)
    length = own if length is None else length
    for parameter in model.parameters():
        parameter.grad *= length / own * min(1, 1 / (length + 1e-6))
    optimizer.step()
    optimizer.zero_grad()
    return length


def scored(model, one):
    held_out = [one.eval_dataset[n] for n in range(len(one.eval_dataset))]
    students = score(model.eval(), one.processing_class, held_out, max_length=96)
    return shared_sums({"student": students, "teacher": [teacher_scores(document) for document in held_out]})


def test_figures_are_those_of_a_loop_by_hand(counting, tmp_path):
    """The look-ahead after the first of four steps, at a rate that falls by a quarter with each; two micro-batches."""
    more = COUNTING | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    one = trainer(counting["odds"], counting["student"], tmp_path, look_ahead_steps=2, max_steps=4, **more)
    model = copy.deepcopy(one.model).double()
    one.train()

    steps = [one.data_collator([one.train_dataset[n] for n in numbers]) for numbers in one.batches.of_steps(0, 4)]
    first, *ahead = [steps[n : n + 2] for n in (0, 2, 4)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    step(model, optimizer, first, mixture=True)
    sums, lengths = {}, [None, None]
    for arm in ("mixture", "ce"):
        student, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
        own = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0)
        own.load_state_dict(state)
        for number, batches in enumerate(ahead):
            own.param_groups[0]["lr"] = 1e-2 * (3 - number) / 4
            lengths[number] = step(student, own, batches, mixture=arm == "mixture", length=lengths[number])
        sums[arm] = scored(student, one)
    size = sum(one.bytes for one in sums["ce"])
    expected = {arm: sum(one.nats["student"] for one in each) / size / np.log(2) for arm, each in sums.items()}
    line = look_aheads(one)[0]
    assert line["step"] == 1
    assert line[CE] == pytest.approx(expected["ce"], rel=1e-5)
    assert line[MIXTURE] == pytest.approx(expected["mixture"], rel=1e-5)
    assert abs(line[DIFFERENCE]) > 1e-3, "nothing that arms could be told apart by"
    assert line[DIFFERENCE] == pytest.approx(expected["mixture"] - expected["ce"], rel=1e-3)
    assert [line["step"] for line in look_aheads(one)] == [1, 2], "fewer than two steps are left after the third"


def test_an_arm_differs_by_its_direction_alone(counting, tmp_path):
    """KL to a teacher that is sure of the text is CE once more: a gradient of twice the length, the same direction."""
    more = COUNTING | {"loss": "ce:1,kl:1", "max_grad_norm": 0, "learning_rate": 2e-3}
    one = trainer(counting["text"], counting["student"], tmp_path, look_ahead_steps=3, max_steps=4, **more)
    one.train()
    (line,) = look_aheads(one)
    assert abs(line["eval_bits_per_byte"] - line[CE]) > 1e-3
    assert line[DIFFERENCE] == pytest.approx(0, abs=1e-7)


def test_differences_errors_are_those_of_a_ratio():
    random = np.random.default_rng(0)
    size, ce = random.integers(10, 300, 12), random.uniform(5, 200, 12)
    mixture = ce + 0.01 * size + random.normal(0, 1, 12)
    size[3] = 0  # a document that student and teacher share nothing of

    def sums(nats):
        pairs = zip(nats.tolist(), size.tolist(), strict=True)
        return [SharedSums(nats={"student": n}, bytes=b, documents=int(b > 0)) for n, b in pairs]

    def of_two_ranks(local):
        """The other rank holds the last 7 documents."""
        held.append(local)
        return held[0] if len(held) == 1 else held[0] + held[1]

    held = []
    for part in (slice(5), slice(5, 12)):
        found = _compared(sums(mixture)[part], sums(ce)[part], of_two_ranks)
    kept = size > 0
    apart, size = (mixture - ce)[kept], size[kept]
    rate = apart.sum() / size.sum()
    error = np.sqrt(len(size) / (len(size) - 1) * ((apart - rate * size) ** 2).sum()) / size.sum()
    assert found["ahead_difference"] == pytest.approx(rate / np.log(2))
    assert found["ahead_difference_error"] == pytest.approx(error / np.log(2))
    assert found["ahead_ce_bits_per_byte"] == pytest.approx(ce[kept].sum() / size.sum() / np.log(2))


# ---- a run does not notice


def adapted(student, args):
    torch.manual_seed(0)
    return with_adapters(AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32), args)


def with_dropout(student, args):
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    return model


def seq2seq(student, args):
    return AutoModelForSeq2SeqLM.from_pretrained(student, dtype=torch.float32)


STUDENTS = {
    "accumulation": (with_dropout, {"gradient_accumulation_steps": 2}),
    "lora": (adapted, {"use_peft": True, "lora_r": 4, "lora_dropout": 0.1}),
    "bf16": (with_dropout, {"bf16": True, "optim": "adafactor"}),
    "seq2seq": (seq2seq, {}),
}


@pytest.mark.parametrize("case", STUDENTS)
def test_a_run_does_not_notice_and_comes_to_what_was_foretold(request, counting, tmp_path, case):
    """Look-aheads before the first step and after the second of four, each of two."""
    make, options = STUDENTS[case]
    if case == "seq2seq":
        cache, student = (request.getfixturevalue(name) for name in ("prompts_path", "mt0_path"))
    else:
        cache, student = counting["odds"], counting["student"]
    options = options | {"loss": "ce:1,uld:1.5,mapped:0.7", "max_steps": 4, "per_device_train_batch_size": 2}
    watched = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "look_ahead_steps": 2}
    watched |= {"save_strategy": "steps", "save_steps": 2}

    def trained(name, resumed=None, **more):
        args = config(tmp_path / name, **options, **more)
        documents = CachedDocuments(cache, ids=True)
        one = CachedDistillationTrainer(make(student, args), args, documents, load_tokenizer(student))
        one.train(resumed)
        return one

    plain = trained("plain")
    runs = [trained("watched", **watched)]
    if case == "accumulation":
        runs.append(trained("resumed", str(tmp_path / "watched" / "checkpoint-2"), **watched))
    for one in runs:
        for name, value in weights(plain).items():
            assert torch.equal(weights(one)[name], value), name
    at = {line["step"]: line for line in evaluations(runs[0])}
    assert [number for number in at if CE in at[number]] == [0, 2]
    for number in (0, 2):
        assert at[number][MIXTURE] == pytest.approx(at[number + 2]["eval_bits_per_byte"], rel=1e-12)
        assert at[number][CE] != at[number][MIXTURE]
        assert at[number][DIFFERENCE] == pytest.approx(at[number][MIXTURE] - at[number][CE], abs=1e-9)
    told, without = ([line["loss"] for line in one.state.log_history if "loss" in line] for one in (runs[0], plain))
    assert told == without


@pytest.mark.parametrize("begun", [False, True])
def test_everything_is_put_back_bit_by_bit(begun):
    """An optimizer's state that was there, one that was not; a scheduler, a scaler, buffers, whatever is drawn."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    model[0].bias.requires_grad = False
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 0.5**number)
    scaler = torch.amp.GradScaler("cpu", growth_interval=1)

    def steps(count):
        for _ in range(count):
            scaler.scale(model(torch.randn(5, 3)).square().sum() * np.random.rand()).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad()

    def everything():
        parts = (model, optimizer, scheduler, scaler)
        return copy.deepcopy([part.state_dict() for part in parts]), torch.get_rng_state(), np.random.get_state()[1]

    steps(2 * begun)
    kept, before = RunState(model, optimizer, scheduler, scaler), everything()
    afterwards = []
    for _ in range(2):
        with draws_kept(list(model.parameters())):
            steps(3)
            afterwards.append(everything())
        kept.restore()
        torch.testing.assert_close(everything(), before, rtol=0, atol=0)
    torch.testing.assert_close(afterwards[0][0], afterwards[1][0], rtol=0, atol=0)


# ---- the warning


@pytest.mark.parametrize(("teacher", "warned"), [("odds", False), ("shuffled", True)])
def test_a_teacher_with_shuffled_rows_is_warned_of_and_a_good_one_is_not(counting, tmp_path, capsys, teacher, warned):
    """By the look-ahead alone, where probes look too."""
    more = COUNTING | {"loss": "ce:1,mapped:1", "learning_rate": 2e-3, "lr_scheduler_type": "constant"}
    one = trainer(
        counting[teacher], counting["student"], tmp_path, max_steps=7, look_ahead_steps=3, probe_steps=1, **more
    )
    one.train()
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    if not warned:
        assert said == []
        return
    (line,) = said
    last = look_aheads(one)[2]
    assert last["step"] == 3
    assert f"of CE alone lead to {last[CE]:.4f} bits per byte, as many of ce:1,mapped:1 to {last[MIXTURE]:.4f}" in line
    assert "3 look-aheads in a row. Try a smaller weight (--loss ce:1,mapped:0.25), another --learning_rate" in line


def test_a_warning_takes_three_in_a_row_beyond_noise():
    def told(differences, error=0.001, gain=0.1, documents=20, mixture="ce:1,uld:1.5"):
        found, history = [], []
        for number, difference in enumerate(differences):
            figures = {DIFFERENCE: difference, ERROR: error, CE: 2.0, MIXTURE: 2 + difference}
            history.append({"eval_bits_per_byte": 2 + gain, "eval_documents": documents, "step": number} | figures)
            line = look_ahead_warning(history, LossMixture.parse(mixture))
            if line:
                found.append((number, line))
            history.append({"loss": 1.0})
            assert look_ahead_warning(history, LossMixture.parse(mixture)) is None, "told once"
        return found

    found = told([0.02] * 7)
    assert [number for number, _ in found] == [2, 5]
    assert "Try a smaller weight (--loss ce:1,uld:0.375), --loss ce:1,mapped:1 (needs ids), another" in found[0][1]
    assert "(--loss ce:1,mapped:0.5), another" in told([0.02] * 3, mixture="mapped:2")[0][1]
    assert told([0.02, 0.02, 0.006, 0.02, 0.02, -0.02, 0.02]) == []
    assert told([0.02] * 5, error=0.005) == []
    assert told([0.02] * 5, gain=-0.5) == [], "less than a twentieth of what CE alone changes"
    assert told([0.02] * 5, documents=9) == [], "too few documents for an error"


def test_the_bench_draws_other_batches_from_one_state(counting, tmp_path):
    results = tmp_path / "look_ahead.csv"
    words = [str(counting["odds"]), str(counting["student"]), "--at", "1", "3", "--draws", "3", "--max_length", "96"]
    assert bench_look_ahead.main([*words, "--loss", "ce:1,mapped:1", "--results", str(results)]) == 0
    rows = read_rows(results)
    assert [row["at_step"] for row in rows] == ["1", "3"]
    for row in rows:
        assert float(row["spread_of_error"]) > 0
        assert float(row["look_ahead_seconds"]) > 0
        assert float(row["bits_per_byte"]) < 1


# ---- what cannot be


def test_what_cannot_be_looked_ahead(tmp_path):
    with pytest.raises(ConfigError, match="must not be negative"):
        config(tmp_path, look_ahead_steps=-1)
    with pytest.raises(ConfigError, match="add --eval_strategy steps"):
        config(tmp_path, look_ahead_steps=2)
    args = config(tmp_path, look_ahead_steps=2, eval_strategy="epoch")
    for kind in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        check_look_ahead(args, SimpleNamespace(distributed_type=kind))
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        with pytest.raises(ConfigError, match="leave it out"):
            check_look_ahead(args, SimpleNamespace(distributed_type=kind))
    args = config(tmp_path, look_ahead_steps=2, eval_strategy="epoch", optim="galore_adamw_layerwise")
    with pytest.raises(ConfigError, match="galore_adamw_layerwise steps in the backward pass"):
        check_look_ahead(args, SimpleNamespace(distributed_type=DistributedType.NO))


def test_arms_that_say_nan_are_not_compared(counting, tmp_path):
    """The run goes on to say so itself, of its own step."""
    more = COUNTING | {"learning_rate": 1e30, "max_grad_norm": 0, "eval_on_start": True}
    one = trainer(counting["odds"], counting["student"], tmp_path, look_ahead_steps=2, max_steps=4, **more)
    with pytest.raises(NonFiniteLossError):
        one.train()
    assert evaluations(one)[0]["step"] == 0
    assert look_aheads(one) == []


def test_ce_alone_has_nothing_to_be_compared_with(counting, tmp_path):
    one = trainer(
        counting["odds"], counting["student"], tmp_path, loss="ce:1", look_ahead_steps=1, max_steps=2, **COUNTING
    )
    one.train()
    assert len(evaluations(one)) == 2
    assert look_aheads(one) == []
