"""A run on the Hugging Face Hub: the adapter's files at the root, so that PEFT finds them by the repository's name.

adapter_config.json  adapter_model.safetensors  heads.safetensors  tasks.json  README.md     of RUN/adapter
config.yaml  results.json                                                                   of RUN
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from unolora import runs
from unolora.card import model_card
from unolora.errors import InputError
from unolora.runs import Run
from unolora.tasks.files import one_line


def push_to_hub(folder: Path, name: str, *, private: bool = False) -> str:
    """Upload a run. Names of folders on this machine stay here.

    Args:
        folder: A finished run.
        name: OWNER/NAME of the repository; made if it is not there.
        private: Whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        InputError: The run is not finished, the name is none, or the hub refuses.
    """
    from huggingface_hub import HfApi

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"{name!r} is no name of a repository; give OWNER/NAME")
    with tempfile.TemporaryDirectory() as temporary:
        staged = stage(folder, Path(temporary, "run"))
        try:
            api = HfApi()
            api.create_repo(name, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=name, folder_path=staged, commit_message="Upload a run of unolora"))
        except Exception as error:  # the client raises a dozen unrelated types
            raise InputError(
                f"{name!r} can't be uploaded: {one_line(error)}; log in with `hf auth login`, check name and connection"
            ) from error


def stage(folder: Path, to: Path) -> Path:
    """Copy what is uploaded into a new folder; absolute paths are cut to their last part.

    Raises:
        InputError: The run is not finished.
    """
    settings, adapter = runs.read_settings(folder), folder / "adapter"
    if not adapter.is_dir() or not (folder / "results.json").is_file():
        raise InputError(f"{folder}: the run did not finish, {runs.how_to_go_on(folder)}")
    shutil.copytree(adapter, to)
    shutil.copy(folder / "results.json", to / "results.json")
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    config["data"]["root"] = config["output"] = None
    config["backbone"] = _public(settings.backbone)
    text = yaml.safe_dump(_public(config), sort_keys=False, allow_unicode=True)
    (to / "config.yaml").write_text(text, encoding="utf-8")
    for name in ("tasks.json", "adapter_config.json", "results.json"):
        if (to / name).is_file():
            found = json.loads((to / name).read_text(encoding="utf-8"))
            if name == "adapter_config.json":
                found["base_model_name_or_path"] = _public(settings.backbone)
            (to / name).write_text(json.dumps(_public(found), indent=1) + "\n", encoding="utf-8")
    settings.backbone = _public(settings.backbone)
    results = json.loads((to / "results.json").read_text(encoding="utf-8"))
    card = model_card(settings, runs.read_tasks(to / "tasks.json"), results)
    (to / "README.md").write_text(card, encoding="utf-8")
    return to


def from_pretrained(name: str, backbone: str | None = None) -> Run:
    """Load a run from the hub, by name.

    Args:
        name: OWNER/NAME of a repository that `push_to_hub` wrote.
        backbone: Where its backbone is, if not where the run's settings say.

    Raises:
        InputError: It can't be had, is no run, or the backbone is not the one that it was trained on.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name))
    except Exception as error:  # as above
        raise InputError(f"{name!r} can't be had from the hub: {one_line(error)}; check name and connection") from error
    return runs.load_run(folder, backbone)


def _public(value: Any) -> Any:
    """Cut absolute paths to their last part, wherever they are."""
    if isinstance(value, dict):
        return {key: _public(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_public(each) for each in value]
    if isinstance(value, str) and "\n" not in value and Path(value).is_absolute() and Path(value).exists():
        return Path(value).name
    return value
