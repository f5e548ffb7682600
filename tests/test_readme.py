"""What the README shows runs."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification

from conftest import FAMILIES
from unolora import UnoLoraModel, settings
from unolora_cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, row):
        ids = torch.randint(2, 60, (6,), generator=torch.Generator().manual_seed(row))
        return {"input_ids": ids, "attention_mask": torch.ones(6).long(), "labels": row % 2, "tasks": row % 3}


def test_the_peft_script_trains_saves_and_predicts(tmp_path, monkeypatch):
    (script,) = blocks("python")
    hub, arguments = '"distilbert/distilbert-base-uncased"', 'TrainingArguments("out")'
    assert hub in script
    assert arguments in script
    assert len([line for line in script.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    config = FAMILIES["distilbert"][0]()
    config.num_labels = 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained("tiny")
    script = script.replace(hub, '"tiny"').replace(
        arguments, 'TrainingArguments("out", max_steps=3, report_to="none", disable_tqdm=True, use_cpu=True)'
    )
    row = Rows()[0]
    batch = {name: row[name].repeat(2, 1) for name in ("input_ids", "attention_mask")}
    space = {"rows": Rows(), "batch": batch}
    exec(script, space)
    assert isinstance(space["model"].base_model, UnoLoraModel)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert space["logits"].shape == (2, 2)
    assert space["trainer"].state.global_step == 3


def test_the_yaml_is_a_run():
    (text,) = blocks("yaml")
    found = settings.from_dict(yaml.safe_load(text))
    assert [task["name"] for task in found.tasks] == ["tickets", "stars"]


def test_the_commands_exist():
    shown = set(re.findall(r"^unolora (\S+)", README, re.M))
    assert shown
    assert shown <= set(COMMANDS)


def test_the_tree_names_every_module():
    names = {path.name for path in (ROOT / "src" / "unolora").glob("[a-z]*.py")}
    assert names
    assert [name for name in sorted(names) if name not in README] == []


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_what_is_linked_is_there(target):
    assert (ROOT / target).exists()
