"""Tasks from words (`conditioning="text"`): a scale from a description, also for a task that nobody trained."""

import json
import re
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as tf
import yaml
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

import tiny
import tiny_text
import unolora_cli
from conftest import MIXED, TASKS, VOCAB, WIDTH, apart, backbone, batch, output, rows, settings, training, wake
from test_grow import TONE, WARMTH, folder, outputs, same
from test_grow import batches as rows_of
from unolora import grow, runs, scoring, words
from unolora import training as trainer
from unolora.errors import CheckpointError, InputError
from unolora.export import export, task_scale
from unolora.tasks import TASKS as BUILT_IN
from unolora.tasks import Task
from unolora.words import Descriptions

FAMILIES = ("bert", "t5", "llama")
WORDS = {
    "sort": ["put these in order", "which one comes first"],
    "rank": ["say how good it is", "a number for how good", "rate it"],
    "name": ["what is this called"],
}
SAID = {
    "mood": ["was it bad or good", "a sad or a glad day"],
    "topic": ["a cat, an oak or an axe", "what it is on", "animal, plant or tool"],
    "heat": ["was it cold or hot"],
    "tone": ["bad or good in this day", "sad and glad"],
    "warmth": ["was it very hot"],
}


def tokenizer():
    """Any word is one of the tiny models' tokens, always the same; there is nothing else to it."""
    vocabulary = {f"w{i}": i for i in range(VOCAB)}
    words = sorted({word for texts in [*WORDS.values(), ["something else the new one"]] for text in texts
                    for word in text.split()})  # fmt: skip
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{word: 2 + i for i, word in enumerate(words)}}
    assert len(vocabulary) <= VOCAB
    pieces = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]")


def described(family: str = "bert", *, awake: bool = True, **more) -> PeftModel:
    """A tiny backbone with an adapter that goes by words."""
    model = get_peft_model(backbone(family), settings("text", **more))
    if awake:
        wake(model)
        for name, parameter in model.named_parameters():
            if "task_embedding.map" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    model.describe(WORDS, tokenizer())
    return model.eval()


def words_of(model: PeftModel) -> Descriptions:
    return model.base_model.uno_hypernetwork["default"].task_embedding


# --- the adapter ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_is_the_backbone(family):
    inputs = batch(family)
    bare = output(backbone(family), **inputs)
    assert torch.equal(output(described(family, awake=False), **inputs, tasks=MIXED), bare)
    assert apart(output(described(family), **inputs, tasks=MIXED), bare) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_is_row_by_row(family):
    model, inputs = described(family), batch(family)
    together = output(model, **inputs, tasks=MIXED)
    for row, task in enumerate(MIXED):
        assert apart(output(model, **rows(inputs, row), tasks=task), together[row : row + 1]) < 1e-4
    moved = output(model, **inputs, tasks=[MIXED[1], MIXED[2], MIXED[0]])
    assert apart(moved, together) > 1e-3, "the task matters"


@pytest.mark.parametrize("family", FAMILIES)
def test_it_comes_back_through_peft_without_a_tokenizer(family, tmp_path):
    model, inputs = described(family), batch(family)
    before = output(model, **inputs, tasks=MIXED)
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.uno_hypernetwork.task_embedding."
    assert found[f"{prefix}vectors"].shape == (6, WIDTH)
    assert found[f"{prefix}counts"].tolist() == [2, 3, 1]
    for more in ({}, {"adapter_name": "other"}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(backbone(family), tmp_path, **more).eval()
        assert torch.equal(output(again, **inputs, tasks=MIXED), before), more


def test_what_the_words_become_is_what_the_bare_backbone_makes_of_them():
    model, words = described(), tokenizer()
    bare, embedding = backbone("bert"), words_of(model)
    texts = [text for task in TASKS for text in WORDS[task]]
    states = []
    for text in texts:
        ids = torch.tensor([words(text)["input_ids"]])
        with torch.no_grad():
            states.append(bare.bert(input_ids=ids).last_hidden_state.mean(dim=1))
    states = torch.cat(states)
    assert apart(embedding.middle, states.mean(0)) < 1e-6
    wanted = (states - states.mean(0)) / (states - states.mean(0)).square().mean().sqrt()
    assert apart(embedding.vectors, wanted) < 1e-4
    with training(model):
        again = model.base_model.described(texts, words)
        assert model.training
        assert model.base_model.model.bert.encoder.training
    assert apart(again, embedding.vectors) < 1e-5, "the adapter is awake, but off; dropout too"
    assert apart(output(model, **batch("bert"), tasks=MIXED), output(bare, **batch("bert"))) > 0.01, "it is on again"


def test_directions_that_no_training_description_had_are_dropped():
    embedding = Descriptions(2, 5, 3)
    states = torch.tensor([[1.0, 2, 0, 0, 7], [1.0, 0, 0, 0, 7], [3.0, 0, 0, 0, 7]])
    embedding.settle(states)
    assert embedding.basis.shape == (2, 5)
    found = embedding.standardised(torch.tensor([[1.0, 2, 0, 0, 7], [1.0, 2, 50, -9, 30], [5 / 3, 2 / 3, 4, 0, 0]]))
    assert apart(found[0], (states[0] - states.mean(0)) / embedding.size) < 1e-6
    assert apart(found[0], found[1]) < 1e-5
    assert apart(found[2], torch.zeros(5)) < 1e-5, "like none of theirs: their middle"
    assert embedding.standardised(states).square().mean().item() == pytest.approx(1)


def test_a_single_description_is_its_own_middle():
    model = get_peft_model(backbone("bert"), settings("text", tasks=["sort"]))
    model.describe({"sort": WORDS["sort"][:1]}, tokenizer())
    assert not words_of(model).vectors.any()
    assert output(model, **batch("bert"), tasks="sort").isfinite().all()


def test_training_draws_a_wording_and_answering_takes_the_first():
    model, inputs = described(), batch("bert")
    embedding, tasks = words_of(model), torch.tensor([1] * 64)

    def drawn(seed: int) -> set[int]:
        torch.manual_seed(seed)
        found = embedding(tasks)
        wanted = embedding.map(embedding.vectors)
        return [int((wanted - row).square().sum(1).argmin()) for row in found]

    assert drawn(0) == [2] * 64, "the first of the second task"
    model.train()
    assert set(drawn(0)) == {2, 3, 4}, "its three"
    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    with torch.no_grad():
        assert drawn(0) == [2] * 64
        merged = model.merge_and_unload(tasks="rank").eval()
    again = described()
    assert apart(output(merged, **inputs), output(again, **inputs, tasks="rank")) < 1e-4
    assert torch.equal(task_scale(again.train(), "rank"), task_scale(again.eval(), "rank"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_task_with_words_and_no_example_has_a_scale(family, tmp_path):
    model, inputs = described(family), batch(family)
    before = output(model, **inputs, tasks=MIXED)
    model.describe({"new": ["something else", "the new one"]}, tokenizer())
    assert model.peft_config["default"].tasks == [*TASKS, "new"]
    assert torch.equal(output(model, **inputs, tasks=MIXED), before), "bit for bit"
    new = output(model, **inputs, tasks="new")
    assert min(apart(new, output(model, **inputs, tasks=task)) for task in TASKS) > 1e-3
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(backbone(family), tmp_path).eval()
    assert torch.equal(output(again, **inputs, tasks="new"), new)
    model.describe({"new": WORDS["rank"]}, tokenizer())
    assert torch.equal(output(model, **inputs, tasks="new"), output(model, **inputs, tasks="rank")), "only words count"
    assert torch.equal(output(model, **inputs, tasks=MIXED), before)


def test_all_of_it_learns_but_the_words():
    model, inputs = described(), batch("bert")
    model.train()
    torch.manual_seed(0)
    model(**inputs, tasks=MIXED).loss.backward()
    own = {name: p.grad for name, p in model.named_parameters() if ".uno_" in name}
    assert any("task_embedding.map.weight" in name for name in own)
    assert all(grad is not None and grad.any() for grad in own.values())
    assert not any("vectors" in name or "basis" in name for name in own)


def test_what_cannot_be_described(tmp_path):
    fresh, words = get_peft_model(backbone("bert"), settings("text")), tokenizer()
    for call, message in (
        (lambda: fresh(**batch("bert"), tasks=MIXED), r"knows no words of its tasks yet; call model\.describe\("),
        (lambda: fresh.describe({"sort": ["a"]}, words), "task 'rank' has no description yet; the first call is for"),
        (lambda: fresh.describe({**WORDS, "name": "rate it"}, words), "task 'name': expected a list .* got 'rate it'"),
        (lambda: fresh.describe({**WORDS, "name": []}, words), r"task 'name': expected a list .* got \[\]"),
        (lambda: fresh.describe({**WORDS, "name": [" "]}, words), "description ' ' has no tokens"),
        (
            lambda: get_peft_model(backbone("bert"), settings("task")).describe(WORDS, words),
            "has conditioning 'task', which takes no words; 'text' does",
        ),
        (
            lambda: get_peft_model(backbone("vit", "FEATURE_EXTRACTION"), settings("text")),
            "needs a transformers model that reads words, to encode descriptions, not ViTModel",
        ),
        (
            lambda: get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), settings("text", target_modules=["0"])),
            "needs a transformers model that reads words",
        ),
    ):
        with pytest.raises(InputError, match=message):
            call()
    model = described()
    for tasks, vectors in ((["a"], [torch.zeros(8)]), (["a", "b"], [torch.zeros(1, WIDTH)]), (["a"], [[]])):
        with pytest.raises((InputError, AttributeError)):
            model.base_model.set_tasks(tasks, vectors)
    assert model.peft_config["default"].tasks == TASKS
    model.merge_adapter(tasks="sort")
    with pytest.raises(InputError, match=r"call unmerge_adapter\(\) first"):
        model.describe({"new": ["the new one"]}, words)


def test_a_checkpoint_of_another_conditioning(tmp_path):
    described().save_pretrained(tmp_path / "text")
    get_peft_model(backbone("bert"), settings("task")).save_pretrained(tmp_path / "task")
    for name, other, found in (("text", "task", "expected task, found text"), ("task", "text", "found task")):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({**config, "conditioning": other}))
        with pytest.raises(CheckpointError, match=f"another conditioning: .*{found}"):
            PeftModel.from_pretrained(backbone("bert"), tmp_path / name)


# --- tasks and runs --------------------------------------------------------------------------------------------------


def test_built_in_tasks_say_what_they_ask_in_several_ways():
    every = [text for task in BUILT_IN.values() for text in task.descriptions]
    assert all(3 <= len(task.descriptions) <= 4 for task in BUILT_IN.values())
    assert len(set(every)) == len(every)
    assert all(text.endswith((".", "?")) and len(text) < 200 for text in every)


def test_a_task_that_says_nothing_cannot_be_described(tmp_path):
    given = {**tiny.tasks("mood")[0], "description": "bad or good?"}
    assert Task.from_dict(given).wordings == ("bad or good?",)
    assert Task.from_dict({**given, "descriptions": ["one", "two"]}).wordings == ("one", "two")
    assert Task.from_dict({**given, "descriptions": "one"}).wordings == ("one",)
    with pytest.raises(InputError, match="descriptions must be a list of texts"):
        Task.from_dict({**given, "descriptions": [True]})
    with pytest.raises(InputError, match=r"task 'mood' says nowhere what it asks.*add `descriptions`"):
        trainer.train(tiny.settings(tmp_path / "run", adapter={"conditioning": "text"}))
    assert not (tmp_path / "run").exists()


def spoken(task: dict) -> dict:
    return {**task, "descriptions": SAID[task["name"]]}


def of_words(output: Path, family: str = "bert", **changes):
    """Settings of a run that goes by words."""
    given = {"adapter": {"conditioning": "text"}, **changes}
    if family == "bert":
        return tiny.settings(output, **{"tasks": [spoken(task) for task in tiny.tasks()], **given})
    return tiny_text.settings(output, family, **{"tasks": [spoken(task) for task in tiny_text.tasks()], **given})


@cache
def trained(family: str = "bert") -> Path:
    """A run that goes by words; for reading only."""
    return trainer.train(of_words(tiny.folder() / "run", family, training={"learning_rate": 0.02}))


GOLDEN = [0.75404, 0.87346, 1.90378, 0.99331]


def test_the_losses_are_those_on_record(tmp_path):
    run = trainer.train(
        of_words(
            tmp_path / "run",
            backbone=str(tiny.backbone(dropout=0.0)),
            adapter={"conditioning": "text", "r": 4, "dropout": 0.0, "target_modules": "query-value"},
            training={"steps": 4, "log_every": 1, "evaluate_every": 4, "checkpoint_every": 4, "schedule": "constant"},
        )
    )
    losses = [line["loss"] for line in tiny.lines(run) if line["kind"] == "train"]
    assert losses == pytest.approx(GOLDEN, abs=2e-4)


def test_resumed_is_uninterrupted(tmp_path):
    def stop(label, trainer):
        return tiny.Watch(lambda step: signal.raise_signal(signal.SIGINT) if step == 7 else None)

    changes = {"training": {"learning_rate": 0.02}}
    with pytest.raises(trainer.Interrupted):
        trainer.train(of_words(tmp_path / "run", **changes), progress=stop)
    found = runs.read_settings(tmp_path / "run")
    found.output = str(tmp_path / "run")
    resumed, whole = tiny.parts(trainer.train(found, resume=True)), tiny.parts(trained())
    for parts in (resumed, whole):
        parts.pop("results.json")  # which says its folder's name
    assert resumed == whole


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_loaded_scored_and_exported(family, tmp_path):
    run = runs.load_run(trained(family))
    assert run.tasks[1].descriptions == tuple(SAID["topic"])
    given = rows_of(run)
    assert not same(outputs(run, given), outputs(run, given, names=["topic", "mood", "heat"])), "the task matters"
    scores = scoring.evaluate_run(run, "test")[0]
    for entry in tiny.results(run.folder)["tasks"]:
        assert scores[entry["name"]] == pytest.approx(entry["metrics"]["test"], nan_ok=True)
    done = export(run, "topic", tmp_path / "topic")
    assert done.scores is None, "exact"
    plain = PeftModel.from_pretrained(
        runs.load_backbone(run.settings.backbone, runs.form(run.settings))[0], done.folder
    )
    again = runs.load_run(run.folder).model.method.backbone
    inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
    if family == "t5":
        inputs["decoder_input_ids"] = torch.zeros(len(given["tasks"]), 2, dtype=torch.long)
    wanted = output(again.eval(), **inputs, tasks="topic")
    assert apart(output(plain.eval(), **inputs), wanted) < 1e-5


@pytest.mark.parametrize("task", [TONE, WARMTH], ids=["classification", "regression"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_task_leaves_the_old_ones_alone(family, task, tmp_path):
    old = runs.load_run(trained(family))
    given = rows_of(old)
    steps = {"steps": 3} if family == "bert" else {}
    path = grow.add_task(old.folder, Task.from_dict(spoken(task)), tmp_path / "more", root=folder(), **steps)
    new = runs.load_run(path)
    assert [each.name for each in new.tasks] == [*tiny.NAMES, task["name"]]
    assert same(outputs(old, given), outputs(new, given))
    weights = [load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in (old, new)]
    changed = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    prefix = "base_model.uno_hypernetwork."
    own = {f"{prefix}{name}" for name in ("rows", "task_embedding.vectors", "task_embedding.counts")}
    assert (changed, weights[0].keys()) == (own, weights[1].keys())
    (change,) = tiny.results(path)["changes"]
    assert (change["start"], change["tune"]) == ("description", "row")
    assert (change["steps"], change["examples"] > 0) == ((3, True) if family == "bert" else (0, False))
    assert (path / f"metrics-{task['name']}.jsonl").is_file() == (family == "bert")
    split = scoring.read_split(new, 3, "test")
    entry = tiny.results(path)["tasks"][3]
    assert entry["rows"]["test"] == len(split)
    assert scoring.evaluate_run(new, "test")[0][task["name"]] == pytest.approx(entry["metrics"]["test"], nan_ok=True)
    less = runs.load_run(grow.remove_task(path, "topic", tmp_path / "less"))
    named = runs.load_run(grow.rename_task(less.folder, task["name"], "another", tmp_path / "named"))
    places = [0, 2, 3, 5]
    some, names = {name: value[places] for name, value in given.items()}, ["mood", "heat"]
    assert same(outputs(old, some, names), outputs(named, some, names))
    assert same(outputs(new, some, [task["name"]]), outputs(named, some, ["another"]))
    assert tiny.leftovers(tmp_path) == []


def test_the_map_may_be_tuned_with_replay(tmp_path):
    old = trained()
    path = grow.add_task(
        old, Task.from_dict(spoken(TONE)), tmp_path / "more", root=folder(), steps=3, tune="hypernetwork"
    )
    (change,) = tiny.results(path)["changes"]
    assert set(change["old_tasks"]) == set(tiny.NAMES)
    name = "base_model.uno_hypernetwork.task_embedding.map.weight"
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (old, path)]
    assert apart(weights[0][name], weights[1][name]) > 0


def test_tasks_that_cannot_come_by_words(tmp_path):
    tone, out = Task.from_dict(spoken(TONE)), tmp_path / "out"
    for family, task, more, message in (
        ("bert", tone, {"start": "mean"}, "a task's descriptions say its scale; leave out start"),
        ("bert", tone, {"steps": 0}, "the new task's head must be learned, so `steps` must be at least 1"),
        ("llama", tone, {"steps": 3}, "there is nothing to learn: give 0 steps, or tune hypernetwork or all"),
        ("llama", Task.from_dict(TONE), {}, "task 'tone' says nowhere what it asks"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            grow.add_task(trained(family), task, out, root=folder(), **more)
        assert not out.exists()
    assert tiny.leftovers(tmp_path) == []


def test_the_command(tmp_path, capsys):
    task = tmp_path / "new.yaml"
    task.write_text(yaml.safe_dump({**spoken(TONE), "source": {"train": str(folder() / "tone.jsonl")}}))
    out = tmp_path / "more"
    given = ["add-task", str(trained("llama")), "--task", str(task), "--output", str(out), "--steps", "0"]
    assert unolora_cli.main(given) == 0
    assert "start    description" in capsys.readouterr().out
    assert runs.load_run(out).row("tone") == 3
    assert unolora_cli.main([*given[:-3], str(tmp_path / "x"), "--steps", "2"]) == 2
    assert "there is nothing to learn" in capsys.readouterr().err


def test_a_description_longer_than_the_table_of_positions_is_cut_to_it():
    """RoBERTa counts its positions from behind the padding's, so that it takes two fewer than its table has rows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.RobertaConfig(
            vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=12, pad_token_id=1,
        )  # fmt: skip
        model = tf.RobertaModel(config).eval()

    class Tokenizer:
        model_max_length = 10**30

        def __call__(self, text, truncation=False, max_length=None):
            return {"input_ids": list(range(2, 2 + len(text)))[: max_length if truncation else None]}

    long, fitting = words.encode(model, Tokenizer(), ["x" * 40, "x" * 10])
    assert torch.equal(long, fitting)
