"""Settings: one spelling for YAML, flags and Python, and nonsense refused before anything is read."""

import ast
import dataclasses
import inspect
import itertools
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import tiny
from unolora import UnoLoraConfig
from unolora import settings as module
from unolora.errors import InputError
from unolora.settings import SECTIONS, Adapter, Data, Sampling, Settings, Training, check_keys, from_dict, to_dict


def test_defaults_are_sound():
    settings = Settings(tasks=["spam"])
    assert (settings.backbone, settings.method, settings.output, settings.overwrite) == (
        "minilm",
        "unolora",
        None,
        False,
    )
    assert from_dict({"tasks": ["spam"]}) == settings


def test_no_two_settings_share_a_section():
    one, two = Settings(tasks=["spam"]), Settings(tasks=["spam"])
    one.training.steps = 5
    one.training.report_to.append("wandb")
    assert two.training == Training()


def test_the_adapter_is_spelled_as_its_configuration():
    """One name from YAML to checkpoint, and one default."""
    theirs = {field.name: field for field in dataclasses.fields(UnoLoraConfig)}
    for field in dataclasses.fields(Adapter):
        assert field.name in theirs, field.name
        assert field.default == theirs[field.name].default, field.name


def test_every_field_has_its_help():
    """A line of text under each field."""
    tree = ast.parse(inspect.getsource(module))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for name in ("Settings", "Adapter", "Data", "Sampling", "Training"):
        body = classes[name].body
        for node, after in itertools.pairwise(body):
            if isinstance(node, ast.AnnAssign):
                assert isinstance(after, ast.Expr), f"{name}.{node.target.id}"


# --- round trip ----------------------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)
floats = st.floats(1e-8, 1e8)
whole = st.integers(1, 10**6)
anything = st.builds(
    Settings,
    backbone=names,
    method=st.sampled_from(tiny.METHODS),
    tasks=st.lists(names | st.dictionaries(names, names | whole, max_size=2), min_size=1, max_size=3),
    baselines=st.lists(st.sampled_from(tiny.METHODS), max_size=2),
    adapter=st.builds(
        Adapter, r=whole, alpha=floats | whole, dropout=st.floats(0, 0.9),
        target_modules=st.none() | names | st.lists(names, min_size=1, max_size=2),
        conditioning=st.sampled_from(["none", "task", "task+sample"]),
    ),
    data=st.builds(Data, root=st.none() | names, max_length=st.integers(4, 999), limit=st.none() | whole),
    sampling=st.builds(Sampling, temperature=floats, limit=st.none() | whole, mixed=st.booleans()),
    training=st.builds(
        Training, steps=whole, learning_rate=floats, weight_decay=st.floats(0, 1), checkpoint_every=st.none() | whole,
        seed=st.integers(0, 2**32 - 1), schedule=st.sampled_from(module.SCHEDULES),
        report_to=st.lists(names, max_size=2),
    ),
    output=st.none() | names,
    overwrite=st.booleans(),
)  # fmt: skip


@given(anything)
@hypothesis_settings(max_examples=100, deadline=None)
def test_yaml_gives_back_what_it_got(settings):
    text = yaml.safe_dump(to_dict(settings), sort_keys=False, allow_unicode=True)
    assert from_dict(yaml.safe_load(text)) == settings


def test_to_dict_is_plain_and_apart():
    settings = tiny.settings()
    data = to_dict(settings)
    data["training"]["steps"] = 999
    data["tasks"].append("spam")
    assert settings == tiny.settings()


@pytest.mark.parametrize("path", sorted([Path("configs/quickstart.yaml"), *Path("examples").glob("*/config.yaml")]))
def test_shipped_configs_are_settings(path):
    settings = from_dict(yaml.safe_load((Path(__file__).parents[1] / path).read_text(encoding="utf-8")))
    assert settings.tasks


# --- nonsense ------------------------------------------------------------------------------------------------------

NUMBERS = ["steps", "batch_size", "gradient_accumulation", "evaluate_every", "log_every", "keep_checkpoints"]
BAD = [
    ({"method": "xyz"}, r"unknown method 'xyz' \(known: c-poly, full, full-per-task, heads-only, .*, unolora\)"),
    ({"method": "unolra"}, r"unknown method 'unolra'; did you mean 'unolora'\?"),
    ({"baselines": ["ful"]}, r"unknown method 'ful'; did you mean 'full'\?"),
    ({"baselines": "full"}, r"`baselines` must be of type list\[str\], got 'full'"),
    ({"method": ["unolora"]}, r"`method` must be of type str"),
    ({"tasks": []}, r"`tasks` is empty; name at least one"),
    ({"tasks": "spam"}, r"`tasks` must be of type list\[Any\], got 'spam'"),
    ({"output": 5}, r"`output` must be of type str \| None, got 5"),
    ({"overwrite": "yes"}, r"`overwrite` must be of type bool, got 'yes'"),
    ({"adapter": {"r": 0}}, r"`r` must be a whole number of at least 1, got 0"),
    ({"adapter": {"r": True}}, r"`adapter.r` must be of type int, got True"),
    ({"adapter": {"alpha": "16"}}, r"`adapter.alpha` must be of type float, got '16'"),
    ({"adapter": {"dropout": 1.0}}, r"`dropout` must be at least 0 and below 1, got 1.0"),
    ({"adapter": {"conditioning": "tasks"}}, r"unknown conditioning 'tasks'; did you mean 'task'\?"),
    ({"adapter": {"scale_init": "two"}}, r"unknown scale_init 'two'"),
    ({"adapter": {"target_modules": [1]}}, r"`adapter.target_modules` must be of type list\[str\] \| str \| None"),
    ({"data": {"max_length": 3}}, r"`data.max_length` must be at least 4, got 3"),
    ({"data": {"max_length": 3.5}}, r"`data.max_length` must be of type int, got 3.5"),
    ({"data": {"limit": 0}}, r"`data.limit` must be at least 1, got 0"),
    ({"sampling": {"strategy": "equl"}}, r"unknown sampling.strategy 'equl'; did you mean 'equal'\?"),
    ({"sampling": {"temperature": 0}}, r"`sampling.temperature` must be a number above 0, got 0"),
    ({"sampling": {"temperature": float("nan")}}, r"`sampling.temperature` must be a number above 0, got nan"),
    ({"sampling": {"limit": 0}}, r"`sampling.limit` must be at least 1, got 0"),
    *(({"training": {name: 0}}, rf"`training.{name}` must be at least 1, got 0") for name in NUMBERS),
    *(({"training": {name: "ten"}}, rf"`training.{name}` must be of type int, got 'ten'") for name in NUMBERS),
    ({"training": {"checkpoint_every": 0}}, r"`training.checkpoint_every` must be at least 1, got 0"),
    ({"training": {"learning_rate": 0}}, r"`training.learning_rate` must be a number above 0, got 0"),
    ({"training": {"learning_rate": float("nan")}}, r"`training.learning_rate` must be a number above 0, got nan"),
    ({"training": {"learning_rate": float("inf")}}, r"`training.learning_rate` must be a number above 0, got inf"),
    ({"training": {"learning_rate": "1e-3"}}, r"`training.learning_rate` must be of type float, got '1e-3'"),
    ({"training": {"learning_rate": None}}, r"`training.learning_rate` must be of type float, got None"),
    ({"training": {"max_grad_norm": -1}}, r"`training.max_grad_norm` must be a number above 0, got -1"),
    ({"training": {"weight_decay": -0.1}}, r"`training.weight_decay` must be at least 0, got -0.1"),
    ({"training": {"weight_decay": float("nan")}}, r"`training.weight_decay` must be at least 0, got nan"),
    ({"training": {"warmup_steps": -1}}, r"`training.warmup_steps` must be at least 0, got -1"),
    ({"training": {"seed": -1}}, r"`training.seed` must be at least 0, got -1"),
    ({"training": {"seed": 2**32}}, r"`training.seed` must be below 2\^32"),
    ({"training": {"schedule": "cosin"}}, r"unknown training.schedule 'cosin'; did you mean 'cosine'\?"),
    ({"training": {"precision": "bf61"}}, r"unknown training.precision 'bf61'; did you mean"),
    ({"training": {"precision": "fp16"}}, r"`training.precision` can't be fp16: T5"),
    ({"training": {"max_skipped": 0}}, r"`training.max_skipped` must be at least 1, got 0"),
    ({"training": {"report_to": "wandb"}}, r"`training.report_to` must be of type list\[str\], got 'wandb'"),
    ({"training": {"batch_size": 9, "gradient_accumulation": 2}}, r"`training.batch_size` 9 can't be cut into 2 equal"),
    ({"training": None}, r"`training` must be a mapping of names to values, got None"),
    ({"training": [1]}, r"`training` must be a mapping of names to values, got \[1\]"),
    ({"training": {"stepz": 1}}, r"unknown setting 'training.stepz'; did you mean 'training.steps'\?"),
    ({"training": {1: 1}}, r"unknown setting 'training.1'"),
    ({"trainig": {}}, r"unknown setting 'trainig'; did you mean 'training'\?"),
    ({"steps": 5}, r"unknown setting 'steps'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda value: str(value)[:50])
def test_nonsense_is_refused(change, message):
    from_dict(tiny.spelled())
    with pytest.raises(InputError, match=message) as error:
        from_dict({**tiny.spelled(), **change})
    assert "\n" not in str(error.value)


def test_whole_numbers_are_numbers():
    assert (
        from_dict({**tiny.spelled(), "training": {"learning_rate": 1, "weight_decay": 0}}).training.learning_rate == 1
    )


@pytest.mark.parametrize("section", [*SECTIONS, ""])
def test_every_name_is_known_and_no_other(section):
    cls = SECTIONS.get(section, Settings)
    for field in dataclasses.fields(cls):
        if field.name not in SECTIONS:
            check_keys({section: {field.name: 1}} if section else {field.name: 1})
    with pytest.raises(InputError, match="unknown setting"):
        check_keys({section: {"nonsense": 1}} if section else {"nonsense": 1})
