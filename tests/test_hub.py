"""A run on the hub and its model card; a local folder stands in for the hub."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import peft
import pytest
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel

import tiny
import unolora_cli
from unolora import hub, runs, scoring
from unolora.errors import InputError

NAME = "someone/tasks"


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> Path:
    """The folder that repositories lie in."""
    root = tmp_path / "hub"

    class Api:
        def create_repo(self, name, private, exist_ok):
            assert exist_ok
            (root / name).mkdir(parents=True, exist_ok=True)
            (root / "private").write_text(str(private))

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
            return f"https://hub/{repo_id}/commit/1"

    def download(repo_id, filename=None, subfolder=None, **_):
        path = Path(root, repo_id, subfolder or "", filename or "")
        if not path.exists():
            raise FileNotFoundError(f"no such file: {path.name}")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for module in (peft.config, peft.peft_model, peft.utils.save_and_load):
        if hasattr(module, "hf_hub_download"):
            monkeypatch.setattr(module, "hf_hub_download", download)
    monkeypatch.setattr(
        peft.utils.save_and_load, "file_exists", lambda repo_id, filename, **_: (root / repo_id / filename).exists()
    )
    return root


def test_a_run_goes_to_the_hub_and_comes_back(shelf):
    old = runs.load_run(tiny.trained())
    assert hub.push_to_hub(old.folder, NAME, private=True) == f"https://hub/{NAME}/commit/1"
    assert (shelf / "private").read_text() == "True"
    repository = shelf / NAME
    assert {path.name for path in repository.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "heads.safetensors", "tasks.json", "README.md",
        "config.yaml", "results.json",
    }  # fmt: skip
    for path in repository.glob("*.*"):
        if path.suffix != ".safetensors":
            text = path.read_text(encoding="utf-8")
            assert str(tiny.folder().parent) not in text, f"{path.name} tells where the run was trained"
    assert yaml.safe_load((repository / "config.yaml").read_text())["data"]["root"] is None
    new = hub.from_pretrained(NAME, backbone=old.settings.backbone)
    texts = [("the good cat was glad",), ("a dull sad day",)]
    assert list(scoring.predict_texts(new, "mood", texts)) == list(scoring.predict_texts(old, "mood", texts))
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(old.settings.backbone), NAME)
    key = "adapter_model.safetensors"
    kept = load_file(repository / key)
    state = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert kept.keys() == state.keys()
    assert all((kept[name] == state[name]).all() for name in kept)


def test_the_card_says_what_the_results_say():
    run = tiny.trained()
    card, results = (run / "adapter" / "README.md").read_text(encoding="utf-8"), tiny.results(run)
    for task in results["tasks"]:
        metric = task["score_metric"]
        value, constant = task["metrics"]["test"][metric], task["baseline"]["metrics"]["test"][metric]
        assert re.search(rf"\| {task['name']} \| {metric} \| .* \| {value:.4f} \| {constant:.4f} \|", card)
        assert ", ".join(str(n) for n in task["rows"].values()) in card
    assert f"{results['averages']['mean_of_first_metrics']['test']:.4f}" in card
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "## Limits" in card
    below = [t["name"] for t in results["tasks"] if t["metrics"]["test"][t["score_metric"]] <= 0]
    assert ("No better than a constant" in card) == bool(below)


def test_what_cannot_go_to_the_hub(shelf, tmp_path, monkeypatch):
    run = tiny.trained()
    for name in ("tasks", "a/b/c", "a b/c"):
        with pytest.raises(InputError, match="is no name of a repository; give OWNER/NAME"):
            hub.push_to_hub(run, name)
    part = tiny.copied(run, tmp_path)
    (part / "results.json").unlink()
    with pytest.raises(InputError, match="the run did not finish"):
        hub.push_to_hub(part, NAME)
    with pytest.raises(InputError, match="'nobody/nothing' can't be had from the hub: no such file"):
        hub.from_pretrained("nobody/nothing")

    class Refusing:
        def create_repo(self, *_, **__):
            raise PermissionError("401 Client Error\nUnauthorized")

    monkeypatch.setattr(huggingface_hub, "HfApi", Refusing)
    with pytest.raises(InputError, match="401 Client Error Unauthorized; log in with `hf auth login`"):
        hub.push_to_hub(run, NAME)


def test_the_command(shelf, capsys):
    assert unolora_cli.main(["push", str(tiny.trained()), "--to", NAME]) == 0
    assert capsys.readouterr().out == f"https://hub/{NAME}/commit/1\n"
    assert json.loads((shelf / NAME / "adapter_config.json").read_text())["peft_type"] == "UNOLORA"
