"""Plain LoRAs, one a task, as the start of one adapter."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from conftest import apart, backbone, batch, output, settings, wake
from unolora.errors import InputError
from unolora.export import as_lora, task_scale, write_lora
from unolora.importing import import_loras, joint


def test_a_joint_pair_is_found_where_there_is_one():
    generator = torch.Generator().manual_seed(0)
    A, B, s = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 12), (10, 3), (4, 3)))
    updates = [(A, B * each) for each in s]
    found = joint(updates, 3)
    assert found[3].min() > 1 - 1e-6
    for (A_t, B_t), scale in zip(updates, found[2], strict=True):
        assert apart((found[1] * scale) @ found[0], B_t @ A_t) < 1e-2
    assert joint(updates, 2)[3].min() < 0.99, "a lower rank can't keep all"
    others = [tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 12), (10, 2)))
              for _ in range(2)]  # fmt: skip
    assert joint(others, 2)[3].max() < 0.95, "what has nothing in common is not kept whole"
    assert joint(others, 4)[3].min() > 1 - 1e-6, "in the sum of the ranks it is"


def test_what_was_exported_comes_back(tmp_path):
    old = wake(get_peft_model(backbone("bert"), settings("task", r=2))).eval()
    inputs = batch("bert")
    for task in ("sort", "rank", "name"):
        write_lora(*as_lora(old, task_scale(old, task)), tmp_path / task)
    folders = [tmp_path / task for task in ("sort", "rank", "name")]
    model, kept = import_loras(backbone("bert"), folders)
    model.eval()
    assert list(kept) == ["sort", "rank", "name"]
    assert min(kept.values()) > 0.999
    for task in kept:
        wanted = output(old, **inputs, tasks=task)
        assert apart(wanted, output(backbone("bert"), **inputs)) > 0.01, "the adapter does something"
        assert apart(output(model, **inputs, tasks=task), wanted) < 0.02
    model.save_pretrained(tmp_path / "uno")
    again = PeftModel.from_pretrained(backbone("bert"), tmp_path / "uno").eval()
    assert torch.equal(output(again, **inputs, tasks="rank"), output(model, **inputs, tasks="rank"))


def test_loras_of_different_ranks_with_nothing_in_common(tmp_path):
    inputs, wanted = batch("bert"), {}
    for seed, (name, r) in enumerate({"one": 1, "two": 3}.items()):
        torch.manual_seed(seed)
        lora = get_peft_model(backbone("bert"), LoraConfig(r=r, lora_alpha=r, init_lora_weights=False)).eval()
        lora.save_pretrained(tmp_path / name)
        wanted[name] = output(lora, **inputs)
    folders = [tmp_path / "one", tmp_path / "two"]
    less, kept = import_loras(backbone("bert"), folders, names=["first", "second"])
    assert 0 < min(kept.values()) < 0.999
    model, kept = import_loras(backbone("bert"), folders, r=4)
    assert min(kept.values()) > 0.999
    assert apart(output(model.eval(), **inputs, tasks="two"), wanted["two"]) < 0.02
    assert less.peft_config["default"].tasks == ["first", "second"]


def test_folders_that_are_no_plain_loras(tmp_path):
    get_peft_model(backbone("bert"), LoraConfig(r=2)).save_pretrained(tmp_path / "lora")
    get_peft_model(backbone("bert"), LoraConfig(r=2, target_modules=["key"])).save_pretrained(tmp_path / "other")
    get_peft_model(backbone("bert"), settings("task")).save_pretrained(tmp_path / "uno")
    for name, message in (
        ("no", "expected adapter_config.json and adapter_model.safetensors"),
        ("uno", "expected a plain LoRA of one rank.*found UnoLoraConfig"),
        ("other", "adapts other projections than .*lora, such as"),
    ):
        with pytest.raises(InputError, match=message):
            import_loras(backbone("bert"), [tmp_path / "lora", tmp_path / name])
    with pytest.raises(InputError, match="give two folders or more"):
        import_loras(backbone("bert"), [tmp_path / "lora"])
