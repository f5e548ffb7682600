"""`preset: paper`: settings that a file or a flag starts from, and what is given beside it wins."""

from pathlib import Path

import pytest
import yaml

import tiny
from unolora import settings
from unolora.arguments import train_settings
from unolora.config import UnoLoraConfig
from unolora.errors import InputError

ROOT = Path(__file__).parent.parent


def test_the_paper_s_preset_is_the_paper_s_adapter():
    found = settings.from_dict({"preset": "paper", "tasks": ["rte"]})
    theirs = UnoLoraConfig.paper(["rte"])
    for name in (
        "r",
        "alpha",
        "dropout",
        "target_modules",
        "conditioning",
        "embedding_dim",
        "bottleneck_dim",
        "scale_init",
        "num_positions",
    ):
        assert getattr(found.adapter, name) == getattr(theirs, name), name
    assert found.adapter != settings.Adapter()


def test_the_paper_s_preset_is_its_row_of_table_1():
    row = yaml.safe_load((ROOT / "configs" / "glue-t5-base" / "unolora-star.yaml").read_text(encoding="utf-8"))
    ours = settings.from_dict({"preset": "paper", "backbone": row["backbone"], "tasks": row["tasks"]})
    assert ours == settings.from_dict(row)


def test_what_is_given_wins():
    found = settings.from_dict({"preset": "paper", "tasks": ["rte"], "adapter": {"r": 4}, "training": {"steps": 7}})
    assert (found.adapter.r, found.training.steps) == (4, 7)
    assert (found.adapter.scale_init, found.training.warmup_steps) == ("paper", 1000), "the rest stays the preset's"
    assert settings.PRESETS["paper"]["adapter"]["r"] == 8, "the table stays as it is"


def test_unknown_presets():
    with pytest.raises(InputError, match=r"unknown preset 'papper'; did you mean 'paper'\? \(known: paper\)"):
        settings.from_dict({"preset": "papper", "tasks": ["rte"]})
    with pytest.raises(InputError, match="unknown preset None"):
        settings.from_dict({"preset": None, "tasks": ["rte"]})
    with pytest.raises(InputError, match="unknown setting 'presets'; did you mean 'preset'"):
        settings.from_dict({"presets": "paper", "tasks": ["rte"]})


@pytest.mark.parametrize("where", ["file", "flag", "both"])
def test_presets_on_the_command_line(where, tmp_path):
    given = {"tasks": ["rte"], "training": {"steps": 7}, **({"preset": "paper"} if where != "flag" else {})}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    flags = [] if where == "file" else ["--preset=paper"]
    found, _, _ = train_settings([str(path), *flags, "--adapter.r", "2"])
    assert (found.training.steps, found.adapter.r) == (7, 2), "file and flags win"
    assert (found.adapter.scale_init, found.training.evaluate_every, found.scoring) == ("paper", 29_535, "generation")
    plain, _, _ = train_settings([str(path), "--adapter.r", "2"])
    assert (plain.adapter.scale_init == "paper") == (where != "flag")


@pytest.mark.parametrize("flags", [["--preset", "papr"], ["--preset=papr"]])
def test_unknown_presets_on_the_command_line(flags, tmp_path):
    path = tiny.write_yaml(tmp_path / "mine.yaml")
    with pytest.raises(InputError, match="unknown preset 'papr'; did you mean 'paper'"):
        train_settings([str(path), *flags])
