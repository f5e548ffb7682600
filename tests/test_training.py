"""Training: resumed is uninterrupted, the loss is the mean over rows, and something is learned."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny
from unolora import fused, run_folder, runs, scoring, training
from unolora.data import Collator, encode
from unolora.errors import CheckpointError, InputError
from unolora.settings import from_dict


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Without the report and the waits for the disk: a third of a tiny run's time, and tested elsewhere."""
    monkeypatch.setattr("unolora.report.write_report", lambda folder: folder)
    monkeypatch.setattr(training, "write_analysis", lambda *_: None)
    monkeypatch.setattr("os.fsync", lambda _: None)


class Crash(Exception):  # noqa: N818
    """Stands for a power cut."""


def stop_at(step, number=signal.SIGINT):
    """A `progress` that sends a signal after a step."""
    return lambda label, trainer: tiny.Watch(lambda now: signal.raise_signal(number) if now == step else None)


def crash_at(step):
    """A `progress` that ends all after a step, or after training."""

    def crash(now=None):
        if now in (step, None):
            raise Crash

    return lambda label, trainer: tiny.Watch(None, crash) if step == "end" else tiny.Watch(crash)


def interrupted(settings, step):
    with pytest.raises(training.Interrupted, match=rf"stopped at step {step}; go on with `unolora train --resume "):
        training.train(settings, progress=stop_at(step))


def crashed(settings, step):
    with pytest.raises(Crash):
        training.train(settings, progress=crash_at(step))


def resumed(settings, **more):
    """Go on as the command line does: with what the folder says."""
    found = runs.read_settings(Path(settings.output))
    found.output = settings.output
    return training.train(found, resume=True, **more)


def same(one, other):
    one, other = tiny.parts(one), tiny.parts(other)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name] == other[name], name


# --- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("end", [interrupted, crashed])
def test_resumed_is_uninterrupted(method, end, tmp_path):
    settings = tiny.settings(tmp_path / "run", method=method)
    t = settings.training
    assert t.gradient_accumulation == 2
    assert settings.adapter.dropout > 0
    end(settings, 7)  # between two lines of the log, two checkpoints and two evaluations
    checkpoint = run_folder.last_checkpoint(tmp_path / "run")
    assert checkpoint.name == ("step-000007" if end is interrupted else "step-000004")
    assert not (tmp_path / "run" / "adapter").exists()
    if end is crashed:
        kept = (checkpoint / "metrics.jsonl").read_bytes() if (checkpoint / "metrics.jsonl").exists() else b""
        assert len((tmp_path / "run" / "metrics.jsonl").read_bytes()) > len(kept), "no line after the checkpoint"
    same(resumed(settings), tiny.trained(method))
    assert tiny.leftovers(tmp_path) == []
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("step", [1, 4, 5, 6, 8, 11])
def test_resumed_is_uninterrupted_at_any_step(step, tmp_path):
    settings = tiny.settings(tmp_path / "run")
    interrupted(settings, step)
    same(resumed(settings), tiny.trained())


@pytest.mark.parametrize("step", [2, 6, 12, "end"])
def test_resumed_after_a_crash_is_uninterrupted(step, tmp_path):
    """Before the first checkpoint, after a new best, before the last evaluation, and before the results."""
    settings = tiny.settings(tmp_path / "run", training={"log_every": 1})
    whole = training.train(tiny.settings(tmp_path / "whole" / "run", training={"log_every": 1}))
    crashed(settings, step)
    assert len(tiny.lines(tmp_path / "run")) > 0
    same(resumed(settings), whole)


def test_a_signal_at_the_last_step_stops_nothing(tmp_path):
    training.train(tiny.settings(tmp_path / "run"), progress=stop_at(12))
    same(tmp_path / "run", tiny.trained())


def test_resumed_often_is_uninterrupted(tmp_path):
    settings = tiny.settings(tmp_path / "run", method="lora-per-task")
    crashed(settings, 3)
    for step in (2, 5, 9):
        with pytest.raises(training.Interrupted):
            resumed(settings, progress=stop_at(step, signal.SIGTERM))
    same(resumed(settings), tiny.trained("lora-per-task"))


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    run = tiny.copied(tiny.trained(), tmp_path)
    settings = runs.read_settings(run)
    settings.output = str(run)
    trainers = {}
    training.train(settings, resume=True, progress=tiny.watched(trainers))
    assert trainers == {}
    same(run, tiny.trained())


def test_dropout_is_felt_and_keyed_by_step_and_micro_batch(tmp_path):
    """The premise of resuming bit for bit: with dropout, every step and every part of it draws other masks."""
    trainers = {}
    training.train(tiny.settings(tmp_path / "run"), progress=tiny.watched(trainers, "it"))
    trainer = trainers["it"]
    batch = trainer.data_collator([trainer.train_dataset[0, 0], trainer.train_dataset[1, 0]])
    trainer.optimizer = None
    losses = {}
    for step in (3, 4):
        trainer.state.global_step, trainer._micro = step, 0
        for part in (1, 0):
            losses[step, part] = float(trainer.training_step(trainer.model, batch))
    assert len(set(losses.values())) == 4
    trainer.state.global_step = 3
    assert float(trainer.training_step(trainer.model, batch)) == losses[3, 1]


def test_resuming_during_a_baseline_leaves_the_finished_method_alone(tmp_path):
    # In a folder called "baselines", where a run must not be taken for one.
    settings = tiny.settings(tmp_path / "baselines" / "run", baselines=["heads-only"])
    run = tmp_path / "baselines" / "run"

    def stop_baseline(label, trainer):
        return stop_at(7)(label, trainer) if label.startswith("frozen") else tiny.Watch()

    with pytest.raises(training.Interrupted) as stop:
        training.train(settings, progress=stop_baseline)
    assert (stop.value.folder, stop.value.step) == (run, 7)
    before = {
        path: path.stat().st_mtime_ns for path in run.rglob("*") if "baselines" not in path.relative_to(run).parts
    }
    before.pop(run / "environment.json")
    assert run / "results.json" in before
    assert not (run / "baselines" / "heads-only" / "results.json").exists()
    trainers = {}
    resumed(settings, progress=tiny.watched(trainers))
    assert list(trainers) == ["frozen backbone, heads only"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    wanted = tiny.parts(tiny.trained("heads-only"))
    found = tiny.parts(run / "baselines" / "heads-only")
    found["results.json"]["name"] = "run"
    assert {name: value for name, value in wanted.items() if name not in ("config.yaml", "data.json")} == found
    trained = tiny.parts(tiny.trained())
    for name in ("results.json", "metrics.jsonl", "adapter/heads.safetensors"):
        assert tiny.parts(run)[name] == trained[name]


CHANGES = [
    {"training": {"learning_rate": 0.02}},
    {"training": {"seed": 1}},
    {"training": {"steps": 13}},
    {"training": {"gradient_accumulation": 1}},
    {"training": {"batch_size": 4}},
    {"adapter": {"r": 2}},
    {"data": {"max_length": 16}},
    {"sampling": {"strategy": "equal"}},
    {"method": "lora-shared"},
    {"tasks": tiny.tasks("mood", "topic")},
]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    run = tmp_path_factory.mktemp("stopped") / "run"
    interrupted(tiny.settings(run), 7)
    return run


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_resuming_with_other_settings_is_refused(stopped, change):
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}
    (name,) = change
    name = f"{name}.{next(iter(change[name]))}" if isinstance(change[name], dict) else name
    with pytest.raises(CheckpointError, match=rf"written with other settings \({name}\); resume with those of the run"):
        training.train(tiny.settings(stopped, **change), resume=True)
    assert {path: path.stat().st_mtime_ns for path in stopped.rglob("*")} == before


def test_an_edited_config_does_not_fit_the_checkpoint(stopped, tmp_path):
    run = tiny.copied(stopped, tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["training"]["learning_rate"] = 0.02
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(CheckpointError, match=r"step-000007: written with other settings \(training.learning_rate\)"):
        training.train(from_dict({**config, "output": str(run)}), resume=True)


def test_what_does_not_change_the_training_may_change(stopped, tmp_path):
    run = tiny.copied(stopped, tmp_path)
    training.train(tiny.settings(run, training={"keep_checkpoints": 1}), resume=True)
    found, wanted = tiny.parts(run), tiny.parts(tiny.trained())
    found["results.json"]["name"] = "run"
    assert found == wanted


def test_resuming_needs_a_run(tmp_path):
    with pytest.raises(InputError, match=r"config.yaml: no such file; a run folder holds config.yaml"):
        training.train(tiny.settings(tmp_path / "run"), resume=True)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (999_999, 1_000_000, 5):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    assert run_folder.last_checkpoint(tmp_path).name == "step-1000000"
    assert run_folder.last_checkpoint(tmp_path / "other") is None


def test_only_the_last_checkpoints_are_kept(tmp_path):
    seen = set()

    def look(_):
        seen.add(tuple(sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))))

    settings = tiny.settings(tmp_path / "run", training={"checkpoint_every": 2, "keep_checkpoints": 2})
    training.train(settings, progress=lambda label, trainer: tiny.Watch(look))
    assert ("step-000008", "step-000010") in seen
    assert max(map(len, seen)) == 2


def test_a_checkpoint_holds_no_pickle(stopped):
    files = {path.suffix for path in (stopped / "checkpoints").rglob("*") if path.is_file()}
    assert files == {".safetensors", ".json", ".jsonl"}


# --- the log -------------------------------------------------------------------------------------------------------


def test_the_log_has_each_line_once():
    found = [(line["kind"], line["step"]) for line in tiny.lines(tiny.trained())]
    assert found == [("train", 5), ("evaluation", 6), ("train", 10), ("train", 12), ("evaluation", 12)]


def test_the_log_counts_rows_and_means():
    lines = [line for line in tiny.lines(tiny.trained()) if line["kind"] == "train"]
    before = dict.fromkeys(tiny.NAMES, 0)
    for line in lines:
        assert sum(line["seen"].values()) == line["examples"] == 8 * line["step"]
        rows = {name: line["seen"][name] - before[name] for name in tiny.NAMES}
        assert line["loss"] == pytest.approx(
            sum(rows[name] * line["task_loss"][name] for name in tiny.NAMES) / sum(rows.values()), rel=1e-6
        )
        before = line["seen"]
    assert lines[-1]["seen"] == {
        task["name"]: task["sampling"]["seen"] for task in tiny.results(tiny.trained())["tasks"]
    }


def test_the_best_evaluation_is_kept():
    run = tiny.trained("full")
    lines = [line for line in tiny.lines(run) if line["kind"] == "evaluation"]
    best = max(lines, key=lambda line: line["average"])
    results = tiny.results(run)
    assert results["best_step"] == best["step"]
    assert {t["name"]: t["metrics"]["validation"] for t in results["tasks"]} == best["metrics"]
    assert results["averages"]["mean_of_first_metrics"]["validation"] == best["average"]


@pytest.mark.parametrize("end", [None, interrupted, crashed])
def test_the_best_weights_are_kept_not_the_last(end, tmp_path, monkeypatch):
    """Also where the best lies before the stop, and an equal score comes later."""
    scores, weights_at = {2: 0.1, 4: 0.7, 6: 0.3, 8: 0.7, 10: -0.2, 12: 0.5}, {}

    def evaluate(model, tasks, splits, collate, how):
        step = trainers["it"].state.global_step
        assert splits is trainers["it"].splits["validation"]
        weights_at[step] = {name: value.clone() for name, value in runs.state(model).items()}
        return {task.name: dict.fromkeys(task.metrics, scores[step]) for task in tasks}

    monkeypatch.setattr(scoring, "evaluate", evaluate)
    settings = tiny.settings(tmp_path / "run", training={"evaluate_every": 2, "checkpoint_every": 4})
    trainers = {}

    def stopping(make):
        return lambda label, trainer: (trainers.update(it=trainer), make(label, trainer))[1]

    if end is not None:
        with pytest.raises((training.Interrupted, Crash)):
            training.train(settings, progress=stopping({interrupted: stop_at, crashed: crash_at}[end](7)))
    training.train(settings, resume=end is not None, progress=stopping(lambda *_: tiny.Watch()))
    assert tiny.results(tmp_path / "run")["best_step"] == 4
    model = runs.load_run(tmp_path / "run").model
    assert all(torch.equal(value, weights_at[4][name]) for name, value in runs.state(model).items())
    assert not all(torch.equal(value, weights_at[4][name]) for name, value in weights_at[12].items())


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates(schedule, tmp_path):
    run = training.train(
        tiny.settings(
            tmp_path / "run",
            method="heads-only",
            tasks=tiny.tasks("mood"),
            training={"schedule": schedule, "warmup_steps": 2, "log_every": 1, "steps": 6, "learning_rate": 1.0},
        )
    )
    found = [line["learning_rate"] for line in tiny.lines(run) if line["kind"] == "train"]
    decay = {
        "constant": [1] * 4,
        "linear": [1, 0.75, 0.5, 0.25],
        "cosine": [(1 + np.cos(np.pi * k / 4)) / 2 for k in range(4)],
    }[schedule]
    assert found == pytest.approx([0, 0.5, *decay])


# --- what is optimised ---------------------------------------------------------------------------------------------


def plain(tmp_path, name, steps=3, **changes):
    """A short run without any dropout; the log has every step."""
    every = {"steps": steps, "log_every": 1, "evaluate_every": steps, "checkpoint_every": steps}
    changes["training"] = {**every, **changes.get("training", {})}
    changes = {"backbone": str(tiny.backbone(dropout=0.0)), "adapter": {"r": 4, "dropout": 0.0}, **changes}
    return tiny.settings(tmp_path / name, **changes)


def weights(run):
    """The trained tensors of a run."""
    return {
        f"{path.parent.name}/{name}": value
        for path in sorted((run / "adapter").rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


@pytest.mark.parametrize("method", [method for method in tiny.METHODS if method not in ("poly", "c-poly")])
def test_accumulation_does_not_change_the_step(method, tmp_path):
    """Not for Poly, which draws its skills anew in each forward."""
    found = {}
    for parts in (1, 4):
        settings = plain(
            tmp_path,
            f"{parts}",
            method=method,
            adapter={"r": 4, "dropout": 0.0, "target_modules": "query-value"},
            training={"gradient_accumulation": parts},
        )
        found[parts] = training.train(settings)
    losses = {k: [line["loss"] for line in tiny.lines(run) if line["kind"] == "train"] for k, run in found.items()}
    assert len(losses[1]) == 3
    assert losses[1] == pytest.approx(losses[4], rel=1e-6, abs=1e-6)
    one, other = weights(found[1]), weights(found[4])
    assert one.keys() == other.keys()
    apart = torch.cat([(one[name] - other[name]).abs().flatten() for name in one if "key.bias" not in name])
    if method.startswith("full"):  # Adam blows up the rounding where a gradient is next to zero, as that of key.bias is
        apart = apart.quantile(0.999)
    assert apart.max() < 2e-6


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_gradients_are_those_of_the_whole_batch(parts, tmp_path):
    """Adam and clipping hide a factor; so the gradients themselves are looked at, before either."""
    found = {}

    class Look(tiny.Watch):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.setdefault(args.gradient_accumulation_steps, model.heads.linear["task_mood"].weight.grad.clone())

    for accumulation in (1, parts):
        settings = plain(
            tmp_path, f"{accumulation}", steps=1, method="heads-only",
            training={"gradient_accumulation": accumulation, "max_grad_norm": 1e9},
        )  # fmt: skip
        training.train(settings, progress=lambda *_: Look())
    assert found[1].abs().max() > 0.01
    torch.testing.assert_close(found[parts], found[1], atol=1e-6, rtol=1e-5)


def test_the_loss_is_the_mean_over_the_rows_of_the_batch(tmp_path):
    """By hand: the rows of step 0, each alone, unpadded, through fresh weights."""
    settings = plain(tmp_path, "run", training={"gradient_accumulation": 4})
    trainers = {}
    run = training.train(settings, progress=tiny.watched(trainers, "it"))
    rows = trainers["it"].sampler.batch(0)
    tasks = [task for task, _ in rows]
    assert len(rows) == 8
    assert len(set(tasks)) == 3
    data = training.load_data(settings)
    fresh, tokenizer = training.build(settings, "unolora", data)
    collate, losses = Collator(tokenizer), []
    splits = [encode(d.splits["train"], tokenizer, settings.data.max_length) for d in data]
    for task, row in rows:
        losses.append(float(fresh.eval()(**collate([(task, splits[task], row)]))["loss"].detach()))
    line = tiny.lines(run)[0]
    assert line["step"] == 1
    assert line["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    by_task = {n: np.mean([x for x, t in zip(losses, tasks, strict=True) if t == k]) for k, n in enumerate(tiny.NAMES)}
    assert line["task_loss"] == pytest.approx(by_task, abs=1e-5)
    assert abs(np.mean(list(by_task.values())) - np.mean(losses)) > 1e-4, "the mean over tasks is another number"


@pytest.mark.parametrize("method", tiny.METHODS)
def test_only_what_a_method_trains_changes(method, tmp_path):
    trainers = {}
    settings = plain(tmp_path, "run", method=method, training={"learning_rate": 0.01})
    training.train(settings, progress=tiny.watched(trainers, "it"))
    model = trainers["it"].model
    pretrained, _ = runs.load_backbone(settings.backbone)
    before = pretrained.state_dict()
    after = {name.replace(".base_layer", ""): value for name, value in model.method.state_dict().items()}
    after = {name.rpartition("model.")[2].removeprefix("backbone."): value for name, value in after.items()}
    assert before.keys() <= after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    if method.startswith("full"):
        assert set(before) - set(changed) <= {"embeddings.position_ids", "embeddings.token_type_embeddings.weight"}
    elif method == "hyperformer":  # trains the norms as well
        assert changed
        assert all("LayerNorm" in name for name in changed)
    else:
        assert changed == []


@pytest.mark.parametrize("method", tiny.METHODS)
def test_something_is_learned(method, tmp_path):
    """The words decide the tasks: the loss on the training rows, without dropout, falls for every one of them."""
    rates = {"full": 0.005, "full-per-task": 0.005, "hyperformer": 0.01, "lora-matched": 0.02}
    rate, steps = rates.get(method, 0.05), 120 if method == "hyperformer" else 60
    settings = plain(
        tmp_path, "run", steps=steps, method=method,
        training={"learning_rate": rate, "batch_size": 24, "gradient_accumulation": 1, "log_every": steps},
    )  # fmt: skip
    trainers = {}
    training.train(settings, progress=tiny.watched(trainers, "it"))
    trainer = trainers["it"]
    fresh, _ = training.build(settings, method, training.load_data(settings))
    for row, name in enumerate(tiny.NAMES):
        split = trainer.splits["train"][row]
        batch = trainer.data_collator([(row, split, i) for i in range(len(split))])
        with torch.no_grad():
            before, after = (float(model.eval()(**batch)["loss"]) for model in (fresh, trainer.model))
        assert 0.5 < before < 2, name
        assert after < (0.9 if method == "heads-only" else 0.7) * before, name


def test_one_seed_one_run(tmp_path):
    again = training.train(tiny.settings(tmp_path / "run"))
    same(again, tiny.trained())
    other = training.train(tiny.settings(tmp_path / "other" / "run", training={"seed": 1}))
    assert tiny.parts(other)["adapter/heads.safetensors"] != tiny.parts(again)["adapter/heads.safetensors"]


def test_methods_start_alike(tmp_path):
    """One seed gives every method the same heads; without B they are all the frozen backbone.

    Not so HyperFormer++, whose adapters start near the identity only, and prompt tuning, which has its prompts.
    """
    settings = tiny.settings()
    data = training.load_data(settings)
    models = {method: training.build(settings, method, data)[0].eval() for method in tiny.METHODS}
    _, tokenizer = runs.load_backbone(settings.backbone)
    splits = {row: encode(d.splits["test"], tokenizer, 32) for row, d in enumerate(data)}
    rows = [(row, split, i) for row, split in splits.items() for i in range(len(split))]
    found = {method: scoring.outputs(model, rows, Collator(tokenizer))[0] for method, model in models.items()}
    for method in tiny.METHODS:
        for name, value in models[method].heads.state_dict().items():
            assert value.equal(models["heads-only"].heads.state_dict()[name])
        alike = torch.allclose(found[method], found["heads-only"], atol=1e-6, rtol=0)
        assert alike == (method not in ("hyperformer", "prompt-tuning"))


def test_bf16_trains_on_a_processor_like_fp32(tmp_path):
    """It rounds, and so can't be the same; it learns, and stays beside fp32 all the way."""
    losses = {}
    for precision in ("bf16", "fp32"):
        given = {"precision": precision, "learning_rate": 0.01}
        run = training.train(plain(tmp_path, precision, steps=16, training=given))
        losses[precision] = [line["loss"] for line in tiny.lines(run) if line["kind"] == "train"]
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.01)
    learned = np.mean(losses["fp32"][:4]) - np.mean(losses["fp32"][-4:])
    assert learned > 10 * 0.01, losses


def test_a_training_that_diverges_says_so(tmp_path):
    settings = tiny.settings(
        tmp_path / "run", method="full", training={"learning_rate": 1e30, "schedule": "constant", "max_grad_norm": 1e9}
    )
    with pytest.raises(InputError, match=r"not finite.*: training diverged; try a lower `training.learning_rate`"):
        training.train(settings)


def test_outputs_that_are_not_finite_are_no_scores(tmp_path):
    """NaN logits have an argmax too."""
    run = runs.load_run(tiny.trained())
    with torch.no_grad():
        run.model.heads.linear["task_mood"].bias.fill_(torch.nan)
    with pytest.raises(InputError, match="the model's outputs are not finite"):
        scoring.evaluate_run(run, "test")


def test_one_task_a_batch(tmp_path):
    trainers = {}
    run = training.train(plain(tmp_path, "run", sampling={"mixed": False}), progress=tiny.watched(trainers, "it"))
    assert all(len({task for task, _ in trainers["it"].sampler.batch(step)}) == 1 for step in range(3))
    assert [set(line["seen"].values()) <= {0, 8, 16, 24} for line in tiny.lines(run) if line["kind"] == "train"]


def test_a_regression_of_one_value_trains(tmp_path):
    """Its standard deviation is 0, by which nothing is divided."""
    path = tiny.write_rows(tmp_path / "flat.jsonl", [{**row, "degrees": 7.0} for row in tiny.rows("heat")])
    (task,) = tiny.tasks("heat")
    task["source"] = {"train": str(path)}
    run = training.train(plain(tmp_path, "run", tasks=[task], method="heads-only"))
    assert tiny.lines(run)[0]["loss"] < 10
    found = runs.load_run(run).model.heads
    assert (found.mean.item(), found.std.item()) == (7.0, 1.0)


def test_integrations_that_are_not_there_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match=r"`training.report_to` names 'wandbb', which is not known or not installed"):
        training.train(tiny.settings(tmp_path / "run", training={"report_to": ["wandbb"]}))
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_losses_and_the_scores(tmp_path, monkeypatch):
    """Through the Trainer's integration, as W&B, MLflow and trackio would."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run = training.train(tiny.settings(tmp_path / "run", training={"report_to": ["tensorboard"]}))
    events = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    averages = {line["step"]: line["average"] for line in tiny.lines(run) if line["kind"] == "evaluation"}
    assert {event.step: event.value for event in events.Scalars("eval/average")} == pytest.approx(averages)
    assert {f"eval/{name}" for name in tiny.NAMES} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [5, 10, 12]


def test_tasks_may_be_called_as_modules_are(tmp_path):
    """`values` and `type` are names of an nn.ModuleDict's own, `sort` begins `sort_more`."""
    names = ["values", "type", "sort", "sort_more"]
    tasks = [{**tiny.tasks("mood")[0], "name": name} for name in names]
    for method in tiny.METHODS:
        run = training.train(plain(tmp_path, method, steps=2, method=method, tasks=tasks))
        assert [task.name for task in runs.load_run(run).tasks] == names


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp32")])
def test_precision_auto_is_settled_before_the_run(native, precision, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "has_bf16", lambda: native)
    run = training.train(plain(tmp_path, "run", training={"precision": "auto"}))
    assert runs.read_settings(run).training.precision == precision


def test_backbones_of_runs_draw_the_cheap_masks():
    model = runs.load_run(tiny.trained()).model
    assert [m for m in model.method.backbone.modules() if isinstance(m, fused.Dropout)]
