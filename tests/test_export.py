"""One task as plain LoRA files or a merged backbone, used without the library."""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import tiny
import tiny_text
import unolora_cli
from conftest import FAMILIES, TASKS, apart, backbone, batch, output, scales_of, settings, wake
from unolora import onnx_graph, runs, scoring, training
from unolora.errors import InputError
from unolora.export import Exported, as_lora, export, export_all, task_scale, write_lora
from unolora.static_scale import _answers, _distances, _Static, distilled_scale, mean_scale

WITHOUT = """
import sys, warnings
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("unolora", "unolora_cli"):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
try:
    import unolora
    raise SystemExit("not blocked")
except ImportError as error:
    assert "blocked" in str(error)
"""


def without_the_library(code: str, folder: Path, *arguments) -> str:
    """Run Python code in a process that can't import `unolora`; returns what it prints."""
    command = [sys.executable, "-c", WITHOUT + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def trained(conditioning: str, family: str = "bert") -> Path:
    """A run whose scales tell tasks and samples apart: what three steps leave of a random start, on a larger B."""
    folder = tiny.folder() / "run"
    changes = {"adapter": {"conditioning": conditioning, "dropout": 0.0}, "training": {"steps": 3}}
    spelled = tiny.settings(folder, **changes) if family == "bert" else tiny_text.settings(folder, family, **changes)
    training.train(spelled)
    weights = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    generator = torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        if "uno_B" in name:
            tensors[name] = torch.randn(value.shape, generator=generator) * 0.2
        elif "bottleneck.0.weight" in name:  # random embeddings are small
            tensors[name] = value * 10
    save_file(tensors, weights)
    run = runs.load_run(folder)
    rows = {row: scoring.read_split(run, row, "validation") for row in range(3)}
    if conditioning != "none":
        scales = [mean_scale(run, row, rows[row]) for row in range(3)]
        assert min(apart(scales[0], scales[1]), apart(scales[1], scales[2])) > 0.1, "tasks differ"
    if conditioning == "task+sample":
        single = mean_scale(run, 0, type(rows[0])({k: v[:1] for k, v in rows[0].inputs.items()}, rows[0].targets[:1]))
        assert apart(single, scales[0]) > 1e-3, "samples differ"
    return folder


TEXTS = [("the good cat was glad",), ("a dull sad day",), ("we saw the oak then it was poor",)]


# --- any model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", ["none", "task"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_adapter_is_the_adapter(family, conditioning, tmp_path):
    model = wake(get_peft_model(backbone(family), settings(conditioning))).eval()
    inputs = batch(family)
    with torch.no_grad():
        bare = output(backbone(family), **inputs)
        for task in TASKS[:2]:
            scale = task_scale(model, task)
            if conditioning == "none":
                assert scale is None
            else:
                assert apart(scale, scales_of(model, [task] * 3, **inputs)[0]) < 1e-5, "whatever the batch"
            write_lora(*as_lora(model, scale), tmp_path / task)
            plain = PeftModel.from_pretrained(backbone(family), tmp_path / task).eval()
            assert type(plain.peft_config["default"]) is LoraConfig
            wanted = output(model, **inputs, tasks=task)
            assert apart(wanted, bare) > 1e-3, "the adapter does something"
            assert apart(output(plain, **inputs), wanted) <= 1e-5 * max(1, wanted.abs().max().item())
        if conditioning == "task":
            assert apart(task_scale(model, TASKS[0]), task_scale(model, TASKS[1])) > 0.1, "tasks differ"
            others = output(model, **inputs, tasks=TASKS[0])
            assert apart(others, wanted) > 1e-3


def test_a_scale_of_samples_is_not_a_tasks():
    model = get_peft_model(backbone("bert"), settings("task+sample"))
    with pytest.raises(InputError, match="depends on the sample; export the mean"):
        task_scale(model, "sort")
    model = get_peft_model(backbone("bert"), settings("task"))
    with pytest.raises(InputError, match="unknown task 'sor'; did you mean 'sort'"):
        task_scale(model, "sor")


def test_targets_are_named_in_full_where_others_end_alike():
    every = get_peft_model(backbone("bert"), settings("task", target_modules="query-value"))
    assert as_lora(every, None)[0].target_modules == {"query", "value"}
    some = get_peft_model(backbone("bert"), settings("task", target_modules=["query"], layers_to_transform=[1]))
    assert as_lora(some, None)[0].target_modules == {"bert.encoder.layer.1.attention.self.query"}
    default = get_peft_model(backbone("bert"), settings("task"))
    assert as_lora(default, None)[0].target_modules == {f"bert.encoder.layer.{block}.output.dense" for block in (0, 1)}


def test_every_family_loads_without_the_library(tmp_path):
    expected = {}
    for family in FAMILIES:
        folder, inputs = tmp_path / family, batch(family)
        model = backbone(family)
        model.save_pretrained(folder / "base")
        (folder / "class").write_text(type(model).__name__)
        model = wake(get_peft_model(model, settings("task"))).eval()
        write_lora(*as_lora(model, task_scale(model, "rank")), folder / "lora")
        with torch.no_grad():
            expected[family] = output(model, **inputs, tasks="rank").contiguous()
        save_file({k: v.contiguous() for k, v in inputs.items()}, folder / "inputs.safetensors")
    code = """
from pathlib import Path
import torch, transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
found = {}
for folder in sorted(path for path in Path().iterdir() if path.is_dir()):
    model = getattr(transformers, (folder / "class").read_text()).from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(model, folder / "lora").eval()
    with torch.no_grad():
        out = model(**load_file(folder / "inputs.safetensors"))
    name = next(name for name in ("logits", "start_logits", "last_hidden_state") if name in out)
    found[folder.name] = out[name].contiguous()
save_file(found, "found.safetensors")
"""
    without_the_library(code, tmp_path)
    found = load_file(tmp_path / "found.safetensors")
    assert found.keys() == expected.keys()
    for family, wanted in expected.items():
        assert apart(found[family], wanted) <= 1e-5 * max(1, wanted.abs().max().item()), family


# --- a run ---------------------------------------------------------------------------------------------------------


def script_of(folder: Path) -> str:
    (script,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S)
    return script


OWN_FILES = {
    "peft-lora": {"adapter_config.json", "adapter_model.safetensors"},
    "merged": {"config.json", "model.safetensors", "tokenizer.json"},
    "onnx": {"model.onnx", "tokenizer.json"},
}


@pytest.mark.parametrize("format", ["peft-lora", "merged", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["bert", *tiny_text.FAMILIES])
def test_the_script_of_the_readme_predicts_as_the_run(family, format, tmp_path):
    run = runs.load_run(trained("task", family))
    done = export(run, "mood", tmp_path / "out", format)
    assert done == Exported("mood", tmp_path / "out")
    assert done.exact
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= OWN_FILES[format] | {"tasks.json", "README.md"}
    assert ("heads.safetensors" in files) == (family == "bert" and format != "onnx")
    script = script_of(tmp_path / "out")
    assert "import unolora" not in script
    (template,) = run.tasks[0].template
    filled = [script.replace(repr(template), repr(template.format(text=text))) for (text,) in TEXTS]
    assert script not in filled
    chances = "scipy.special.softmax(out, 1)" if format == "onnx" else "logits.softmax(1)"
    shown = f"answer, {chances}[0].tolist()" if family == "bert" else "answer"
    code = "".join(f"{each}\nfound.append([{shown}])\n" for each in filled)
    found = json.loads(
        without_the_library(
            f"import json, scipy.special\nfound = []\n{code}\nprint(json.dumps(found))", tmp_path / "out"
        )
    )
    if family == "bert":
        for (label, chances), wanted in zip(found, scoring.predict_texts(run, "mood", TEXTS), strict=True):
            assert label == wanted["label"]
            assert chances == pytest.approx(list(wanted["probabilities"].values()), abs=1e-5)
        return
    prompts = scoring.Rows([(template.format(text=text),) for (text,) in TEXTS], torch.zeros(3).numpy())
    split = runs.encode_rows(run.model, 0, prompts, run.tokenizer, run.settings.data.max_length)
    given = scoring.Collator(run.tokenizer)([(0, split, i) for i in range(3)])
    _, written = run.model.generate(given["input_ids"], given["attention_mask"], given["tasks"])
    assert any(written), "something is written"
    assert [answer for (answer,) in found] == [text.strip() for text in written]


@pytest.mark.parametrize("conditioning", ["none", "task"])
@pytest.mark.parametrize("format", ["peft-lora", "merged"])
def test_an_exact_export_is_the_run(conditioning, format, tmp_path):
    run = runs.load_run(trained(conditioning))
    found = {}
    batch_of = scoring.Collator(run.tokenizer)([(1, scoring.read_split(run, 1, "validation"), i) for i in range(5)])
    inputs = {k: v for k, v in batch_of.items() if k not in ("tasks", "labels")}
    for row, task in enumerate(tiny.NAMES):
        export(run, task, tmp_path / task, format)
        if format == "peft-lora":
            model = PeftModel.from_pretrained(tf.AutoModel.from_pretrained(run.settings.backbone), tmp_path / task)
        else:
            model = tf.AutoModel.from_pretrained(tmp_path / task)
        with torch.no_grad():
            found[task] = model.eval()(**inputs).last_hidden_state
            wanted = run.model.method(torch.full((5,), row), **inputs)
        assert apart(found[task], wanted) <= 1e-5
    differ = apart(found["mood"], found["topic"])
    assert differ == 0 if conditioning == "none" else differ > 1e-3


def test_head_and_task_of_an_export(tmp_path):
    run = runs.load_run(trained("task"))
    export(run, "heat", tmp_path / "heat")
    head, heads = load_file(tmp_path / "heat" / "heads.safetensors"), run.model.heads.state_dict()
    assert set(head) == {"linear.task_heat.weight", "linear.task_heat.bias", "mean", "std"}
    assert torch.equal(head["linear.task_heat.weight"], heads["linear.task_heat.weight"])
    assert head["mean"].tolist() == [heads["mean"][2].item()]
    assert head["mean"].item() != 0
    assert runs.read_tasks(tmp_path / "heat" / "tasks.json") == run.tasks[2:]


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_scale_of_samples_becomes_its_mean_and_what_it_costs_is_said(family, tmp_path):
    run = runs.load_run(trained("task+sample", family))
    done = export(run, "topic", tmp_path / "out")
    assert not done.exact
    rows = scoring.read_split(run, 1, "validation")
    assert done.calibrated_on == len(rows) > 1
    assert done.scores["model"] == scoring.evaluate_run(run, "validation")[0]["topic"]
    assert set(done.scores["exported"]) == set(done.scores["model"])
    mean = mean_scale(run, 1, rows)
    single = [mean_scale(run, 1, rows, batch_size=size) for size in (1, 3)]
    assert all(apart(mean, other) < 1e-5 for other in single), "whatever the batches"
    config, tensors = as_lora(run.model.method.backbone, mean)
    assert config.r == run.settings.adapter.r
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"mean over {len(rows)} rows" in readme
    assert f"{done.scores['exported']['matthews']:.4f}" in readme


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("task", ["topic", "heat"])
def test_a_distilled_scale_answers_more_like_the_model(task, family):
    run = runs.load_run(trained("task+sample", family))
    row = run.row(task)
    rows = scoring.read_split(run, row, "train")
    mean = mean_scale(run, row, rows)
    state = {name: value.clone() for name, value in run.model.state_dict().items()}
    asked = {name: parameter.requires_grad for name, parameter in run.model.named_parameters()}
    scale, before, after = distilled_scale(run, row, rows, mean + 0.3)
    assert after < 0.7 * before, (before, after)
    assert all(torch.equal(value, state[name]) for name, value in run.model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in run.model.named_parameters()} == asked
    assert all(parameter.grad is None for parameter in run.model.parameters())
    wrap = type(run.model)
    with torch.no_grad():
        wanted = _answers(run, run.model, row, rows, range(len(rows)))
        student = wrap(_Static(run.model.method.backbone, scale.float()), run.model.heads).eval()
        given = _answers(run, student, row, rows, range(len(rows)))
    assert _distances(given, wanted).mean().item() == pytest.approx(after, rel=1e-3)
    assert torch.equal(distilled_scale(run, row, rows, mean + 0.3)[0], scale), "it does not depend on chance"
    _, at_mean, least = distilled_scale(run, row, rows, mean)
    assert least <= at_mean


def test_a_distilled_export(tmp_path):
    run = runs.load_run(trained("task+sample"))
    plain, done = export(run, "topic", tmp_path / "mean"), export(run, "topic", tmp_path / "out", distill=True)
    assert done.distilled
    assert not plain.distilled
    assert done.scores["model"] == plain.scores["model"]
    key = "adapter_model.safetensors"
    one, other = load_file(tmp_path / "mean" / key), load_file(tmp_path / "out" / key)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one if "lora_A" in name)
    assert "trained further on the model's answers" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(InputError, match=r"distillation is for a scale that depends on the sample.*'task', whose exp"):
        export(runs.load_run(trained("task")), "mood", tmp_path / "no", distill=True)
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_graph_takes_any_batch_and_gives_a_regressions_number(tmp_path):
    import onnxruntime

    run = runs.load_run(trained("task"))
    export(run, "heat", tmp_path / "heat", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "heat" / "model.onnx", providers=["CPUExecutionProvider"])
    rows = scoring.read_split(run, 2, "train")
    for places in ([0], range(5), range(17)):
        given = scoring.Collator(run.tokenizer)([(2, rows, i) for i in places])
        (found,) = session.run(None, {each.name: given[each.name].numpy() for each in session.get_inputs()})
        with torch.no_grad():
            wanted = run.model(**{k: v for k, v in given.items() if k != "labels"})["answers"]
        assert found.shape == (len(places), 1)
        assert len(places) == 1 or wanted.std() > 0
        assert torch.from_numpy(found[:, 0]).numpy() == pytest.approx(wanted.numpy(), abs=1e-4)


def test_a_graph_without_the_exporters_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(InputError, match=r"needs onnxscript, not installed here: pip install 'unolora\[onnx\]'"):
        export(runs.load_run(trained("task")), "mood", tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


def test_calibration_rows_of_ones_own(tmp_path):
    run = runs.load_run(trained("task+sample"))
    few = tiny.write_rows(tmp_path / "few.jsonl", [{"text": text} for (text,) in TEXTS])
    done = export(run, "mood", tmp_path / "few", calibration=few)
    assert done.calibrated_on == 3
    default = export(run, "mood", tmp_path / "default")
    assert done.scores["model"] == default.scores["model"], "scored on the validation rows either way"
    key = "adapter_model.safetensors"
    one, other = load_file(tmp_path / "few" / key), load_file(tmp_path / "default" / key)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(InputError, match=r"no\.jsonl is empty"):
        export(run, "mood", tmp_path / "no", calibration=tiny.write_rows(tmp_path / "no.jsonl", []))
    (tmp_path / "no.csv").write_text("text\n")
    with pytest.raises(InputError, match="no rows to average the scale over"):
        export(run, "mood", tmp_path / "no", calibration=tmp_path / "no.csv")
    with pytest.raises(InputError, match="calibration rows are for a scale that depends on the sample"):
        export(runs.load_run(trained("task")), "mood", tmp_path / "no", calibration=few)
    assert not (tmp_path / "no").exists()


def test_all_tasks_in_one_folder_mix_in_a_batch(tmp_path):
    run = runs.load_run(trained("task"))
    done = export_all(run, tmp_path / "all")
    assert [each.folder for each in done] == [tmp_path / "all" / name for name in tiny.NAMES]
    readme = (tmp_path / "all" / "README.md").read_text(encoding="utf-8")
    assert "--lora-modules mood=DIR/mood topic=DIR/topic heat=DIR/heat" in readme
    assert '"adapter_source": "local"' in readme
    script = script_of(tmp_path / "all").replace("a text of mood", TEXTS[0][0]).replace("a text of heat", TEXTS[1][0])
    printed = without_the_library(
        script + "\nimport json\nprint(json.dumps(out.last_hidden_state.tolist()))", tmp_path / "all"
    )
    inputs = run.tokenizer([TEXTS[0][0], TEXTS[1][0]], padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = run.model.method(torch.tensor([0, 2]), **inputs)
        swapped = run.model.method(torch.tensor([2, 0]), **inputs)
    assert apart(wanted, swapped) > 1e-3, "the task of a row matters"
    assert apart(torch.tensor(json.loads(printed)), wanted) <= 1e-5


def test_what_cannot_be_exported(tmp_path):
    run = runs.load_run(trained("task"))
    with pytest.raises(InputError, match="unknown task 'mod'; did you mean 'mood'"):
        export(run, "mod", tmp_path / "out")
    with pytest.raises(InputError, match="unknown format 'merge'; did you mean 'merged'"):
        export(run, "mood", tmp_path / "out", "merge")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(InputError, match="full is not empty; it is not overwritten, choose another"):
        export_all(run, tmp_path / "full")
    with pytest.raises(InputError, match="mine is a file"):
        export(run, "mood", tmp_path / "full" / "mine")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    other = runs.load_run(tiny.trained("lora-shared"))
    with pytest.raises(InputError, match="method is 'lora-shared'; export takes runs of 'unolora'"):
        export(other, "mood", tmp_path / "out")


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "save_tensors", broken)
    with pytest.raises(InputError, match="no space left"):
        export(runs.load_run(trained("task")), "mood", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("packed", [False, True])
def test_a_backbone_from_a_packed_file_is_merged_where_it_was_unpacked(packed, tmp_path, monkeypatch):
    run, load = runs.load_run(trained("task")), runs.load_backbone

    def quantised(*arguments):
        model, words = load(*arguments)
        model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="gguf"))
        with pytest.raises(ValueError, match="quantized with gguf and is not serializable"):
            model.save_pretrained(tmp_path / "refused")
        if packed:
            model.packed = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
        return model, words

    monkeypatch.setattr(runs, "load_backbone", quantised)
    if packed:
        with pytest.raises(InputError, match="is quantised, which a merged one can't be; export it as peft-lora"):
            export(run, "mood", tmp_path / "out", "merged")
        assert not (tmp_path / "out").exists()
    else:
        export(run, "mood", tmp_path / "out", "merged")
        assert (tmp_path / "out" / "model.safetensors").is_file()


# --- the base model ------------------------------------------------------------------------------------------------


def test_another_base_model_is_refused(tmp_path):
    run = tiny.copied(trained("task"), tmp_path)
    base = Path(runs.read_settings(run).backbone)
    kept = json.loads((run / "results.json").read_text())["base"]
    assert set(kept) == {"config", "weights"}
    assert runs.load_run(run).model.method.base == kept, "the same as at its training"
    config = run / "config.yaml"
    other = tiny.copied(base, tmp_path / "other")
    config.write_text(config.read_text().replace(str(base), str(other)))
    assert runs.load_run(run).model.method.base == kept, "wherever it lies"

    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    save_file({**weights, name: weights[name] + 1e-4}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="not the one that the run was trained on: its weights differ; put the orig"):
        runs.load_run(run)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "hidden_act": "relu"}))
    with pytest.raises(InputError, match="trained on: its configuration differ"):
        runs.load_run(run)

    results = json.loads((run / "results.json").read_text())
    del results["base"]
    (run / "results.json").write_text(json.dumps(results))
    assert runs.load_run(run).tasks, "runs from before it was kept are read"
    (run / "results.json").unlink()
    assert runs.load_run(run).tasks


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    run = str(trained("task+sample"))
    assert unolora_cli.main(["export", run, "--task", "mood", "--output", str(tmp_path / "mood")]) == 0
    out = capsys.readouterr().out
    assert "mean scale over 8 rows" in out
    assert re.search(r"matthews -?\d\.\d{4} -> -?\d\.\d{4}, lost -?\d\.\d{4}", out)
    exact = str(trained("task"))
    assert unolora_cli.main(["export", exact, "--all", "--output", str(tmp_path / "all")]) == 0
    out = capsys.readouterr().out
    assert out.count("exact") == 3
    assert (tmp_path / "all" / "heat" / "adapter_config.json").is_file()
    merged = ["export", exact, "--task", "mood", "--format", "merged", "--output", str(tmp_path / "merged")]
    assert unolora_cli.main(merged) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    capsys.readouterr()
    for arguments, error in (
        (["--output", "x"], "give --task NAME or --all"),
        (["--all", "--task", "mood", "--output", "x"], "give --task NAME or --all"),
        (["--all", "--format", "merged", "--output", "x"], "--all writes plain LoRAs"),
        (["--task", "moo", "--output", "x"], "did you mean 'mood'"),
    ):
        assert unolora_cli.main(["export", exact, *arguments]) == 2
        assert error in capsys.readouterr().err
