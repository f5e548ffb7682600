"""Gradient conflict: against gradients taken one by one, and beside a training that must not notice."""

import numpy as np
import pytest
import torch

import tiny
from unolora import gradients, training


def test_gradients_of_tasks_are_those_taken_one_by_one():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    x, tasks = torch.randn(6, 3), torch.tensor([0, 2, 0, 2, 2, 5])
    losses = model(x).squeeze(1).square()
    parameters = list(model.parameters())
    found = gradients.of_tasks(losses, tasks, parameters)
    assert all(parameter.grad is None for parameter in parameters)
    assert sorted(found) == [0, 2, 5]
    for task, gradient in found.items():
        model.zero_grad()
        model(x[tasks == task]).squeeze(1).square().sum().backward()
        assert gradient.numpy() == pytest.approx(torch.cat([p.grad.flatten() for p in parameters]).numpy(), abs=1e-6)
    losses.mean().backward()  # the graph is still there


def test_cosines_are_those_of_numpy():
    rows = torch.randn(3, 7)
    rows[2] = 0
    expected = np.corrcoef(rows[:2].numpy() - rows[:2].numpy().mean(axis=1, keepdims=True))
    centred = [row - row.mean() for row in rows[:2]]
    assert np.array(gradients.cosines(centred)) == pytest.approx(expected, abs=1e-6)
    found = np.array(gradients.cosines(list(rows)))
    assert found[2].tolist() == [0, 0, 0]
    assert found[0, 0] == pytest.approx(1)


def test_heads_are_not_shared():
    model = tiny.TRAINERS[str(tiny.trained() and "unolora")].model
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)].split(".")[0] for p in gradients.shared(model)}
    assert found == {"method"}


def test_logging_conflict_changes_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("unolora.report.write_report", lambda folder: folder)
    monkeypatch.setattr(training, "write_analysis", lambda *_: None)
    plain = training.train(tiny.settings(tmp_path / "plain" / "run"))
    logged = training.train(tiny.settings(tmp_path / "logged" / "run", training={"conflict_every": 4}))
    one, other = tiny.parts(plain), tiny.parts(logged)
    lines = other["metrics.jsonl"]
    conflict = [line for line in lines if line["kind"] == "conflict"]
    assert [line["step"] for line in conflict] == [4, 8, 12]
    for line in conflict:
        assert set(line["cosines"]) <= set(tiny.NAMES)
        assert all(-1 <= value <= 1 for row in line["cosines"].values() for value in row.values())
        assert all(line["cosines"][b][a] == value for a, row in line["cosines"].items() for b, value in row.items())
    other["metrics.jsonl"] = [line for line in lines if line["kind"] != "conflict"]
    del one["config.yaml"], other["config.yaml"]
    assert one == other


def test_what_is_logged_is_the_gradient_of_the_step(tmp_path, monkeypatch):
    """At the first step B is zero, so only B has a gradient: half of what the update will be made of."""
    monkeypatch.setattr("unolora.report.write_report", lambda folder: folder)
    monkeypatch.setattr(training, "write_analysis", lambda *_: None)
    seen = {}
    real = gradients.cosines

    def keep(rows):
        seen["rows"] = [row.clone() for row in rows]
        return real(rows)

    monkeypatch.setattr(gradients, "cosines", keep)
    trainers = {}

    def watch(label, trainer):
        trainers["it"] = trainer

        class Grab(tiny.Watch):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in gradients.shared(trainer.model)]
                seen["whole"] = torch.cat([g.flatten() for g in grads])

        return Grab()

    training.train(
        tiny.settings(tmp_path / "run", training={"conflict_every": 1, "steps": 1, "max_grad_norm": 1e9}),
        progress=watch,
    )
    assert seen["whole"].abs().max() > 0
    total = torch.stack(seen["rows"]).sum(dim=0)
    assert total.numpy() / 8 == pytest.approx(seen["whole"].numpy(), abs=1e-6)  # 8 rows, each weighing the same
