"""Training rows that stay on the disk: read one by one, in the sampler's order, and the same as those in memory."""

import json

import numpy as np
import pandas as pd
import pytest

import tiny
import tiny_text
from unolora import scoring, training
from unolora.data import Streamed
from unolora.errors import InputError
from unolora.tasks import Task, rows
from unolora.tasks.files import read_file


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """The rows are laid out in a cache, which is this test's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("unolora.report.write_report", lambda folder: folder)


def shards(folder, name, count=3):
    """The rows of one of the tiny tasks: training rows in shards, the others in one file each."""
    folder.mkdir(exist_ok=True)
    table = pd.DataFrame(tiny.rows(name))
    for number, part in enumerate(np.array_split(np.arange(60), count)):
        table.iloc[part].to_parquet(folder / f"{name}-{number}.parquet")
    table.iloc[60:70].to_parquet(folder / f"{name}.validation.parquet")
    table.iloc[70:].to_parquet(folder / f"{name}.test.parquet")
    table.iloc[:60].to_parquet(folder / f"{name}.train.parquet")


def spelled(name, *, stream, **more):
    (task,) = tiny_text.tasks(name)
    labels = {"mood": {"labels": ["bad", "good"]}}.get(name, {})
    source = {"validation": f"{name}.validation.parquet", "test": f"{name}.test.parquet"}
    train = f"{name}-*.parquet" if stream else f"{name}.train.parquet"
    return {**task, **labels, "source": {**source, "train": train, **({"stream": True} if stream else {})}, **more}


@pytest.mark.parametrize("form", ["heads", "text"])
def test_a_streamed_run_is_the_run_of_the_same_rows_in_memory(tmp_path, form):
    """To rounding: the rows of a step lie by length there. So it is not cut into parts, and there is no dropout."""
    for name in tiny.NAMES:
        shards(tmp_path / "data", name)
    runs = {}
    for stream in (True, False):
        changes = {
            "tasks": [spelled(name, stream=stream) for name in tiny.NAMES],
            "data": {"root": str(tmp_path / "data"), "max_length": 48},
            "training": {"gradient_accumulation": 1, "log_every": 1, "steps": 6},
            "backbone": str(tiny.backbone(dropout=0.0)),
            "adapter": {"dropout": 0.0},
        }
        if form == "text":
            changes["backbone"] = str(tiny_text.backbone("t5"))
        trainers = {}
        settings = tiny.settings(tmp_path / str(stream) / "run", **changes)
        runs[stream] = training.train(settings, progress=tiny.watched(trainers, "it"))
        assert all(isinstance(split, Streamed) == stream for split in trainers["it"].splits["train"].values())
    found, wanted = (tiny.parts(runs[stream]) for stream in (True, False))
    for one, other in zip(found["results.json"]["tasks"], wanted["results.json"]["tasks"], strict=True):
        assert one["rows"] == other["rows"] == {"train": 60, "validation": 10, "test": 10}
        assert one["baseline"] == other["baseline"]
        assert one["metrics"]["test"] == pytest.approx(other["metrics"]["test"], abs=1e-4)
    losses = [[line["loss"] for line in parts["metrics.jsonl"] if "loss" in line] for parts in (found, wanted)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_row_is_read_when_its_turn_comes(tmp_path, monkeypatch):
    shards(tmp_path / "data", "mood")
    task = Task.from_dict(spelled("mood", stream=True))
    data = rows.load(task, root=tmp_path / "data")
    train = data.splits["train"]
    assert len(train) == 60
    whole = rows.fill(task, read_file(tmp_path / "data" / "mood.train.parquet"))
    assert [train.take(np.array([i])).texts[0] for i in (59, 0, 31)] == [whole[59], whole[0], whole[31]]
    read = []
    real = rows._read
    monkeypatch.setattr(rows, "_read", lambda *args: read.append(args[-1].tolist()) or real(*args))
    train.take(np.array([17]))
    assert read == [[17]]


def test_a_sample_stands_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "SAMPLE", 20)
    shards(tmp_path / "data", "heat")
    train = rows.load(Task.from_dict(spelled("heat", stream=True)), root=tmp_path / "data").splits["train"]
    degrees = np.array([row["degrees"] for row in tiny.rows("heat")[:60]])
    np.testing.assert_array_equal(train.targets, degrees[::3])
    assert (len(train), len(train.texts)) == (60, 20)
    assert train.digest().startswith("60 rows, of a sample ")


@pytest.mark.parametrize(("count", "most"), [(1, 1), (7, 3), (10, 10), (3, 10), (10**9, 4)])
def test_evenly(count, most):
    found = rows.evenly(count, most)
    assert len(set(found.tolist())) == len(found) == min(count, most)
    assert 0 <= found.min() <= found.max() < count
    if len(found) > 1:
        assert np.ptp(np.diff(found)) <= 1


def test_a_limit_takes_few_rows_into_memory(tmp_path):
    shards(tmp_path / "data", "mood")
    train = rows.load(Task.from_dict(spelled("mood", stream=True)), root=tmp_path / "data", limit=12).splits["train"]
    assert type(train) is rows.Rows
    assert len(train) == 12


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"stream": "yes"}, "stream must be true or false, not 'yes'"),
        ({"stream": True, "train": "a.csv"}, r"stream reads .parquet files, such as shards/\*.parquet, not 'a.csv'"),
        ({"stream": True, "train": "a.parquet"}, "stream cuts no splits; name validation and test rows"),
        ({"stream": True, "bundled": "spam"}, "stream goes with .parquet files or a hub data set alone"),
        ({"stream": True, "train": "none-*.parquet"}, "none-.*no such file"),
        ({"stream": True, "train": "text-*.parquet"}, "can't be read"),
    ],
)
def test_what_can_not_be_streamed_is_refused(tmp_path, source, message):
    shards(tmp_path, "mood")
    (tmp_path / "text-0.parquet").write_text("no parquet")
    if source.get("train", "").endswith("-*.parquet"):
        source |= {"validation": "mood.validation.parquet", "test": "mood.test.parquet"}
    with pytest.raises(InputError, match=message):
        rows.load(Task.from_dict({**spelled("mood", stream=True), "source": source}), root=tmp_path)


def test_streamed_labels_are_named(tmp_path):
    shards(tmp_path, "mood")
    with pytest.raises(InputError, match="task 'mood': name its labels: rows that are streamed are not all looked at"):
        rows.load(Task.from_dict(spelled("mood", stream=True, labels=[])), root=tmp_path)


def test_a_row_that_does_not_fit_is_named_when_it_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "SAMPLE", 2)
    shards(tmp_path, "mood", count=1)
    table = pd.read_parquet(tmp_path / "mood-0.parquet")
    table.loc[41, "label"] = "odd"
    table.to_parquet(tmp_path / "mood-0.parquet")
    train = rows.load(Task.from_dict(spelled("mood", stream=True)), root=tmp_path).splits["train"]
    with pytest.raises(InputError, match=r"mood-\*.parquet, from row 42 on: row 1: unknown label 'odd'"):
        train.take(np.array([41]))


def test_changed_shards_are_noticed(tmp_path):
    shards(tmp_path / "data", "mood")
    changes = {"tasks": [spelled("mood", stream=True)], "data": {"root": str(tmp_path / "data")}}
    run = training.train(tiny.settings(tmp_path / "run", method="heads-only", **changes))
    digests = json.loads((run / "data.json").read_text())
    shards(tmp_path / "data", "topic")
    assert (
        rows.load(Task.from_dict(spelled("mood", stream=True)), root=tmp_path / "data").splits["train"].digest()
        == digests["mood"]["train"]
    )
    (tmp_path / "data" / "mood-2.parquet").unlink()
    again = rows.load(Task.from_dict(spelled("mood", stream=True)), root=tmp_path / "data")
    assert again.splits["train"].digest() != digests["mood"]["train"]
    from unolora.runs import load_run

    with pytest.raises(InputError, match=r"train rows of task 'mood' are not those|streamed, which are not scored"):
        scoring.evaluate_run(load_run(run), "train")
