"""Saving and loading: nothing is lost, and what does not fit is refused with the file, what was expected and found."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from conftest import (
    CONDITIONINGS,
    MIXED,
    TASKS,
    adapted,
    adapter_weights,
    apart,
    backbone,
    batch,
    output,
    same_weights,
    settings,
    wake,
)
from unolora import CheckpointError, InputError, UnoLoraConfig

FILE = "adapter_model.safetensors"
GIVEN = pytest.mark.parametrize("conditioning", CONDITIONINGS)


def saved(folder: Path, conditioning: str = "task+sample", **more) -> Path:
    """A folder with a BERT adapter; the file is there and holds what it should."""
    model = adapted("bert", conditioning, **more)
    model.save_pretrained(folder)
    state = load_file(folder / FILE)
    assert any(key.endswith("uno_A") for key in state)
    assert any("uno_hypernetwork" in key for key in state) == (conditioning != "none")
    return folder


def bert(**more) -> UnoLoraConfig:
    return settings(**{"task_type": "SEQ_CLS", **more})


# Three ways into a checkpoint; each must check


def by_folder(folder: Path, config: UnoLoraConfig) -> None:
    """The folder's own settings are what the test says: `from_pretrained` reads them."""
    written = {**json.loads((folder / "adapter_config.json").read_text("utf-8")), **_listed(config.to_dict())}
    (folder / "adapter_config.json").write_text(json.dumps(written), "utf-8")
    PeftModel.from_pretrained(backbone("bert"), folder)


def by_config(folder: Path, config: UnoLoraConfig) -> None:
    PeftModel.from_pretrained(backbone("bert"), folder, config=config)


def onto_existing(folder: Path, config: UnoLoraConfig) -> None:
    """Weights that are there stay as they are when the load fails."""
    model = wake(get_peft_model(backbone("bert"), config)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        model.load_adapter(folder, "default")
    finally:
        assert same_weights(model, before)


def _listed(settings: dict) -> dict:
    return {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}


WAYS = pytest.mark.parametrize("load", [by_folder, by_config, onto_existing])


# What fits


@GIVEN
def test_each_way_loads_what_fits(tmp_path, conditioning):
    saved(tmp_path, conditioning)
    inputs = batch("bert")
    expected = output(adapted("bert", conditioning), **inputs, tasks=MIXED)
    loaded = PeftModel.from_pretrained(backbone("bert"), tmp_path)
    assert torch.equal(output(loaded, **inputs, tasks=MIXED), expected)
    loaded = PeftModel.from_pretrained(backbone("bert"), tmp_path, config=bert(conditioning=conditioning))
    assert torch.equal(output(loaded, **inputs, tasks=MIXED), expected)
    existing = get_peft_model(backbone("bert"), bert(conditioning=conditioning)).eval()
    assert apart(output(existing, **inputs, tasks=MIXED), expected) > 1e-3
    existing.load_adapter(tmp_path, "default")
    assert torch.equal(output(existing, **inputs, tasks=MIXED), expected)


@GIVEN
@pytest.mark.parametrize("name", ["other", "query", "layer", "0", "a", "uno", "rows", "bottleneck", "model"])
def test_loaded_under_another_name_it_is_the_same(tmp_path, name, conditioning):
    saved(tmp_path, conditioning)
    loaded = PeftModel.from_pretrained(backbone("bert"), tmp_path, adapter_name=name)
    assert list(loaded.peft_config) == [name]
    inputs = batch("bert")
    assert torch.equal(
        output(loaded, **inputs, tasks=MIXED), output(adapted("bert", conditioning), **inputs, tasks=MIXED)
    )
    if conditioning != "none":
        ours, theirs = (
            model.uno_hypernetwork[key].state_dict()
            for model, key in ((loaded, name), (adapted("bert", conditioning), "default"))
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@GIVEN
@pytest.mark.parametrize("name", ["query", "layer", "0", "weight", "model", "defaul", "default2", "uno_A", "bias"])
def test_two_adapters_one_called_as_a_part_of_the_model(tmp_path, name, conditioning):
    """PEFT tells adapters apart by a name anywhere in a key."""
    model, inputs = adapted("bert", conditioning, task_type="FEATURE_EXTRACTION"), batch("bert", "FEATURE_EXTRACTION")
    model.add_adapter(name, settings("task", tasks=["x", "y"], r=3, task_type="FEATURE_EXTRACTION"))
    wake(model).eval()
    expected = {"default": output(model, **inputs, tasks=MIXED)}
    model.set_adapter(name)
    expected[name] = output(model, **inputs, tasks="y")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(backbone("bert", "FEATURE_EXTRACTION"), tmp_path)
    assert torch.equal(output(loaded, **inputs, tasks=MIXED), expected["default"])
    loaded.load_adapter(tmp_path / name, name)
    loaded.set_adapter(name)
    assert torch.equal(output(loaded, **inputs, tasks="y"), expected[name])
    loaded.set_adapter("default")
    assert torch.equal(output(loaded, **inputs, tasks=MIXED), expected["default"])
    again = PeftModel.from_pretrained(backbone("bert", "FEATURE_EXTRACTION"), tmp_path / name, adapter_name="z")
    assert torch.equal(output(again, **inputs, tasks="y"), expected[name])


def test_a_state_that_is_handed_over_is_what_is_saved(tmp_path):
    """As accelerate does, which gathers it from other processes."""
    model = adapted("bert")
    state = {
        name: value * 2 if ".uno_" in name and value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = PeftModel.from_pretrained(backbone("bert"), tmp_path)
    assert same_weights(loaded, {name: value for name, value in state.items() if ".uno_" in name})
    assert not same_weights(loaded, adapter_weights(model))


def test_auto_class_finds_the_backbone(tmp_path):
    backbone("bert").save_pretrained(tmp_path / "backbone")
    bare = type(backbone("bert")).from_pretrained(tmp_path / "backbone")
    model = wake(get_peft_model(bare, bert())).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    inputs = batch("bert")
    assert torch.equal(output(loaded, **inputs, tasks=MIXED), output(model, **inputs, tasks=MIXED))


def test_selected_adapters_and_subfolders(tmp_path):
    model = adapted("bert")
    model.add_adapter("second", bert(r=2))
    wake(model)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert not (tmp_path / FILE).exists()
    loaded = PeftModel.from_pretrained(backbone("bert"), tmp_path, subfolder="second")
    assert loaded.peft_config["default"].r == 2
    (tmp_path / "second" / FILE).write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"second.*not a safetensors file"):
        PeftModel.from_pretrained(backbone("bert"), tmp_path, subfolder="second")


def test_saved_keys_have_neither_the_adapters_name_nor_the_backbone(tmp_path):
    for conditioning in CONDITIONINGS:
        model = get_peft_model(backbone("bert", "FEATURE_EXTRACTION"), settings(conditioning), adapter_name="my_name")
        model.save_pretrained(tmp_path)
        state = load_file(tmp_path / "my_name" / FILE)
        assert len(state) == len(adapter_weights(model))
        assert all(".uno_" in key for key in state)
        assert not any("my_name" in key or "base_layer" in key or "lora_" in key for key in state)


def test_training_goes_on_after_loading(tmp_path):
    saved(tmp_path)
    frozen = PeftModel.from_pretrained(backbone("bert"), tmp_path)
    assert not any(p.requires_grad for n, p in frozen.named_parameters() if ".uno_" in n)
    trainable = PeftModel.from_pretrained(backbone("bert"), tmp_path, is_trainable=True)
    assert all(p.requires_grad for n, p in trainable.named_parameters() if ".uno_" in n)
    trainable(**batch("bert"), tasks=MIXED).loss.backward()
    second = PeftModel.from_pretrained(backbone("bert"), tmp_path)
    second.load_adapter(tmp_path, "more", is_trainable=True)
    assert all(p.requires_grad for n, p in second.named_parameters() if ".uno_" in n and ".more" in n)
    assert not any(p.requires_grad for n, p in second.named_parameters() if ".uno_" in n and ".default" in n)


def test_settings_are_read_by_peft(tmp_path):
    saved(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is UnoLoraConfig
    assert config.tasks == TASKS
    assert config.inference_mode is True


def test_resized_embeddings_travel_along(tmp_path):
    model = adapted("gpt2")
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("wte" in key for key in load_file(tmp_path / FILE))
    inputs = batch("gpt2")
    loaded = PeftModel.from_pretrained(backbone("gpt2", seed=0), tmp_path)
    assert torch.equal(output(loaded, **inputs, tasks=MIXED), output(model, **inputs, tasks=MIXED))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_survive(tmp_path, dtype):
    model = get_peft_model(backbone("bert").to(dtype), bert(), autocast_adapter_dtype=False)
    wake(model).eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(backbone("bert").to(dtype), tmp_path, autocast_adapter_dtype=False)
    assert same_weights(loaded, adapter_weights(model))
    inputs = batch("bert")
    assert torch.equal(output(loaded, **inputs, tasks=MIXED), output(model, **inputs, tasks=MIXED))


# What does not fit


@WAYS
@pytest.mark.parametrize("conditioning", ["task", "task+sample"])
@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["rank", "sort", "name"], "expected 3 with 'rank' at row 0, found 3 with 'sort' at row 0"),
        (["sort", "rank", "nome"], "expected 3 with 'nome' at row 2, found 3 with 'name' at row 2"),
        (["sort", "rank"], "expected 2, found 3 with 'name' at row 2"),
        (["sort", "rank", "name", "late"], "expected 4 with 'late' at row 3, found 3"),
    ],
)
def test_other_tasks_are_refused(tmp_path, load, conditioning, tasks, message):
    saved(tmp_path, conditioning)
    with pytest.raises(CheckpointError, match=f"{FILE}: other tasks: {message}; give the same tasks") as caught:
        load(tmp_path, bert(conditioning=conditioning, tasks=tasks))
    assert str(tmp_path / FILE) in str(caught.value)


@WAYS
@GIVEN
@pytest.mark.parametrize("targets", [["query"], ["query", "key"], ["query", "value", "key"]])
def test_other_targets_are_refused(tmp_path, load, conditioning, targets):
    saved(tmp_path, conditioning)
    with pytest.raises(CheckpointError, match=r"other (targets|positions).*expected .*found .*") as caught:
        load(tmp_path, bert(conditioning=conditioning, target_modules=targets))
    assert str(tmp_path / FILE) in str(caught.value)


@WAYS
@pytest.mark.parametrize("expected", CONDITIONINGS)
@pytest.mark.parametrize("found", CONDITIONINGS)
def test_another_conditioning_is_refused(tmp_path, load, expected, found):
    saved(tmp_path, found)
    if expected == found:
        load(tmp_path, bert(conditioning=expected)) if load is not onto_existing else None
        return
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, bert(conditioning=expected))
    assert f"{tmp_path / FILE}: another conditioning: expected {expected}, found {found};" in str(caught.value)


@WAYS
@GIVEN
def test_another_rank_is_refused(tmp_path, load, conditioning):
    saved(tmp_path, conditioning)
    message = rf"{FILE}: another rank of .*uno_A.*: expected \[4, 48\], found \[8, 48\]"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, bert(conditioning=conditioning, r=4))


@WAYS
@pytest.mark.parametrize("wrong", [{"embedding_dim": 4}, {"bottleneck_dim": 5}, {"num_positions": 1}])
def test_another_hypernetwork_is_refused(tmp_path, load, wrong):
    saved(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{FILE}: another width of .*uno_hypernetwork.*: expected .*found"):
        load(tmp_path, bert(**wrong))


@GIVEN
def test_another_backbones_width_is_refused(tmp_path, conditioning):
    saved(tmp_path, conditioning)
    message = rf"{FILE}: another width of .*uno_B.*: expected \[48, 8\], found \[32, 8\]"
    with pytest.raises(CheckpointError, match=message):
        PeftModel.from_pretrained(backbone("bert", hidden_size=48), tmp_path)


def test_another_backbones_depth_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(CheckpointError, match=r"other positions: expected 3 with .*layer\.2.*at row 2, found 2;"):
        PeftModel.from_pretrained(backbone("bert", num_hidden_layers=3), tmp_path)


def test_modules_to_save_that_the_file_does_not_have(tmp_path):
    saved(tmp_path)
    for load in (by_config, onto_existing):
        with pytest.raises(CheckpointError, match=rf"{FILE}: other modules_to_save: expected .*pooler.*, found none"):
            load(tmp_path, bert(modules_to_save=["pooler"]))


def test_modules_to_save_that_the_settings_do_not_have(tmp_path):
    saved(tmp_path, modules_to_save=["pooler"])
    for load in (by_config, onto_existing):
        with pytest.raises(CheckpointError, match=rf"{FILE}: other targets or modules_to_save.*found .*pooler"):
            load(tmp_path, bert())


def test_checks_see_their_own_adapter_only(tmp_path):
    """`default` is a part of `default2`, and a fit for one says nothing about the other."""
    saved(tmp_path / "first")
    saved(tmp_path / "second", tasks=["x", "y", "z"], target_modules=["key"], r=2)
    model = PeftModel.from_pretrained(backbone("bert"), tmp_path / "second", adapter_name="default2")
    model.load_adapter(tmp_path / "first", "default")
    model.load_adapter(tmp_path / "first", "default")
    model.load_adapter(tmp_path / "second", "default2")
    with pytest.raises(CheckpointError, match=r"second/adapter_model.safetensors: other tasks"):
        model.load_adapter(tmp_path / "second", "default")
    model.set_adapter("default")
    inputs = batch("bert")
    assert torch.equal(output(model, **inputs, tasks=MIXED), output(adapted("bert"), **inputs, tasks=MIXED))


# Broken files


def cut(file: Path, keep: float | int) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])


@WAYS
@pytest.mark.parametrize("keep", [0, 5, 8, 50, 0.3, 0.6, 0.99, -1])
def test_truncated_file_is_refused(tmp_path, load, keep):
    saved(tmp_path)
    size = (tmp_path / FILE).stat().st_size
    cut(tmp_path / FILE, keep)
    left = (tmp_path / FILE).stat().st_size
    assert left < size
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, bert())
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / FILE}: ")
    assert str(left) in message
    assert "truncated or damaged: expected" in message or "not a safetensors file" in message
    if left > 0.5 * size:
        assert f"truncated or damaged: expected {size} bytes, found {left}" in message
    assert "\n" not in message


@WAYS
@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 a zip archive, as torch.save writes", b"\xff" * 64, b"{}" * 40, b"\x00" * 99]
)
def test_a_file_that_is_not_safetensors_is_refused(tmp_path, load, content):
    saved(tmp_path)
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(
        CheckpointError, match=rf"{FILE}: (not a safetensors file \({len(content)} bytes\)|truncated or damaged)"
    ):
        load(tmp_path, bert())


@WAYS
def test_a_changed_header_is_refused(tmp_path, load):
    saved(tmp_path)
    content = bytearray((tmp_path / FILE).read_bytes())
    content[8:12] = b"!!!!"
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{FILE}: .*damaged"):
        load(tmp_path, bert())


@WAYS
def test_a_pickle_is_not_read(tmp_path, load):
    saved(tmp_path)
    (tmp_path / FILE).unlink()
    torch.save({"x": torch.ones(1)}, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=f"{FILE}: no such file"):
        load(tmp_path, bert())


@WAYS
def test_missing_file_is_named(tmp_path, load):
    saved(tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, bert())
    assert f"{tmp_path / FILE}: no such file" in str(caught.value)


def lora(folder: Path) -> Path:
    model = get_peft_model(backbone("bert"), LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    model.save_pretrained(folder)
    return folder


@WAYS
def test_another_methods_file_is_refused(tmp_path, load):
    saved(tmp_path / "ours")
    shutil.copy(lora(tmp_path / "lora") / FILE, tmp_path / "ours" / FILE)
    with pytest.raises(
        CheckpointError, match=rf"{FILE}: expected UnoLoRA's tensors \(uno_A, uno_B\), found \d+ others"
    ):
        load(tmp_path / "ours", bert())


@pytest.mark.parametrize("load", [by_config, onto_existing])
def test_another_methods_folder_is_refused(tmp_path, load):
    with pytest.raises(CheckpointError, match=r"(expected UnoLoRA's tensors|another conditioning|other targets).*"):
        load(lora(tmp_path), bert())


def test_other_methods_are_read_as_before(tmp_path):
    inputs = batch("bert")
    model = PeftModel.from_pretrained(backbone("bert"), lora(tmp_path))
    assert torch.equal(output(model, **inputs), output(backbone("bert"), **inputs))
    cut(tmp_path / FILE, 0.5)
    with pytest.raises(Exception, match="header") as caught:  # as safetensors says it
        PeftModel.from_pretrained(backbone("bert"), tmp_path)
    assert not isinstance(caught.value, InputError)


# After a failure


@pytest.mark.parametrize("keep", [0.5, -1])
def test_a_broken_file_leaves_the_backbone_alone(tmp_path, keep):
    saved(tmp_path)
    cut(tmp_path / FILE, keep)
    model, inputs = backbone("bert"), batch("bert")
    names, expected = list(model.state_dict()), output(model, **inputs)
    with pytest.raises(CheckpointError):
        PeftModel.from_pretrained(model, tmp_path)
    assert list(model.state_dict()) == names
    assert torch.equal(output(model, **inputs), expected)


@pytest.mark.parametrize(
    "first", [{"tasks": ["x", "y", "z"]}, {"r": 2}, {"target_modules": ["key"]}, {"conditioning": "task"}]
)
def test_loading_works_on_the_same_backbone_after_a_failure(tmp_path, first):
    saved(tmp_path)
    model, inputs = backbone("bert"), batch("bert")
    weights = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(CheckpointError):
        PeftModel.from_pretrained(model, tmp_path, config=bert(**first))
    now = {
        name.replace(".base_layer", "").replace(".original_module", ""): value
        for name, value in model.named_parameters()
    }
    assert all(torch.equal(now[name], value) for name, value in weights.items())
    with pytest.warns(UserWarning, match="was adapted before; those adapters are taken out"):
        loaded = PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(output(loaded, **inputs, tasks=MIXED), output(adapted("bert"), **inputs, tasks=MIXED))


def test_a_failed_load_leaves_the_other_adapters_alone(tmp_path):
    saved(tmp_path, tasks=["x", "y", "z"])
    model, inputs = adapted("bert"), batch("bert")
    expected, before = output(model, **inputs, tasks=MIXED), {k: v.clone() for k, v in model.state_dict().items()}
    for load in (lambda: model.load_adapter(tmp_path, "default"), lambda: broken(tmp_path, model)):
        with pytest.raises(CheckpointError):
            load()
        assert same_weights(model, before)
        assert torch.equal(output(model, **inputs, tasks=MIXED), expected)
    assert list(model.peft_config) == ["default"]


def broken(folder: Path, model: PeftModel) -> None:
    copied = folder / "copy"
    copied.mkdir()
    for name in (FILE, "adapter_config.json"):
        shutil.copy(folder / name, copied / name)
    cut(copied / FILE, 0.7)
    model.load_adapter(copied, "second")


def test_a_copy_of_the_settings_is_not_changed_by_saving(tmp_path):
    model = adapted("bert")
    before = copy.deepcopy(model.peft_config["default"].to_dict())
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].to_dict() == before


def test_saved_bytes_are_the_same_twice(tmp_path):
    for name in ("a", "b"):
        saved(tmp_path / name)
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


def test_tensors_written_by_hand_are_checked_too(tmp_path):
    """A file with one tensor less, or one more."""
    saved(tmp_path)
    state = load_file(tmp_path / FILE)
    for wrong in (
        {k: v for k, v in state.items() if "scale_bias" not in k},
        {**state, "base_model.model.bert.extra": torch.ones(1)},
    ):
        save_file(wrong, tmp_path / FILE)
        with pytest.raises(CheckpointError, match=r"other targets or modules_to_save: .*(scale_bias|found .*extra)"):
            PeftModel.from_pretrained(backbone("bert"), tmp_path)
