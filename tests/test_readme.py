"""What the README shows runs."""

import re
import sys
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
sys.path.append(str(ROOT / "scripts"))
import readme_tables  # noqa: E402
import reproduce  # noqa: E402


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


def test_what_the_makefile_calls_is_there():
    named = re.findall(r"\b(?:scripts|configs)/\S+", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert len(named) >= 3
    assert [name for name in named if not (ROOT / name).is_file()] == []


# --- tables of results/ --------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "table.md").write_text("| a |\n| --- |\n| \\1 |\n\nA note.\n")
    return tmp_path


def test_tables_go_between_their_marks(results):
    page = "A\n<!-- table: one -->\nold\n<!-- end -->\nB\n<!-- table: one --><!-- end -->\n| mine |\n<!-- end -->\n"
    once = readme_tables.filled(page, results)
    table = "<!-- table: one -->\n\n| a |\n| --- |\n| \\1 |\n\n<!-- end -->"
    assert once == page.replace("<!-- table: one -->\nold\n<!-- end -->", table)
    assert readme_tables.filled(once, results) == once
    assert readme_tables.filled("no marks\n", results) == "no marks\n"


def test_a_table_that_is_not_there(results):
    with pytest.raises(SystemExit, match=r"two/table\.md: no such file; scripts/reproduce\.py writes it"):
        readme_tables.filled("<!-- table: two -->\n<!-- end -->", results)
    with pytest.raises(SystemExit, match=r"zero-shot/table\.md: no such file; scripts/zero_shot\.py writes it"):
        readme_tables.filled("<!-- table: zero-shot -->\n<!-- end -->", results)


@pytest.mark.parametrize("name", ["arena", "glue-small"])
def test_the_tables_are_what_the_results_give(name, tmp_path):
    folder = ROOT / "results" / name
    if not folder.is_dir():
        pytest.skip(f"results/{name} is not in this checkout")
    wanted = reproduce.table(reproduce.read_suite(ROOT / "configs" / f"{name}.yaml", tmp_path), folder)
    assert (folder / "table.md").read_text(encoding="utf-8") == wanted


def test_the_pages_show_what_the_results_give():
    if not (ROOT / "results").is_dir():
        pytest.skip("results/ is not in this checkout")
    places = set()
    for page in readme_tables.PAGES:
        text = page.read_text(encoding="utf-8")
        places |= {place[2] for place in readme_tables.PLACE.finditer(text)}
        assert readme_tables.filled(text, ROOT / "results") == text, page
    assert {"glue-small", "arena/paired"} <= places
