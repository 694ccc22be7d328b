"""Probes: their gradients by definition, runs that do not notice them, and a warning that tells harm from help."""

import math
import re

import pytest
import torch
from training import trainer, weights

from distill.probe import GradientProbe, HarmWatch
from storage_specs.errors import AlignmentError

LOSS = "ce:0.5,uld:1.5,mapped:0.7"


def probe_of(one):
    names = one.step_loss.losses
    return GradientProbe(
        list(one.model.parameters()),
        lambda batch: one._terms(one.model, batch)[: len(names)],
        names,
        [one.args.mixture[name] for name in names],
    )


@pytest.fixture
def probed(cache_path, student_path, tmp_path):
    """A trainer in float64, a batch, a held-out batch, and what the probe says of them."""
    one = trainer(cache_path, student_path, tmp_path, loss=LOSS)
    one.model.double()
    batch = one.data_collator([one.train_dataset[n] for n in (0, 3, 9)])
    held_out = one.data_collator([one.train_dataset[n] for n in (5, 6)])
    return one, batch, held_out, probe_of(one).measure(batch, held_out)


def flat_gradient(one, batch, weights_of):
    terms = one._terms(one.model, batch)
    loss = sum(weight * terms[one.step_loss.names.index(name)] for name, weight in weights_of.items())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(one.model.parameters()))])


def test_cosines_ratios_and_gains_are_those_of_all_parameters_gradients(probed):
    one, batch, held_out, found = probed
    h, c = (flat_gradient(one, each, {"ce": 1}) for each in (held_out, batch))
    m = flat_gradient(one, batch, dict(one.args.mixture.weights))
    expected = {"gain_ce": h @ c / h.norm() / c.norm(), "gain_mixture": h @ m / h.norm() / m.norm()}
    for name in ("uld", "mapped"):
        k = flat_gradient(one, batch, {name: 1})
        expected |= {f"{name}_cosine": c @ k / c.norm() / k.norm(), f"{name}_norm_ratio": k.norm() / c.norm()}
    expected |= {"held_out_norm": h.norm(), "held_out_ce": one._terms(one.model, held_out)[0]}
    assert found == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-4)


@pytest.mark.parametrize("direction", ["ce", "mixture"])
def test_a_gain_is_what_a_short_step_brings(probed, direction):
    one, batch, held_out, found = probed
    weights_of = {"ce": 1} if direction == "ce" else dict(one.args.mixture.weights)
    step = flat_gradient(one, batch, weights_of)
    length, before = 1e-4, one._terms(one.model, held_out)[0].item()
    step, first = step / step.norm() * length, 0
    with torch.no_grad():
        for parameter in one.model.parameters():
            size = parameter.numel()
            parameter -= step[first : first + size].view_as(parameter)
            first += size
    brought = before - one._terms(one.model, held_out)[0].item()
    assert brought == pytest.approx(found[f"gain_{direction}"] * found["held_out_norm"] * length, rel=2e-2)


def test_a_run_does_not_notice_its_probes(cache_path, student_path, tmp_path):
    runs = []
    for probe_steps in (0, 2):
        one = trainer(cache_path, student_path, tmp_path / str(probe_steps), loss=LOSS, probe_steps=probe_steps)
        one.model.config.attention_dropout = 0.3
        for module in one.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.3
        one.train()
        runs.append(one)
    for name, value in weights(runs[0]).items():
        assert torch.equal(weights(runs[1])[name], value), name
    lines = [line for line in runs[1].state.log_history if "gain_ce" in line]
    assert [line["step"] for line in lines] == [0, 2]
    for line in lines:
        assert -1 <= line["uld_cosine"] <= 1
        assert line["mapped_norm_ratio"] > 0
        assert line["held_out_ce"] > 0
    assert [line for line in runs[0].state.log_history if "gain_ce" in line] == []


def test_harm_takes_several_probes_and_more_than_their_noise():
    def told(pairs):
        watch = HarmWatch()
        return [watch.add({"gain_ce": c, "gain_mixture": m, "held_out_norm": 2.0}) for c, m in pairs]

    seen = told([(0.5, 0.2), (0.6, 0.25), (0.4, 0.15), (0.5, 0.2), (0.5, 0.25)])
    assert seen[:4] == [None] * 4
    assert seen[4].gain_ce == pytest.approx(0.5)
    assert seen[4].lead == pytest.approx(0.29)
    assert seen[4].probes == 5
    assert told([(0.5, 0.6)] * 12) == [None] * 12
    assert told([(0.5, 0.49)] * 12) == [None] * 12, "less than a twentieth"
    noisy = [(0.5, 0.5 + 0.3 * (-1) ** n - 0.05) for n in range(12)]
    assert told(noisy) == [None] * 12
    twice = told([(0.5, 0.1)] * 10)
    assert [n for n, harm in enumerate(twice) if harm] == [4, 9]


@pytest.mark.parametrize(("teacher", "warned"), [("odds", False), ("shuffled", True)])
@pytest.mark.parametrize("loss", ["ce:1,kl:1", "ce:1,mapped:1"])
def test_a_teacher_with_shuffled_rows_is_warned_of_and_a_good_one_is_not(
    counting, tmp_path, capsys, teacher, warned, loss
):
    options = {"max_steps": 6, "probe_steps": 1, "max_length": 96, "per_device_train_batch_size": 8}
    one = trainer(counting[teacher], counting["student"], tmp_path, loss=loss, learning_rate=2e-4, **options)
    one.train()
    said = capsys.readouterr().err
    assert ("warning: the teacher's losses harm" in said) == warned
    lines = [line for line in one.state.log_history if "gain_ce" in line]
    means = [sum(line[name] for line in lines) / len(lines) for name in ("gain_ce", "gain_mixture")]
    if warned:
        assert means[1] < 0 < means[0]
        nats = [float(number) for number in re.findall(r"(-?[\d.]+e-?\d+) nats", said)]
        assert nats[1] < 0 < nats[0]
        assert "Try a smaller weight" in said
    else:
        assert means[1] > 0.95 * means[0] > 0
    assert all(math.isfinite(line["loss"]) for line in one.state.log_history if "loss" in line)


def test_probes_want_held_out_documents(cache_without_held_out, student_path, tmp_path):
    with pytest.raises(AlignmentError, match="probe_steps"):
        trainer(cache_without_held_out, student_path, tmp_path, probe_steps=1)
