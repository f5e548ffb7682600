"""What a task may say of itself, and how a run names its tasks."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from unolora import tasks
from unolora.errors import InputError
from unolora.tasks import Source, Task, glue, quickstart
from unolora.tasks.task import DEFAULT_METRICS, METRIC_NAMES, parse_template

GOOD = {
    "name": "tickets",
    "kind": "classification",
    "template": "{text}",
    "target": "topic",
    "source": {"train": "a.csv"},
}


def refused(match, **changes):
    """`GOOD` with these changes is refused in one line."""
    Task.from_dict(GOOD)  # the premise: it is the change that is refused
    with pytest.raises(InputError, match=match) as caught:
        Task.from_dict({key: value for key, value in {**GOOD, **changes}.items() if value is not ...})
    assert "\n" not in str(caught.value)


def test_yaml_spells_a_task():
    text = """
    name: pairs
    kind: classification
    template: ["{sentence1}", "{sentence2}"]
    target: label
    labels: [entailment, not_entailment]
    metrics: [accuracy]
    source: {hub: nyu-mll/glue, subset: rte, validation: validation}
    description: Does the first sentence imply the second?
    """
    assert Task.from_dict(yaml.safe_load(text)) == Task(
        "pairs",
        "classification",
        ("{sentence1}", "{sentence2}"),
        "label",
        ("entailment", "not_entailment"),
        ("accuracy",),
        Source(hub="nyu-mll/glue", subset="rte", validation="validation"),
        "Does the first sentence imply the second?",
    )


def test_one_template_may_be_a_plain_text():
    assert Task.from_dict(GOOD).template == ("{text}",)
    assert Task.from_dict({**GOOD, "template": ["{a}", "{b} {a}"]}).columns == ("a", "b")


def test_metrics_default_to_those_of_the_kind():
    assert Task.from_dict(GOOD).metrics == DEFAULT_METRICS["classification"]
    assert Task.from_dict({**GOOD, "kind": "regression"}).metrics == ("pearson", "spearman")
    for kind, names in METRIC_NAMES.items():
        assert set(DEFAULT_METRICS[kind]) <= set(names)
        assert Task.from_dict({**GOOD, "kind": kind, "metrics": list(names)}).metrics == names


def test_whole_numbers_are_label_names():
    assert Task.from_dict({**GOOD, "labels": [0, 1]}).labels == ("0", "1")


def test_a_task_is_hashable_and_survives_a_round_trip():
    task = Task.from_dict({**GOOD, "labels": ["a", "b"]})
    assert Task.from_dict(dataclasses.asdict(task)) == task
    assert len({task, Task.from_dict(dataclasses.asdict(task))}) == 1


def test_the_prompt_is_derived_from_the_template():
    assert Task.from_dict(GOOD).prompt == "tickets text: {text}"
    pair = Task.from_dict({**GOOD, "template": ["{a} of {b.c}", "{a}"]})
    assert pair.prompt == "tickets a: {a} b.c: {b.c}"  # each column once
    assert Task.from_dict({**GOOD, "prompt": "topic of: {text}"}).prompt == "topic of: {text}"


def test_a_task_as_text_has_its_prompt_for_template():
    task = Task.from_dict({**GOOD, "template": ["{a}", "{b}"], "kind": "regression", "text_step": 1})
    text = task.as_text()
    assert text.template == (task.prompt,) == ("tickets a: {a} b: {b}",)
    assert dataclasses.replace(text, template=task.template) == task
    assert text.as_text() == text
    assert Task.from_dict(json.loads(json.dumps(dataclasses.asdict(text)))) == text


def test_a_task_without_a_source_can_be_made_in_python():
    assert Task("a", "regression", ("{text}",), "score").source.empty


@pytest.mark.parametrize("name", ["", "two words", "a/b", "naïve", "a.b", "a\nb", "a\n"])
def test_names_are_plain(name):
    refused("must be letters, digits, _ and - only", name=name)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "clasification"}, "task 'tickets': unknown kind 'clasification'; did you mean 'classification'"),
        ({"kind": None}, "kind must be text, not None"),
        ({"name": 7}, "name must be text, not 7"),
        ({"target": 7}, "target must be text, not 7"),
        ({"template": "no column"}, "template 'no column' reads no column"),
        ({"template": []}, "must be one text, or two for a pair, not 0"),
        ({"template": ["{a}", "{b}", "{c}"]}, "must be one text, or two for a pair, not 3"),
        ({"template": "{text"}, r"template '{text' cannot be read \(.*\); write {{ and }} for braces"),
        ({"template": "{}"}, "a field is the plain name of a column"),
        ({"template": "{text!r}"}, "a field is the plain name of a column"),
        ({"template": "{text:>9}"}, "a field is the plain name of a column"),
        ({"template": "{text} {topic}"}, "reads the target column 'topic'"),
        ({"template": {"text": 1}}, "template must be a list of texts"),
        ({"labels": ["a"]}, "a task with one class, 'a'"),
        ({"labels": "spam"}, "a task with one class, 'spam'"),
        ({"labels": ["a", "b", "a"]}, "label 'a' is named twice"),
        ({"labels": [1, "1"]}, "label '1' is named twice"),
        ({"labels": [True, False]}, r"labels must be a list of texts, not \[True, False\] \(YAML reads yes and no"),
        ({"kind": "regression", "labels": ["a", "b"]}, "labels belong to a classification"),
        ({"metrics": ["acuracy"]}, "unknown metric 'acuracy'; did you mean 'accuracy'"),
        ({"metrics": ["pearson"]}, "metric 'pearson' does not fit a classification"),
        ({"kind": "regression", "metrics": ["f1"]}, "metric 'f1' does not fit a regression"),
        ({"lables": ["a", "b"]}, "task 'tickets': unknown key 'lables'; did you mean 'labels'"),
        ({"target": ...}, "task 'tickets' lacks the key 'target'"),
        ({"name": ...}, "a task lacks the key 'name'"),
        ({"source": ...}, "task 'tickets': source names no rows"),
        ({"source": {}}, "source names no rows"),
        ({"source": {"train": None}}, "source names no rows"),
        ({"source": {"trian": "a.csv"}}, "task 'tickets': source: unknown key 'trian'; did you mean 'train'"),
        ({"source": "a.csv"}, "source must be a mapping of keys to values, not 'a.csv'"),
        ({"source": {"train": 7}}, "source: train must be text, not 7"),
        ({"source": {"train": ""}}, "source: train must be text, not ''"),
        ({"source": {"bundled": "spam", "test": "b.csv"}}, "a bundled table has its own splits; leave out test"),
        ({"source": {"train": "a.csv", "subset": "sst2"}}, "subset belongs to a hub data set"),
        ({"source": {"test": "a.csv"}}, "validation or test came without training rows"),
        ({"source": {"train": "a.csv", "folder": "A"}}, "folder stands in for a hub data set"),
        ({"source": {"hub": "a/b", "test": "b", "validation_from": "tset"}}, "must be train or test, not 'tset'"),
        ({"source": {"hub": "a/b", "validation_from": "test"}}, "goes with a test split and without a validation"),
        (
            {"source": {"hub": "a/b", "validation": "a", "test": "b", "validation_from": "train"}},
            "goes with a test split and without a validation split",
        ),
        ({"prompt": "{topic} {text}"}, "prompt reads the target column 'topic'"),
        ({"prompt": "tickets"}, "prompt 'tickets' reads no column"),
        ({"prompt": "{text"}, "template '{text' cannot be read"),
        ({"prompt": 7}, "prompt must be text, not 7"),
        ({"text_step": 0.2}, "text_step belongs to a regression"),
        ({"kind": "regression", "text_step": 0}, "text_step must be a number above 0, not 0"),
        ({"kind": "regression", "text_step": -0.5}, "text_step must be a number above 0, not -0.5"),
        ({"kind": "regression", "text_step": float("nan")}, "text_step must be a number above 0, not nan"),
        ({"kind": "regression", "text_step": float("inf")}, "text_step must be a number above 0, not inf"),
        ({"kind": "regression", "text_step": True}, "text_step must be a number above 0, not True"),
        ({"kind": "regression", "text_step": "0.2"}, "text_step must be a number above 0, not '0.2'"),
    ],
)
def test_nonsense_is_refused(changes, match):
    refused(match, **changes)


def test_python_is_refused_what_yaml_is():
    with pytest.raises(InputError, match="unknown kind 'regresion'; did you mean 'regression'"):
        Task("a", "regresion", ("{text}",), "score")
    assert Task("a", "regression", "{text}", "score").template == ("{text}",)


def test_a_task_that_is_no_mapping():
    with pytest.raises(InputError, match="a task must be a mapping of keys to values, not 7"):
        Task.from_dict(7)


def test_templates_know_columns_with_dots_and_literal_braces():
    assert parse_template("{{{a.b}}}: {c d}") == [("{", None), ("", "a.b"), ("}", None), (": ", "c d")]


def test_the_built_in_tasks():
    assert list(quickstart.TASKS) == ["spam", "questions", "movies", "products", "tweets", "editorials"]
    assert list(tasks.TASKS) == [*quickstart.TASKS, *glue.TASKS]
    assert [task.kind for task in quickstart.TASKS.values()] == ["classification"] * 2 + ["regression"] * 4
    for name, task in quickstart.TASKS.items():
        assert task.name == task.source.bundled == name
    for task in tasks.TASKS.values():
        assert len(task.description) > 150
    assert tasks.get("questions").labels == ("abbreviation", "description", "entity", "human", "location", "number")
    assert tasks.get("spam").labels == ("ham", "spam")


def test_runs_name_tasks_or_spell_them():
    assert [task.name for task in tasks.resolve(["spam", GOOD, "movies"])] == ["spam", "tickets", "movies"]


def test_a_group_stands_for_its_tasks():
    found = [task.name for task in tasks.resolve(["wnli", "glue", "spam"])]
    assert found == ["wnli", "cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "spam"]
    assert not set(tasks.GROUPS) & set(tasks.TASKS)  # else a name would mean two things


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["spam", "movie"], "unknown task 'movie'; did you mean 'movies'"),
        (["gleu"], "unknown task 'gleu'; did you mean 'glue'"),
        (["colla"], "unknown task 'colla'; did you mean 'cola'"),
        (["spam", "spam"], "task 'spam' is named twice"),
        (["glue", "rte"], "task 'rte' is named twice"),
        ([GOOD, GOOD], "task 'tickets' is named twice"),
        (["spam", {**GOOD, "name": "spam"}], "task 'spam' is named twice"),
        ([], "at least one task"),
        ("spam", "must be a list of names or mappings"),
        (GOOD, "must be a list of names or mappings"),
        ([7], "a task must be a mapping"),
    ],
)
def test_runs_that_cannot_be_resolved(given, match):
    with pytest.raises(InputError, match=match) as caught:
        tasks.resolve(given)
    assert "\n" not in str(caught.value)


def test_the_package_itself_imports_nothing_heavy():
    code = """
import importlib.util, sys, types
# A bare stand-in for the parent package: what is measured is `unolora.tasks` alone.
spec = importlib.util.find_spec("unolora")
parent = types.ModuleType("unolora"); parent.__path__ = list(spec.submodule_search_locations)
sys.modules["unolora"] = parent
import unolora.tasks.rows
print(sorted({"torch", "transformers", "datasets", "pandas", "scipy", "sklearn", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['numpy']"


def test_the_example_names_its_two_files():
    folder = Path(__file__).parent.parent / "examples" / "two_csv"
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert [task.name for task in tasks.resolve(config["tasks"])] == ["tickets", "stars"]
