"""Steps that are not finite are skipped and counted; too many in a row stop the run; same seed, same result."""

import json

import pytest
import torch

import tiny
from unolora import run_folder, runs, training
from unolora.errors import InputError
from unolora.settings import from_dict


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("unolora.report.write_report", lambda folder: folder)
    monkeypatch.setattr("os.fsync", lambda _: None)


class Spoil(tiny.Watch):
    """Makes the loss of a task, or a gradient, not finite at some steps, and looks at what the step did."""

    def __init__(self, trainer, steps, task=None, value=float("nan"), then=None):
        super().__init__(then)
        self.trainer, self.steps, self.task, self.value = trainer, steps, task, value
        self.before, self.changed = None, {}

    def now(self):
        return self.trainer.state.global_step + 1 in self.steps

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.task is None:
            parameter = next(p for p in model.parameters() if p.requires_grad)
            parameter.register_hook(lambda gradient: gradient * self.value if self.now() else gradient)
        else:
            real = model.heads.losses

            def losses(logits, tasks, labels):
                found = real(logits, tasks, labels)
                return torch.where(tasks == self.task, found * self.value, found) if self.now() else found

            model.heads.losses = losses

    def state(self):
        moments = self.trainer.optimizer.state_dict()["state"]
        flat = {f"{i}.{k}": v.clone() for i, values in moments.items() for k, v in values.items()}
        return {**{k: v.clone() for k, v in runs.state(self.trainer.model).items()}, **flat}

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = self.state()

    def on_optimizer_step(self, args, state, control, **kwargs):
        after = self.state()
        self.changed[state.global_step + 1] = any(
            name not in self.before or not torch.equal(value, self.before[name]) for name, value in after.items()
        )


def spoiled(settings, resume=False, **more):
    watches = []

    def progress(label, trainer):
        watches.append(Spoil(trainer, **more))
        return watches[-1]

    try:
        training.train(settings, resume=resume, progress=progress)
    finally:
        spoiled.last = watches[-1]
    return watches[-1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_step_with_a_loss_that_is_not_finite_is_skipped_and_counted_for_its_task(tmp_path, value):
    settings = tiny.settings(tmp_path / "run", training={"log_every": 1})
    watch = spoiled(settings, steps=[3, 7], task=1, value=value)
    assert [step for step, changed in watch.changed.items() if not changed] == [3, 7], "weights and moments stay"
    assert len(watch.changed) == 12
    lines = tiny.lines(tmp_path / "run")
    skipped = [line for line in lines if line["kind"] == "skipped"]
    assert skipped == [{"kind": "skipped", "step": step, "tasks": ["topic"]} for step in (3, 7)]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 4, 5, 6, 8, 9, 10, 11, 12]
    assert tiny.results(tmp_path / "run")["skipped"] == {"steps": 2, "tasks": {"topic": 2}}


def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(tmp_path):
    settings = tiny.settings(tmp_path / "run")
    watch = spoiled(settings, steps=[4], value=float("inf"))
    assert [step for step, changed in watch.changed.items() if not changed] == [4]
    assert tiny.results(tmp_path / "run")["skipped"] == {"steps": 1, "tasks": {}}
    lines = [line for line in tiny.lines(tmp_path / "run") if line["kind"] == "train"]
    assert sum(lines[0]["seen"].values()) == 40, "the rows of the step were drawn"
    assert tiny.lines(tmp_path / "run")[0]["kind"] == "skipped"


def test_steps_after_a_skipped_one_are_those_of_a_run_that_knows_of_it(tmp_path):
    """Stopped right after the skip, and resumed: as if it had not stopped."""
    settings = tiny.settings(tmp_path / "whole" / "run")
    spoiled(settings, steps=[3, 4], task=0)

    def stop(step):
        if step == 4:
            raise KeyboardInterrupt

    settings = tiny.settings(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        spoiled(settings, steps=[3, 4], task=0, then=stop)
    spoiled(settings, resume=True, steps=[3, 4], task=0)
    assert tiny.parts(tmp_path / "run") == tiny.parts(tmp_path / "whole" / "run")


def test_too_many_in_a_row_stop_the_run_and_leave_the_rows(tmp_path):
    run = tmp_path / "run"
    settings = tiny.settings(run, training={"max_skipped": 3, "log_every": 1})
    words = r"the loss of task 'mood' is not finite at step 7, the 3. in a row: training diverged; try a lower"
    with pytest.raises(InputError, match=words):
        spoiled(settings, steps=[2, 5, 6, 7], task=0)
    trainer = spoiled.last.trainer
    found = json.loads((run / "not-finite.json").read_text())
    assert [(row["task"], row["row"]) for row in found] == [
        (tiny.NAMES[task], row) for task, row in trainer.sampler.batch(6)
    ]
    texts = [row["text"] for row in tiny.rows("mood")]
    of_mood = [row for row in found if row["task"] == "mood"]
    assert of_mood
    assert all(any(text in row["text"] for text in texts) for row in of_mood)
    assert all(row["tokens"] and isinstance(row["target"], float) for row in found)
    assert run_folder.last_checkpoint(run).name == "step-000004"
    assert [line["step"] for line in tiny.lines(run) if line["kind"] == "skipped"] == [2, 5, 6]
    assert not (run / ".lock").exists()


def test_a_training_that_diverges_is_not_saved_as_good(tmp_path):
    """Its weights would be NaN if a step were taken."""
    settings = tiny.settings(tmp_path / "run", training={"max_skipped": 1})
    with pytest.raises(InputError, match=r"a gradient is not finite at step 5, the 1. in a row"):
        spoiled(settings, steps=[5])
    assert all(value.isfinite().all() for value in runs.state(spoiled.last.trainer.model).values())


def test_the_host_looks_at_the_device_once_a_step(tmp_path, monkeypatch):
    """Not at each micro-batch: four of them, and one look."""
    looks = []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: looks.append(tuple(self.shape)) or real(self))
    training.train(tiny.settings(tmp_path / "run", training={"gradient_accumulation": 4, "log_every": 12}))
    assert looks.count((4,)) == 12  # three tasks and the norm


# --- precision and determinism -------------------------------------------------------------------------------------


def test_fp16_is_refused_with_the_reason():
    with pytest.raises(InputError, match=r"can't be fp16: T5.* overflow its largest number.*; use bf16") as error:
        from_dict(tiny.spelled(training={"precision": "fp16"}))
    assert "\n" not in str(error.value)


def test_t5_overflows_in_fp16():
    """The reason: what T5's feed-forward layers give may pass 65504, which fp16 can't hold and bf16 can."""
    value = torch.tensor(70000.0)
    assert value.half().isinf()
    assert value.bfloat16().isfinite()


def test_deterministic_operations_are_asked_for_while_training_only(tmp_path):
    seen = []
    settings = tiny.settings(tmp_path / "run", training={"deterministic": True})
    look = tiny.Watch(lambda _: seen.append(torch.are_deterministic_algorithms_enabled()))
    training.train(settings, progress=lambda *_: look)
    assert seen == [True] * 12
    assert not torch.are_deterministic_algorithms_enabled()
    found, wanted = tiny.parts(tmp_path / "run"), tiny.parts(tiny.trained())
    assert {**found, "config.yaml": 0} == {**wanted, "config.yaml": 0}, "on a processor it changes nothing"
