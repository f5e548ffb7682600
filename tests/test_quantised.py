"""Backbones in 8 and 4 bits. Where torchao or bitsandbytes is not installed, what they do is not tested."""

import functools
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
import tiny_text
from conftest import apart
from unolora import grow, quantise, runs, scoring, settings, training
from unolora.errors import InputError
from unolora.export import export
from unolora.tasks import Task

pytestmark = pytest.mark.filterwarnings("default")  # theirs, about torch and each other

LIBRARY = {"int8": "torchao", "int4": "torchao", "bnb-8bit": "bitsandbytes", "bnb-4bit": "bitsandbytes"}


def installed(*names: str):
    return [
        pytest.param(name, marks=pytest.mark.skipif(find_spec(LIBRARY[name]) is None, reason=f"no {LIBRARY[name]}"))
        for name in names
    ]


@functools.cache
def trained(quantization: str, family: str) -> Path:
    path = tiny.folder() / "run"
    changes = {"quantization": quantization, "training": {"steps": 30, "evaluate_every": 10, "learning_rate": 0.03}}
    training.train(tiny.settings(path, **changes) if family == "bert" else tiny_text.settings(path, family, **changes))
    return path


def drop(run: Path) -> float:
    """By how much the training loss fell."""
    losses = [line["loss"] for line in tiny.lines(run) if line["kind"] == "train"]
    return losses[0] - losses[-1]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("name", installed("int8", "int4", "bnb-8bit"))
def test_a_quantised_backbone_trains_and_is_read_back(name, family, tmp_path):
    if (name, family) == ("int4", "bert"):
        pytest.skip("the tiny BERT's widths are no multiples of 32")
    path = trained(name, family)
    run = runs.load_run(path)
    packed = [each for each in run.model.method.backbone.modules() if isinstance(each, nn.Linear)]
    assert any(quantise.is_packed(each.weight) for each in packed), "the backbone is quantised"
    bare, _ = runs.load_backbone(run.settings.backbone, "heads" if family == "bert" else "text", "none")
    assert not any(quantise.is_packed(parameter) for parameter in bare.parameters())
    wanted, found = drop(trained("none", family)), drop(path)
    assert wanted > 0.1
    assert found > 0.5 * wanted, "gradients pass, also after an evaluation"
    kept = tiny.results(path)
    scores, _ = scoring.evaluate_run(run, "test")
    for task in kept["tasks"]:
        assert scores[task["name"]] == pytest.approx(task["metrics"]["test"], abs=1e-6)
    assert run.model.method.base == kept["base"]
    with pytest.raises(InputError, match="is quantised, which a merged one can't be; export it as peft-lora"):
        export(run, "mood", tmp_path / "merged", "merged")
    layer = next(iter(run.model.method.backbone.base_model.layers("default").values()))
    with pytest.raises(InputError, match=r"W is stored as .*: load the backbone unquantised to merge into it"):
        layer.merged_weight("default")
    export(run, "mood", tmp_path / "lora")
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", installed("int8"))
def test_a_task_is_added_to_a_quantised_run(name, tmp_path):
    old = runs.load_run(trained(name, "bert"))
    twin = Task.from_dict({**tiny.tasks("topic")[0], "name": "twin"})
    path = grow.add_task(old.folder, twin, tmp_path / "more", root=tiny.data(), steps=2)
    new = runs.load_run(path)
    rows = scoring.read_split(old, 0, "test")
    given = scoring.Collator(old.tokenizer)([(0, rows, i) for i in range(4)])
    given.pop("labels")
    with torch.no_grad():
        before, after = old.model(**given)["logits"], new.model(**given)["logits"]
    assert apart(before[:, :2], after[:, :2]) == 0


@pytest.mark.parametrize("name", installed("bnb-4bit"))
def test_four_bits_of_bitsandbytes_are_not_trained_on_a_processor(name, tmp_path):
    with pytest.raises(InputError, match="pass no gradient on a processor; set `quantization: int4`"):
        training.train(tiny.settings(tmp_path / "run", quantization=name))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", LIBRARY)
def test_a_library_that_is_not_installed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(quantise, "find_spec", lambda library: None)
    with pytest.raises(InputError, match=rf"needs {LIBRARY[name]}, not installed here: pip install 'unolora\[quant\]'"):
        training.train(tiny.settings(tmp_path / "run", quantization=name))
    assert not (tmp_path / "run").exists()


def test_settings_that_make_no_sense():
    with pytest.raises(InputError, match="unknown quantization 'int9'; did you mean 'int8'"):
        settings.Settings(tasks=["spam"], quantization="int9")
    with pytest.raises(InputError, match="method 'full' trains the backbone's own weights"):
        settings.Settings(tasks=["spam"], quantization="int8", baselines=["full"])
    assert json.loads(json.dumps(settings.to_dict(settings.Settings(tasks=["spam"]))))["quantization"] == "none"


def test_what_counts_as_packed():
    assert not quantise.is_packed(nn.Linear(2, 2).weight)
    assert not quantise.is_packed(torch.zeros(2, dtype=torch.bfloat16))
    assert quantise.is_packed(torch.zeros(2, dtype=torch.uint8))
