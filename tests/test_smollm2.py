"""A pretrained decoder, SmolLM2-135M: 20 steps on two real tasks as text. It comes by pip, 93 MB."""

import numpy as np
import pytest

import tiny
from unolora import runs, scoring, training
from unolora.data import Collator
from unolora.settings import from_dict
from unolora.text import TextModel

pytestmark = [pytest.mark.slow]
STEPS = 20


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    given = {
        "backbone": "smollm2",
        "method": "unolora",
        "tasks": ["spam", "questions"],
        "data": {"max_length": 40, "limit": 200, "evaluation_limit": 24},
        "training": {
            "steps": STEPS,
            "batch_size": 8,
            "learning_rate": 3e-3,
            "evaluate_every": STEPS,
            "log_every": 1,
        },
        "output": str(tmp_path_factory.mktemp("smollm2") / "run"),
    }
    return training.train(from_dict(given))


def test_its_answers_are_text(run):
    assert isinstance(runs.load_run(run).model, TextModel)
    assert tiny.results(run)["parameters"]["heads"] == 0


def test_the_loss_falls(run):
    losses = [line["loss"] for line in tiny.lines(run) if line["kind"] == "train"]
    assert len(losses) == STEPS
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_it_knows_more_than_a_constant(run):
    spam = next(task for task in tiny.results(run)["tasks"] if task["name"] == "spam")
    assert spam["metrics"]["test"]["accuracy"] >= spam["baseline"]["metrics"]["test"]["accuracy"]


def test_label_scoring_answers_as_generation(run):
    loaded = runs.load_run(run)
    (row,) = (row for row, task in enumerate(loaded.tasks) if task.name == "spam")
    data = training.load_data(loaded.settings)[row]
    split = runs.encode_rows(loaded.model, row, data.splits["test"], loaded.tokenizer, 40)
    found = {
        how: scoring.predictions(loaded.model, {row: split}, Collator(loaded.tokenizer), how)[row]
        for how in ("labels", "generation")
    }
    valid = found["generation"] >= 0
    assert valid.sum() > 12, "nothing to compare"
    assert np.array_equal(found["labels"][valid], found["generation"][valid])
