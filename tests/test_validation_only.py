"""`training.test: false`: a run that settings are chosen by never looks at the test split."""

import json

import pytest

import tiny
from unolora import cli, compare, grow, scoring, training
from unolora.errors import InputError

SMALL = {"training": {"test": False}, "method": "unolora"}


@pytest.fixture(scope="module")
def run():
    return training.train(tiny.settings(tiny.folder() / "run", **SMALL))


def test_the_model_sees_no_row_of_the_test_split(tmp_path, monkeypatch):
    seen, answers = [], scoring.answers

    def watched(model, tasks, splits, *args):
        seen.append(splits)
        return answers(model, tasks, splits, *args)

    monkeypatch.setattr(scoring, "answers", watched)
    trainers = {}
    training.train(tiny.settings(tmp_path / "with", training={"steps": 2}), progress=tiny.watched(trainers, "with"))
    assert any(splits is trainers["with"].splits["test"] for splits in seen)
    seen.clear()
    small = {"training": {"steps": 2, "test": False}}
    training.train(tiny.settings(tmp_path / "without", **small), progress=tiny.watched(trainers, "without"))
    assert not any(splits is trainers["without"].splits["test"] for splits in seen)


def test_its_results_have_validation_scores_alone(run):
    whole, found = tiny.results(tiny.trained()), tiny.results(run)
    assert not (run / "predictions.json").exists()
    for mine, full in zip(found["tasks"], whole["tasks"], strict=True):
        assert mine["metrics"] == {"validation": full["metrics"]["validation"]}
        assert mine["baseline"]["metrics"] == {"validation": full["baseline"]["metrics"]["validation"]}
    for name, average in found["averages"].items():
        assert average == {"validation": whole["averages"][name]["validation"]}
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == (
        tiny.trained() / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_those_who_read_results_say_so(run, capsys):
    card = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "| task | metric | validation | a constant, validation |" in card
    assert "mean of first metrics on the validation splits" in card
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "left the test splits alone; it reaches" in page
    assert cli.compare([str(run), "--split", "validation"]) == 0
    assert "Scores on the validation split" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"no scores on the test split, which `training\.test: false` left alone"):
        compare.compare([run])
    with pytest.raises(InputError, match="it has no test scores"):
        grow.remove_task(run, "mood", run.parent / "less")
    assert not (run.parent / "less").exists()


def test_the_command_line_prints_the_validation_scores(tmp_path, capsys):
    config = tiny.write_yaml(tmp_path / "mine.yaml", tmp_path / "run", training={"steps": 2, "test": False})
    assert cli.train([str(config)]) == 0
    out = capsys.readouterr().out
    assert "validation split" in out
    assert "test split" not in out
    value = json.loads((tmp_path / "run" / "results.json").read_text())["averages"]["mean_of_first_metrics"]
    assert f"{value['validation']:.3f}" in out
