"""The settings: what they refuse, and that they survive a file."""

import json
import math

import pytest
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from conftest import TASKS, settings
from unolora import InputError, UnoLoraConfig
from unolora.config import check_adapter


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"r": 0}, "`r` must be a whole number of at least 1, got 0"),
        ({"r": 8.0}, r"`r` must be a whole number of at least 1, got 8\.0"),
        ({"r": True}, "`r` must be a whole number"),
        ({"r": None}, "`r` must be a whole number"),
        ({"embedding_dim": -1}, "`embedding_dim` must be"),
        ({"bottleneck_dim": "16"}, "`bottleneck_dim` must be .* got '16'"),
        ({"sample_dim": 0}, "`sample_dim` must be"),
        ({"num_positions": 0}, "`num_positions` must be"),
        ({"alpha": 0}, "`alpha` must be a positive number, got 0"),
        ({"alpha": -1.0}, "`alpha` must be"),
        ({"alpha": math.nan}, "`alpha` must be .* got nan"),
        ({"alpha": math.inf}, "`alpha` must be"),
        ({"alpha": "16"}, "`alpha` must be"),
        ({"dropout": 1.0}, r"`dropout` must be at least 0 and below 1, got 1\.0"),
        ({"dropout": -0.1}, "`dropout` must be"),
        ({"dropout": math.nan}, "`dropout` must be"),
        ({"conditioning": "tasks"}, "unknown conditioning 'tasks'; did you mean 'task'"),
        ({"conditioning": "sample"}, r"unknown conditioning 'sample'.*known: none, task, task\+sample"),
        ({"scale_init": "ones"}, "unknown scale_init 'ones'; did you mean 'one'"),
        ({"tasks": "sort"}, "`tasks` must be a list of names, got 'sort'"),
        ({"tasks": ["sort", 1]}, "`tasks` must be a list of names"),
        ({"tasks": ["sort", ""]}, "`tasks` must be a list of names"),
        ({"tasks": ["sort", "rank", "sort"]}, "`tasks` names 'sort' more than once"),
        ({"tasks": []}, r"conditioning 'task\+sample' needs `tasks`"),
        ({"tasks": [], "conditioning": "task"}, "conditioning 'task' needs `tasks`"),
        ({"layers_to_transform": [0], "target_modules": ".*q"}, "`layers_to_transform` goes with a list"),
        ({"modules_to_save": "classifier"}, "`modules_to_save` must be a list of names, got 'classifier'"),
    ],
)
def test_nonsense_is_refused(wrong, message):
    settings()  # the rest of it is sound
    with pytest.raises(InputError, match=message) as caught:
        settings(**wrong)
    assert "\n" not in str(caught.value)


def test_unknown_setting_is_refused():
    with pytest.raises(TypeError, match="rank"):
        settings(rank=8)


def test_plain_unolora_needs_no_tasks():
    assert UnoLoraConfig(conditioning="none").tasks == []


def test_defaults_are_the_papers_sizes_with_the_better_start():
    config = UnoLoraConfig(tasks=TASKS)
    assert (config.r, config.alpha, config.embedding_dim, config.bottleneck_dim) == (8, 16, 8, 16)
    assert (config.conditioning, config.scale_init, config.num_positions) == ("task+sample", "one", None)
    assert config.dropout == 0


def test_the_papers_preset():
    config = UnoLoraConfig.paper(TASKS)
    assert (config.scale_init, config.num_positions, config.dropout) == ("paper", 48, 0.1)
    assert (config.tasks, config.target_modules) == (TASKS, "query-value")
    assert UnoLoraConfig.paper(TASKS, num_positions=None, r=4).r == 4
    assert UnoLoraConfig.paper(TASKS, num_positions=None).num_positions is None


def test_callers_list_is_copied():
    tasks = list(TASKS)
    config = UnoLoraConfig(tasks=tasks)
    tasks.append("late")
    assert config.tasks == TASKS


def test_peft_knows_the_method():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["UNOLORA"] is UnoLoraConfig
    assert settings().peft_type == "UNOLORA"


def test_settings_survive_a_file(tmp_path):
    config = settings(
        r=3,
        alpha=5.5,
        dropout=0.2,
        conditioning="task",
        embedding_dim=4,
        bottleneck_dim=6,
        sample_dim=9,
        num_positions=2,
        scale_init="paper",
        target_modules=["q", "v"],
        exclude_modules=["x"],
        layers_to_transform=[0, 1],
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    assert written["tasks"] == TASKS
    assert written["peft_type"] == "UNOLORA"
    for loaded in (UnoLoraConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert type(loaded) is UnoLoraConfig
        assert loaded.to_dict() == config.to_dict()


def test_settings_alone_in_a_folder_can_be_read(tmp_path):
    settings(r=3).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
    assert UnoLoraConfig.from_pretrained(str(tmp_path)).r == 3


def test_settings_in_a_subfolder_can_be_read(tmp_path):
    settings(r=3).save_pretrained(tmp_path / "inner")
    assert UnoLoraConfig.from_pretrained(str(tmp_path), subfolder="inner").r == 3


def test_nonsense_in_a_file_is_refused(tmp_path):
    settings().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "alpha": -1}), "utf-8")
    with pytest.raises(InputError, match="`alpha` must be a positive number, got -1"):
        UnoLoraConfig.from_pretrained(str(tmp_path))


def test_check_adapter_takes_anything_with_the_fields():
    class Settings:
        r, alpha, dropout, embedding_dim, bottleneck_dim = 8, 16, 0.0, 8, 16
        sample_dim = num_positions = None
        conditioning, scale_init = "task", "one"
        use_rslora = scale_gate = shared_scale_map = mask_padding = True

    check_adapter(Settings())
    Settings.r = -3
    with pytest.raises(InputError, match=r"`r` must be .* got -3"):
        check_adapter(Settings())
