"""Predictions and scores."""

import json

import numpy as np
import pytest
import torch

import tiny
from unolora import metrics, runs, scoring
from unolora.data import Collator, encode
from unolora.errors import InputError
from unolora.tasks.rows import load


@pytest.fixture(scope="module")
def run():
    return runs.load_run(tiny.trained())


@pytest.fixture(scope="module")
def splits(run):
    data = [load(task, root=tiny.data()) for task in run.tasks]
    return {row: encode(d.splits["train"], run.tokenizer, 32) for row, d in enumerate(data)}


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_logits_come_in_the_order_given(run, splits, size):
    rows = [(row, split, i) for row, split in splits.items() for i in range(0, len(split), 5)]
    np.random.default_rng(0).shuffle(rows)
    lengths = [split.lengths()[i] for _, split, i in rows]
    assert lengths != sorted(lengths)
    assert len(rows) > 30
    wanted = torch.cat([scoring.outputs(run.model, [row], Collator(run.tokenizer))[0] for row in rows])
    found = scoring.outputs(run.model, rows, Collator(run.tokenizer), size)[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_the_longest_rows_come_first(run, splits, monkeypatch):
    """So that what does not fit in memory is known at once."""
    widths = []
    collate = Collator(run.tokenizer)

    def spy(rows):
        batch = collate(rows)
        widths.append(batch["input_ids"].shape[1])
        return batch

    scoring.outputs(run.model, [(0, splits[0], i) for i in range(60)], spy, 8)[0]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) > 3


def test_the_model_is_left_as_it_was_and_has_no_dropout(run, splits):
    rows = [(0, splits[0], i) for i in range(4)]
    collate = Collator(run.tokenizer)
    batch = collate(rows)
    batch.pop("labels")
    run.model.train()
    try:
        assert not torch.equal(run.model(**batch)["logits"], run.model(**batch)["logits"]), "no dropout at all"
        first, second = (scoring.outputs(run.model, rows, collate)[0] for _ in range(2))
        assert torch.equal(first, second)
        assert not first.requires_grad
        assert run.model.training
    finally:
        run.model.eval()
    scoring.outputs(run.model, rows, collate)[0]
    assert not run.model.training


def test_whole_splits_keep_their_tasks(run, splits):
    found = scoring.predictions(run.model, {2: splits[2], 0: splits[0]}, Collator(run.tokenizer), 13)
    assert list(found) == [2, 0]
    for row, values in found.items():
        alone = scoring.predictions(run.model, {row: splits[row]}, Collator(run.tokenizer))[row]
        assert len(values) == len(splits[row])
        np.testing.assert_allclose(values, alone, atol=1e-3)
    assert set(found[0]) <= {0, 1}
    assert found[2].std() > 0


def test_scores_are_the_metrics_of_the_predictions(run, splits):
    found = scoring.evaluate(run.model, run.tasks, splits, Collator(run.tokenizer))
    values = scoring.predictions(run.model, splits, Collator(run.tokenizer))
    assert found == {
        task.name: metrics.score(task, splits[row].targets, values[row]) for row, task in enumerate(run.tasks)
    }


def test_a_label_that_came_after_training_is_refused(tmp_path):
    """Labels found in the data are those of the training: a new one must not shift the others' ids."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in tiny.data().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    run = tiny.copied(tiny.trained(), tmp_path)
    config = (run / "config.yaml").read_text().replace(str(tiny.data()), str(folder))
    (run / "config.yaml").write_text(config)
    scoring.evaluate_run(runs.load_run(run), "test")
    rows = tiny.rows("mood")
    tiny.write_rows(folder / "mood.jsonl", [{**rows[0], "label": "awful"}, *rows[1:]])
    with pytest.raises(
        InputError, match=r"task 'mood': .*mood.jsonl: row 1: unknown label 'awful' \(known: bad, good\)"
    ):
        scoring.evaluate_run(runs.load_run(run), "test")


# --- texts ---------------------------------------------------------------------------------------------------------


def test_answers_of_a_classification(run):
    found = list(scoring.predict_texts(run, "topic", [("a cat",), ("an axe",)]))
    for answer in found:
        assert answer.keys() == {"task", "label", "probabilities"}
        assert list(answer["probabilities"]) == ["plant", "animal", "tool"]
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].get)
    assert found[0] != found[1]
    json.dumps(found)


def test_answers_of_a_regression_are_in_its_units(run):
    found = [answer["value"] for answer in scoring.predict_texts(run, "heat", [("hot", "fire"), ("ice", "cold")])]
    assert all(-60 < value < 100 for value in found)
    assert abs(np.mean(found) - 20) < 30
    assert found[0] != found[1]
    (answer,) = scoring.predict_texts(run, "heat", [("hot", "fire")])
    assert answer == {"task": "heat", "value": pytest.approx(found[0], abs=1e-3)}


def test_answers_do_not_depend_on_the_batch(run):
    texts = [(text["text"],) for text in tiny.rows("mood", 9)]
    one, many = (list(scoring.predict_texts(run, "mood", texts, batch_size=size)) for size in (1, 64))
    assert [answer["label"] for answer in one] == [answer["label"] for answer in many]
    for a, b in zip(one, many, strict=True):
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-5)


def test_no_texts_no_answers(run):
    assert list(scoring.predict_texts(run, "mood", [])) == []


def test_unknown_tasks_and_wrong_texts(run):
    with pytest.raises(InputError, match=r"unknown task 'moods'; did you mean 'mood'\? \(known: mood, topic, heat\)"):
        list(scoring.predict_texts(run, "moods", [("a",)]))
    with pytest.raises(InputError, match=r"input 2: task 'heat' takes two texts, got 1"):
        list(scoring.predict_texts(run, "heat", [("a", "b"), ("a",)]))
    with pytest.raises(InputError, match=r"input 1: task 'mood' takes one text, got 2"):
        list(scoring.predict_texts(run, "mood", [("a", "b")]))
