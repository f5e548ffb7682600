"""Plain LoRAs, one a task, as the start of one adapter."""

import json

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model

import tiny
import tiny_text
import unolora_cli
from conftest import apart, backbone, batch, output, settings, wake
from unolora.errors import InputError
from unolora.export import as_lora, task_scale, write_lora
from unolora.importing import import_folder, import_loras, joint


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


# --- the command -----------------------------------------------------------------------------------------------------


def loras(folder, path, kind=tf.AutoModel, ranks=(1, 3), **more):
    """Random plain LoRAs on a backbone of a folder, and what each says."""
    found = []
    for seed, r in enumerate(ranks):
        torch.manual_seed(seed)
        lora = get_peft_model(kind.from_pretrained(path), LoraConfig(r=r, init_lora_weights=False, **more))
        lora.save_pretrained(folder / f"lora-{seed}")
        found.append(folder / f"lora-{seed}")
    return found


@pytest.mark.parametrize(
    ("family", "kind", "said"),
    [
        ("bert", tf.AutoModel, None),
        ("t5", tf.AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
        ("t5", tf.AutoModelForSeq2SeqLM, None),
        ("llama", tf.AutoModelForCausalLM, None),
    ],
)
def test_the_command_writes_an_adapter_to_go_on_from(family, kind, said, tmp_path, capsys):
    path = tiny.backbone() if family == "bert" else tiny_text.backbone(family)
    folders = loras(tmp_path, path, kind, task_type=said)
    out = tmp_path / "uno"
    given = ["import", *map(str, folders), "--output", str(out), "--tasks", "one", "two", "--r", "4"]
    assert unolora_cli.main(given) == 0
    printed = capsys.readouterr().out
    assert f"one  {folders[0]}  100.0 % kept\n" in printed
    assert json.loads((out / "kept.json").read_text()) == pytest.approx({"one": 1, "two": 1}, abs=1e-3)
    model = PeftModel.from_pretrained(kind.from_pretrained(path), out, is_trainable=True)
    assert any(parameter.requires_grad for parameter in model.parameters())
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    if family == "t5":
        inputs["decoder_input_ids"] = torch.tensor([[0, 9]])
    for folder, task in zip(folders, ("one", "two"), strict=True):
        plain = PeftModel.from_pretrained(kind.from_pretrained(path), folder).eval()
        wanted = output(plain, **inputs)
        assert apart(wanted, output(kind.from_pretrained(path).eval(), **inputs)) > 0.01
        assert apart(output(model.eval(), **inputs, tasks=task), wanted) < 0.02 * wanted.abs().max()
    readme = (out / "README.md").read_text()
    host = kind.__name__ if said else type(kind.from_pretrained(path)).__name__
    assert f"import {host}\n" in readme
    assert f"{host}.from_pretrained({str(path)!r})" in readme
    assert "one 100.0 %, two 100.0 %" in readme
    assert tiny.leftovers(tmp_path) == []


def test_a_lower_rank_says_what_it_loses(tmp_path):
    folders = loras(tmp_path, tiny.backbone(), ranks=(2, 2))
    kept = import_folder(folders, tmp_path / "uno")
    assert list(kept) == ["lora-0", "lora-1"]
    assert 0.1 < min(kept.values()) < 0.95
    assert f"lora-0 {100 * kept['lora-0']:.1f} %" in (tmp_path / "uno" / "README.md").read_text()


def test_loras_that_cannot_be_imported(tmp_path, capsys):
    folders, out = loras(tmp_path, tiny.backbone(), ranks=(2, 2)), tmp_path / "uno"
    (other,) = loras(tmp_path / "other", tiny_text.backbone("llama"), tf.AutoModelForCausalLM, ranks=(2,))
    full = tmp_path / "full"
    full.mkdir()
    (full / "note.txt").write_text("mine")
    for call, message in (
        (lambda: import_folder([folders[0], other], out), "as their backbone; say which is to be used"),
        (lambda: import_folder([folders[0], other], out, backbone=str(tiny.backbone())), "adapts other projections"),
        (
            lambda: import_folder(folders, out, backbone=str(tiny_text.backbone("llama"))),
            r"has no projection called .*; name the one that they were trained on",
        ),
        (lambda: import_folder(folders[:1], out), "give two folders or more"),
        (lambda: import_folder(folders, out, names=["one"]), "a name for each, got 2 and 1"),
        (lambda: import_folder(folders, out, r=0), "`r` must be a whole number of at least 1, got 0"),
        (lambda: import_folder(folders, full), "is there already; choose another output"),
        (lambda: import_folder([tmp_path, *folders], out), "expected adapter_config.json and"),
    ):
        with pytest.raises(InputError, match=message):
            call()
        assert not out.exists()
    assert unolora_cli.main(["import", str(folders[0]), "--output", str(out)]) == 2
    assert "give two folders or more" in capsys.readouterr().err
    assert tiny.leftovers(tmp_path) == []
