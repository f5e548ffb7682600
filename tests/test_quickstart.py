"""The quickstart on its real backbone and its real data: slow, and what the README promises."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from unolora import settings, training

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A quarter of the quickstart's steps."""
    found = settings.from_dict(yaml.safe_load(CONFIG.read_text(encoding="utf-8")))
    short = replace(found.training, steps=60, evaluate_every=60)
    return training.train(replace(found, training=short, output=str(tmp_path_factory.mktemp("runs") / "quickstart")))


def results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_the_run_folder_is_whole(run):
    names = {path.name for path in run.iterdir()}
    assert names == {
        "adapter",
        "analysis",
        "baselines",
        "config.yaml",
        "data.json",
        "environment.json",
        "metrics.jsonl",
        "predictions.json",
        "report.html",
        "results.json",
    }
    found = results(run)
    names = [task["name"] for task in found["tasks"]]
    assert names == ["spam", "questions", "movies", "products", "tweets", "editorials"]
    assert all(math.isfinite(v) for task in found["tasks"] for v in task["metrics"]["test"].values())
    assert sum(task["sampling"]["seen"] for task in found["tasks"]) == 60 * 32


def test_the_loss_falls(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 6
    assert losses[-1] < 0.75 * losses[0]


def test_the_adapter_beats_the_frozen_backbone_by_far(run):
    score = {
        name: results(folder)["averages"]["mean_of_first_metrics"]["test"]
        for name, folder in {"unolora": run, "heads-only": run / "baselines" / "heads-only"}.items()
    }
    assert 0.2 < score["heads-only"] < score["unolora"] - 0.1


def test_the_report_compares_both(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "frozen backbone, heads only" in page
    assert f"{results(run)['averages']['mean_of_first_metrics']['test']:.3f}" in page
