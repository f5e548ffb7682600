"""The bar, and the lines that take its place where there is no terminal."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

import tiny
from unolora import training
from unolora.progress import Bar

SHOW, HIDE = "\x1b[?25h", "\x1b[?25l"  # the cursor


def train(folder, terminal, progress=None):
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100, markup=False, highlight=False)
    bars = []

    def make(label, trainer):
        bars.append(Bar(label, trainer, console))
        return bars[-1]

    training.train(tiny.settings(folder, training={"steps": 6, "log_every": 2}), progress=progress or make)
    return text.getvalue(), bars


@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    monkeypatch.setattr("unolora.report.write_report", lambda folder: folder)
    monkeypatch.setattr(training, "write_analysis", lambda *_: None)


def test_without_a_terminal_a_line_at_each_log(tmp_path):
    text, _ = train(tmp_path / "run", terminal=False)
    lines = text.splitlines()
    assert "\x1b" not in text
    logged = tiny.lines(tmp_path / "run")
    steps = [line.split("step ")[1].split()[0] for line in lines]
    assert list(dict.fromkeys(steps)) == ["2/6", "4/6", "6/6"]
    assert all(line.startswith("UnoLoRA* (task+sample)  step ") for line in lines)
    for entry in logged:
        if entry["kind"] == "train":
            rows = " ".join(f"{name} {n}" for name, n in entry["seen"].items())
            assert any(rows in line for line in lines), rows
    average = next(entry["average"] for entry in logged if entry["kind"] == "evaluation")
    assert f"validation {average:.3f}" in lines[-1]
    assert "loss " in lines[0]
    assert "validation" not in lines[0]


def test_on_a_terminal_a_bar(tmp_path):
    text, bars = train(tmp_path / "run", terminal=True)
    assert "6/6" in text
    assert "rows mood" in text.replace("\x1b[2m", "")
    assert HIDE in text
    assert text.rindex(SHOW) > text.rindex(HIDE), "the cursor is given back"
    assert bars[0].progress.finished


def test_stop_gives_the_terminal_back_at_any_time():
    text = io.StringIO()
    trainer = SimpleNamespace(args=SimpleNamespace(max_steps=3), seen=dict)
    bar = Bar("it", trainer, Console(file=text, force_terminal=True))
    bar.stop()
    bar.on_train_begin(None, None, None)
    assert HIDE in text.getvalue()
    bar.stop()
    bar.stop()
    assert text.getvalue().rindex(SHOW) > text.getvalue().rindex(HIDE)


def test_callbacks_are_made_for_each_method(tmp_path):
    labels = []
    training.train(
        tiny.settings(tmp_path / "run", baselines=["heads-only"], training={"steps": 2}),
        progress=lambda label, trainer: (labels.append((label, trainer.args.max_steps)), tiny.Watch())[1],
    )
    assert labels == [("UnoLoRA* (task+sample)", 2), ("frozen backbone, heads only", 2)]
