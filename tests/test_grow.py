"""Tasks that come, go and change their names, while the others stay bit for bit as they are."""

import json
import re
import signal
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel

import tiny
import tiny_text
import unolora_cli
from conftest import apart, backbone, batch, output, settings, wake
from unolora import grow, runs, scoring, training
from unolora.errors import InputError
from unolora.export import export
from unolora.tasks import Task

TONE = {
    "name": "tone",
    "kind": "classification",
    "template": "{text}",
    "target": "label",
    "source": {"train": "tone.jsonl"},
}
WARMTH = {**tiny.tasks("heat")[0], "name": "warmth", "text_step": 5.0}


@cache
def folder() -> Path:
    """Where the files of new tasks lie: `tone` is `mood` under other labels, `warmth` is `heat`."""
    path = tiny.folder()
    words = {"bad": "gloomy and", "good": "x"}
    rows = [{"text": row["text"], "label": words[row["label"]]} for row in tiny.rows("mood")]
    tiny.write_rows(path / "tone.jsonl", rows)
    for split, (start, end) in {"train": (0, 60), "validation": (60, 70), "test": (70, 80)}.items():
        tiny.write_rows(path / f"heat-{split}.jsonl", tiny.rows("heat")[start:end])
    return path


@cache
def trained(conditioning: str = "task+sample", family: str = "bert", steps: int = 6) -> Path:
    """A run to start from; for reading only."""
    path = tiny.folder() / "run"
    changes = {"adapter": {"conditioning": conditioning}, "training": {"steps": steps, "evaluate_every": steps}}
    training.train(tiny.settings(path, **changes) if family == "bert" else tiny_text.settings(path, family, **changes))
    return path


def add(run: Path, output: Path, task=None, **more) -> Path:
    return grow.add_task(run, Task.from_dict(task or TONE), output, root=folder(), **{"steps": 3, **more})


def batches(run: runs.Run) -> dict[str, torch.Tensor]:
    """Rows of the three old tasks, mixed."""
    rows = [(row, scoring.read_split(run, row, "test"), i) for i in range(4) for row in map(run.row, tiny.NAMES)]
    batch = scoring.Collator(run.tokenizer)(rows)
    return {name: value for name, value in batch.items() if name not in ("labels", "answers")}


def outputs(run: runs.Run, given: dict[str, torch.Tensor], names=tiny.NAMES) -> torch.Tensor:
    """The logits that a run gives for the same rows of these tasks, by its own numbers of them."""
    tasks = torch.tensor([run.row(names[i % len(names)]) for i in range(len(given["tasks"]))])
    with torch.no_grad():
        return run.model(**{**given, "tasks": tasks})["logits"]


def same(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether logits are the same bit for bit, whatever columns other tasks need beside."""
    wide, narrow = sorted((before, after), key=lambda x: -x.shape[1])
    width = narrow.shape[1]
    return torch.equal(wide[:, :width], narrow) and bool((wide[:, width:] == -torch.inf).all())


# --- the adapter ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", ["none", "task", "task+sample"])
def test_an_adapter_with_more_tasks_goes_through_peft(conditioning, tmp_path):
    model = wake(get_peft_model(backbone("bert"), settings(conditioning))).eval()
    inputs = batch("bert")
    before = output(model, **inputs, tasks=["sort", "rank", "name"])
    tuner = model.base_model
    embedding = torch.zeros(3, 0)
    if conditioning != "none":
        embedding = tuner.uno_hypernetwork["default"].task_embedding.weight.detach()
        embedding = torch.cat([embedding[:1], torch.randn(1, 8), embedding[1:]])
    tuner.set_tasks(["sort", "new", "rank", "name"], embedding)
    assert torch.equal(output(model, **inputs, tasks=["sort", "rank", "name"]), before)
    new = output(model, **inputs, tasks="new")
    assert (apart(new, before) > 1e-4) == (conditioning != "none"), "the new row is another"
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(backbone("bert"), tmp_path).eval()
    assert torch.equal(output(loaded, **inputs, tasks=["sort", "rank", "name"]), before)
    assert torch.equal(output(loaded, **inputs, tasks="new"), new)


def test_rows_that_do_not_fit_an_adapter():
    model = get_peft_model(backbone("bert"), settings("task"))
    with pytest.raises(InputError, match=r"2 tasks need an embedding \[2, 8\] .* got \[3, 8\]"):
        model.base_model.set_tasks(["a", "b"], torch.zeros(3, 8))
    with pytest.raises(InputError, match="names 'a' more than once"):
        model.base_model.set_tasks(["a", "a"], torch.zeros(2, 8))
    model.merge_adapter(tasks="sort")
    with pytest.raises(InputError, match="is merged; call unmerge_adapter"):
        model.base_model.set_tasks(["a"], torch.zeros(1, 8))


# --- adding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [TONE, WARMTH], ids=["classification", "regression"])
@pytest.mark.parametrize(
    ("conditioning", "family"),
    [("none", "bert"), ("task", "bert"), ("task+sample", "bert"), ("task+sample", "t5"), ("task", "llama")],
)
def test_a_new_task_leaves_the_old_ones_alone(conditioning, family, task, tmp_path):
    old = runs.load_run(trained(conditioning, family))
    files = tiny.parts(old.folder)
    given = batches(old)
    path = add(old.folder, tmp_path / "more", task)
    new = runs.load_run(path)
    assert [task.name for task in new.tasks] == [*tiny.NAMES, task["name"]]
    before = outputs(old, given)
    assert same(before, outputs(new, given))
    if conditioning != "none":
        moved = outputs(new, given, names=["topic", "mood", "heat"])
        assert not same(before, moved), "the task matters"
    if family != "bert":
        written = [run.model.generate(**given) for run in (old, new)]
        assert written[0][1] == written[1][1]
        assert torch.equal(written[0][0].nan_to_num(-9), written[1][0].nan_to_num(-9))
    weights = [load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in (old, new)]
    assert weights[0].keys() == weights[1].keys()
    changed = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    rows = "base_model.uno_hypernetwork.rows"
    row = "base_model.uno_hypernetwork.task_embedding.weight"
    assert changed == (set() if conditioning == "none" else {rows, row})
    if conditioning != "none":
        assert torch.equal(weights[0][row], weights[1][row][:3])
    assert tiny.parts(old.folder) == files, "the old run is as it was"
    assert tiny.leftovers(tmp_path) == []


def test_what_is_learned_is_the_row_and_the_head(tmp_path):
    old = trained()
    longer = runs.load_run(add(old, tmp_path / "longer", steps=40, learning_rate=0.02, start="scratch"))
    none = runs.load_run(add(old, tmp_path / "none", steps=1, learning_rate=1e-9, start="scratch"))
    rows = [
        run.model.method.backbone.base_model.uno_hypernetwork["default"].task_embedding.weight for run in (longer, none)
    ]
    assert torch.equal(rows[0][:3], rows[1][:3])
    assert apart(rows[0][3], rows[1][3]) > 0.02
    split = scoring.read_split(longer, 3, "train")
    batch = scoring.Collator(longer.tokenizer)([(3, split, i) for i in range(len(split))])
    with torch.no_grad():
        losses = [run.model(**batch)["loss"].item() for run in (longer, none)]
    assert losses[0] < 0.9 * losses[1], losses


@pytest.mark.parametrize(
    ("tune", "conditioning", "family"),
    [("hypernetwork", "task+sample", "bert"), ("all", "task", "bert"), ("all", "none", "llama")],
)
def test_tuning_more_replays_the_old_tasks_and_says_what_that_does(tune, conditioning, family, tmp_path):
    old = trained(conditioning, family)
    seen = {}

    def progress(_, trainer):
        return tiny.Watch(at_end=lambda: seen.update(trainer.seen()))

    path = add(old, tmp_path / "more", tune=tune, learning_rate=0.05, progress=progress)
    assert set(seen) == {*tiny.NAMES, "tone"}
    assert min(seen.values()) > 0, "every old task is replayed"
    new, before, after = runs.load_run(path), tiny.results(old), tiny.results(path)
    (change,) = after["changes"]
    assert (change["tune"], set(change["old_tasks"])) == (tune, set(tiny.NAMES))
    scores = scoring.evaluate_run(new, "test")[0]
    for was, entry in zip(before["tasks"], after["tasks"][:3], strict=True):
        metric = entry["score_metric"]
        moved = change["old_tasks"][entry["name"]]
        assert moved == {
            "metric": metric, "before": was["metrics"]["test"][metric], "after": entry["metrics"]["test"][metric],
        }  # fmt: skip
        assert scores[entry["name"]] == pytest.approx(entry["metrics"]["test"])
        assert entry["rows"] == was["rows"]
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (old, path)]
    changed = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    pairs = {name for name in weights[0] if ".uno_A" in name or ".uno_B" in name}
    network = {name for name in weights[0] if "uno_hypernetwork" in name}
    assert bool(changed & network) == (conditioning != "none")
    assert changed >= pairs if tune == "all" else not changed & pairs
    given = batches(runs.load_run(old))
    assert not same(outputs(runs.load_run(old), given), outputs(new, given)), "unlike with tune row"


def test_the_new_run_is_a_run(tmp_path):
    old = trained()
    path = add(old, tmp_path / "more", examples=12)
    names = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert names == {
        "config.yaml", "data.json", "environment.json", "metrics.jsonl", "metrics-tone.jsonl", "results.json",
        "report.html",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/heads.safetensors",
        "adapter/tasks.json", "adapter/README.md",
    }  # fmt: skip
    run, results, before = runs.load_run(path), tiny.results(path), tiny.results(old)
    assert results["tasks"][:3] == before["tasks"]
    assert results["name"] == "more"
    assert results["base"] == before["base"]
    entry = results["tasks"][3]
    assert entry["rows"]["train"] == 12
    scores, counts = scoring.evaluate_run(run, "test")
    assert counts["tone"] == entry["rows"]["test"]
    for each in results["tasks"]:
        assert scores[each["name"]] == pytest.approx(each["metrics"]["test"])
    firsts = [next(iter(found.values())) for found in scores.values()]
    assert results["averages"]["mean_of_first_metrics"]["test"] == pytest.approx(np.mean(firsts))
    counted, added = before["parameters"], 2 * 32 + 2
    assert results["parameters"]["heads"] == counted["heads"] + added
    assert results["parameters"]["adapter"] == counted["adapter"] + 8
    assert results["parameters"]["total"] == counted["total"] + added + 8
    (change,) = results["changes"]
    assert change["added"] == "tone"
    assert change["from"] == "run"
    assert (change["examples"], change["steps"], change["learning_rate"]) == (12, 3, 0.01)
    rows = json.loads((path / "adapter" / "tasks.json").read_text())
    came = {row["name"]: row["since"] for row in json.loads((old / "adapter" / "tasks.json").read_text())}
    assert {row["name"]: row["since"] for row in rows} == {**came, "tone": change["date"]}
    assert runs.read_since(path) == {**came, "tone": change["date"]}
    assert "tone" in (path / "report.html").read_text(encoding="utf-8")
    assert runs.read_settings(path).tasks[3]["source"]["train"] == str(folder() / "tone.jsonl")
    again = runs.load_run(add(path, tmp_path / "again", WARMTH))
    assert [task.name for task in again.tasks] == [*tiny.NAMES, "tone", "warmth"]
    assert [change["added"] for change in tiny.results(tmp_path / "again")["changes"]] == ["tone", "warmth"]
    assert (tmp_path / "again" / "metrics-tone.jsonl").is_file()
    PeftModel.from_pretrained(AutoModel.from_pretrained(run.settings.backbone), path / "adapter")


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_the_nearest_task_is_where_it_starts(family, tmp_path):
    """`twin` is one of the old tasks under another name, after a training that told them apart."""
    old = trained("task", family, steps=60)
    twin = {**tiny.tasks("topic")[0], "name": "twin", "prompt": "topic text: {text}"}
    path = grow.add_task(
        old, Task.from_dict(twin), tmp_path / "twin", root=tiny.data(), steps=1, learning_rate=1e-9, start="nearest"
    )
    (change,) = tiny.results(path)["changes"]
    model = runs.load_run(path).model
    row = model.method.backbone.base_model.uno_hypernetwork["default"].task_embedding.weight
    name = change["start"].removeprefix("nearest: ")
    assert torch.allclose(row[3], row[tiny.NAMES.index(name)], atol=1e-6)
    if family == "t5":
        assert name == "topic"


def test_other_starts(tmp_path):
    old = trained("task")
    rows = {}
    for start in ("mean", "scratch"):
        path = add(old, tmp_path / start, start=start, steps=1, learning_rate=1e-9)
        assert tiny.results(path)["changes"][0]["start"] == start
        model = runs.load_run(path).model
        rows[start] = model.method.backbone.base_model.uno_hypernetwork["default"].task_embedding.weight.detach()
    assert torch.allclose(rows["mean"][3], rows["mean"][:3].mean(0), atol=1e-6)
    assert apart(rows["scratch"][3], rows["mean"][3]) > 0.1
    path = add(trained("none"), tmp_path / "none", steps=1)
    assert tiny.results(path)["changes"][0]["start"] is None


def test_the_probe_predicts_each_row_from_the_others():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(3, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    assert grow.leave_one_out(x, y) < 0.1 * grow.leave_one_out(x, noise)
    assert grow.leave_one_out(torch.randn(20, 50, generator=generator, dtype=torch.float64), noise) > 0.5
    K = (x - x.mean(0)) @ (x - x.mean(0)).T + 1
    errors = []
    for i in range(20):
        rest = [j for j in range(20) if j != i]
        penalty = grow.RIDGE * K.diagonal().mean() * torch.eye(19)
        weights = torch.linalg.solve(K[rest][:, rest] + penalty, y[rest])
        errors.append((y[i] - K[i, rest] @ weights).square())
    assert grow.leave_one_out(x, y) == pytest.approx(torch.stack(errors).mean().item())


def test_few_examples_are_even_over_the_labels(tmp_path):
    path = tiny.folder()
    rows = [{"text": f"the cat {i}", "label": "rare" if i < 6 else "common"} for i in range(80)]
    task = Task.from_dict({**TONE, "source": {"train": str(tiny.write_rows(path / "uneven.jsonl", rows))}})
    own = runs.read_settings(trained())
    data = runs.read_data(own, task)
    every = data.splits["train"]
    assert np.bincount(every.targets).min() < 8
    few = grow._fewer(data, 4, seed=0)
    assert np.bincount(few.splits["train"].targets).tolist() == [2, 2]
    assert set(few.splits["train"].texts) <= set(every.texts)
    assert few.splits["test"] is not every
    assert grow._fewer(data, 4, seed=0).splits["train"].texts == few.splits["train"].texts
    assert grow._fewer(data, 4, seed=1).splits["train"].texts != few.splits["train"].texts, "another draw"
    assert len(grow._fewer(data, 1000, seed=0).splits["train"]) == len(every)


def test_a_new_task_is_exported_as_the_old_ones(tmp_path):
    run = runs.load_run(add(trained("task"), tmp_path / "more", steps=12, learning_rate=0.05))
    export(run, "tone", tmp_path / "tone")
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(run.settings.backbone), tmp_path / "tone").eval()
    inputs = {name: value for name, value in batches(run).items() if name != "tasks"}
    with torch.no_grad():
        wanted = run.model.method(torch.full((12,), 3), **inputs)
        assert apart(plain(**inputs).last_hidden_state, wanted) <= 1e-5
        assert apart(wanted, run.model.method(torch.full((12,), 2), **inputs)) > 1e-4, "its scale is its own"


# --- removing and renaming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("conditioning", "family"), [("none", "bert"), ("task+sample", "bert"), ("task", "llama")])
def test_a_removed_task_leaves_the_others_alone(conditioning, family, tmp_path):
    old = runs.load_run(trained(conditioning, family))
    path = grow.remove_task(old.folder, "topic", tmp_path / "less")
    new = runs.load_run(path)
    assert [task.name for task in new.tasks] == ["mood", "heat"]
    given = {name: value[[0, 2, 3, 5]] for name, value in batches(old).items()}  # rows of mood and heat
    names = ["mood", "heat"]
    before = outputs(old, given, names)
    assert same(before, outputs(new, given, names))
    assert not same(before, outputs(new, given, names[::-1])), "the task matters"
    assert "linear.task_topic.weight" not in load_file(path / "adapter" / "heads.safetensors")
    results = tiny.results(path)
    assert [entry["name"] for entry in results["tasks"]] == names
    assert results["changes"][0]["removed"] == "topic"
    scores = scoring.evaluate_run(new, "test")[0]
    for entry in results["tasks"]:
        assert scores[entry["name"]] == pytest.approx(entry["metrics"]["test"])
    alone = grow.remove_task(path, "heat", tmp_path / "alone")
    with pytest.raises(InputError, match="'mood' is its only task"):
        grow.remove_task(alone, "mood", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_renamed_task_is_the_same_on_the_same_rows(family, tmp_path):
    old = runs.load_run(trained("task+sample", family))
    path = grow.rename_task(old.folder, "topic", "subject", tmp_path / "named")
    path = grow.rename_task(path, "subject", "theme", tmp_path / "twice")
    new = runs.load_run(path)
    names = ["mood", "theme", "heat"]
    assert [task.name for task in new.tasks] == names
    given = batches(old)
    assert torch.equal(outputs(old, given), outputs(new, given, names))
    for split in ("train", "validation", "test"):
        kept, found = (scoring.read_split(run, 1, split) for run in (old, new))
        assert {n: list(v) for n, v in kept.inputs.items()} == {n: list(v) for n, v in found.inputs.items()}
        assert np.array_equal(kept.targets, found.targets)
    assert new.tasks[1].cut_as == "topic"
    line = next(line for line in tiny.lines(path) if line["kind"] == "evaluation")
    assert set(line["scores"]) == set(names)
    assert [entry["name"] for entry in tiny.results(path)["tasks"]] == names
    since = [row["since"] for row in json.loads((path / "adapter" / "tasks.json").read_text())]
    assert len(set(since)) == 1, "it came when it came"


# --- what is refused -------------------------------------------------------------------------------------------------


def test_tasks_that_cannot_come_or_go(tmp_path):
    run, out = trained(), tmp_path / "out"
    for call, message in (
        (lambda: add(run, out, {**TONE, "name": "mood"}), "task 'mood' is there already"),
        (lambda: add(run, out, start="neares"), "unknown start 'neares'; did you mean 'nearest'"),
        (lambda: add(run, out, tune="hypernet"), "unknown tune 'hypernet'; did you mean 'hypernetwork'"),
        (lambda: add(trained("none"), out, tune="hypernetwork"), "there is no hypernetwork; tune row or all"),
        (lambda: add(run, out, examples=0), "`examples` must be at least 1, got 0"),
        (lambda: add(run, out, steps=0), r"`training\.steps` must be at least 1, got 0"),
        (lambda: add(run, out, learning_rate=-1.0), r"`training\.learning_rate` must be a number above 0"),
        (lambda: add(run, out, {**TONE, "source": {"train": "no.jsonl"}}), r"no\.jsonl"),
        (lambda: add(run, out, {**TONE, "labels": ["x", "y"]}), "task 'tone': .*gloomy"),
        (lambda: add(run, run), "is not empty; it is not overwritten"),
        (lambda: add(run, run / "config.yaml"), "is a file"),
        (lambda: add(trained("none", "llama"), out), "nothing of the model belongs to a task"),
        (lambda: add(trained("task", "llama"), out, {**WARMTH, "text_step": None}), "needs `text_step`"),
        (
            lambda: add(tiny.trained("lora-shared"), out),
            "its method is 'lora-shared'; only tasks of a run of 'unolora'",
        ),
        (lambda: add(tmp_path, out), "a run folder holds config.yaml"),
        (lambda: grow.remove_task(run, "mod", out), "unknown task 'mod'; did you mean 'mood'"),
        (lambda: grow.rename_task(run, "mod", "x", out), "unknown task 'mod'; did you mean 'mood'"),
        (lambda: grow.rename_task(run, "mood", "heat", out), "task 'heat' is there already"),
        (lambda: grow.rename_task(run, "mood", "a b", out), "must be letters, digits"),
        (lambda: grow.read_task("no.yaml"), r"no\.yaml: no such file"),
        (lambda: grow.read_task("sst"), "unknown task 'sst'; did you mean 'sst2'.*or give a YAML file"),
    ):
        with pytest.raises(InputError, match=message):
            call()
        assert not out.exists()
    assert tiny.leftovers(tmp_path) == []


def test_an_answer_that_does_not_fit_behind_the_input(tmp_path):
    run = tiny.copied(trained("task", "llama"), tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    longest = runs.load_run(run).model.heads.longest()
    config["data"]["max_length"] = 128 - longest
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"text": row["text"], "label": row["label"] * 30} for row in tiny.rows("mood")]
    table = tiny.write_rows(tmp_path / "long.jsonl", rows)
    with pytest.raises(InputError, match="takes 128 tokens"):
        add(run, tmp_path / "out", {**TONE, "source": {"train": str(table)}})


def test_an_interrupted_training_leaves_nothing(tmp_path):
    def progress(label, trainer):
        assert label == "task tone"
        return tiny.Watch(lambda step: signal.raise_signal(signal.SIGINT))

    with pytest.raises(KeyboardInterrupt):
        add(trained(), tmp_path / "out", progress=progress)
    assert list(tmp_path.iterdir()) == []


# --- the commands --------------------------------------------------------------------------------------------------


def test_the_commands(tmp_path, capsys):
    task = tmp_path / "new.yaml"
    task.write_text(yaml.safe_dump({**TONE, "source": {"train": str(folder() / "tone.jsonl")}}))
    first, second, third = (str(tmp_path / name) for name in ("first", "second", "third"))
    added = ["add-task", str(trained()), "--task", str(task), "--output", first, "--steps", "2", "--examples", "16"]
    assert unolora_cli.main(added) == 0
    out = capsys.readouterr().out
    assert "tone" in out
    assert "start    nearest: " in out
    assert first in out
    assert unolora_cli.main(["tasks", first]) == 0
    out = capsys.readouterr().out
    assert "since" in out
    assert json.loads((tmp_path / "first" / "adapter" / "tasks.json").read_text())[3]["since"][:10] in out
    more = [*added, "--tune", "all"]
    more[more.index(first)] = str(tmp_path / "tuned")
    assert unolora_cli.main(more) == 0
    assert re.search(r"mood .* matthews .* [+-]\d\.\d{4}", capsys.readouterr().out)
    assert unolora_cli.main(["rename-task", first, "--task", "tone", "--to", "spirit", "--output", second]) == 0
    assert unolora_cli.main(["remove-task", second, "--task", "mood", "--output", third]) == 0
    assert [task.name for task in runs.load_run(third).tasks] == ["topic", "heat", "spirit"]
    assert (tmp_path / "third" / "metrics-spirit.jsonl").is_file()
    capsys.readouterr()
    assert unolora_cli.main(["remove-task", third, "--task", "spirt", "--output", str(tmp_path / "x")]) == 2
    assert "did you mean 'spirit'" in capsys.readouterr().err
