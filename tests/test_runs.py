"""What a run leaves on disk: whole, loadable bit for bit, by PEFT too, and refused by name when it is not."""

import itertools
import json
import stat

import pytest
import torch
import transformers as tf
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file

import tiny
from unolora import analysis, runs, scoring, tasks
from unolora.config import UnoLoraConfig
from unolora.data import Collator
from unolora.errors import CheckpointError, InputError

POSITIONS, WIDTH, INNER, RANK = 2, 32, 48, 4  # the second feed-forward maps of two layers
LORA = POSITIONS * RANK * (INNER + WIDTH)
HEADS = (2 + 3 + 1) * (WIDTH + 1)


def mlp(*widths):
    return sum(a * b + b for a, b in itertools.pairwise(widths))


def hypernetwork(sample):
    embeddings = len(tiny.NAMES) * 8 + POSITIONS * 8
    bottleneck = mlp(WIDTH, 16, 16, 8) if sample else 0
    return embeddings + bottleneck + mlp(24 if sample else 16, 16, 16, 16, 8) + POSITIONS * RANK * (8 + 1)


def bert():
    """Parameters of the tiny BERT without its pooler."""
    vocabulary = len(tiny.tokenizer())
    embeddings = (vocabulary + 48 + 2) * WIDTH + 2 * WIDTH
    layer = 4 * mlp(WIDTH, WIDTH) + 2 * WIDTH + mlp(WIDTH, INNER) + mlp(INNER, WIDTH) + 2 * WIDTH
    return embeddings + 2 * layer


def hyperformer():
    """Parameters of HyperFormer++ with embeddings of 8 and adapters of 4, and of the norms that it trains."""
    embeddings = (len(tiny.NAMES) + 2 + 2) * 8
    network = mlp(24, 16, 8) + 2 * 8 + mlp(8, 4 * WIDTH) + mlp(8, 4) + mlp(8, 4 * WIDTH) + 3 * mlp(8, WIDTH)
    return embeddings + network


NORMS = 5 * 2 * WIDTH  # of the tiny BERT
ROUTES = POSITIONS * len(tiny.NAMES) * 4  # Poly's logits: 4 skills
ADAPTER = {
    "c-poly": (4 + 3) * LORA + ROUTES,
    "full": bert(),
    "full-per-task": 3 * bert(),
    "heads-only": 0,
    "hyperformer": hyperformer() + NORMS,
    "ia3": 2 * (2 * WIDTH + WIDTH + INNER),  # PEFT scales the input of both `output.dense`
    "lora-matched": 18 * LORA // RANK,  # rank 18 is the first with as many as UnoLoRA*
    "lora-per-task": 3 * LORA,
    "lora-shared": LORA,
    "mtl-lora": POSITIONS * (RANK * (INNER + 3 * WIDTH) + 3 * (RANK * RANK + 3)),  # an A, three B's
    "poly": 4 * LORA + ROUTES,
    "prompt-tuning": 6 * WIDTH + 3 * (6 + WIDTH),
    "unolora": LORA + hypernetwork(sample=True),
}
ON_TOP = {**ADAPTER, "full": 0, "full-per-task": 2 * bert(), "hyperformer": hyperformer()}  # of the backbone


@pytest.mark.parametrize("method", tiny.METHODS)
def test_parameter_counts_are_those_of_the_formulas(method):
    found = tiny.results(tiny.trained(method))["parameters"]
    total = bert() + HEADS + ON_TOP[method]
    assert found["total"] == total
    assert found["heads"] == HEADS
    assert found["adapter"] == ADAPTER[method]
    assert found["trainable"] == ADAPTER[method] + HEADS
    assert found["trainable_percent"] == pytest.approx(100 * found["trainable"] / total)
    assert found["per_task_percent"] == pytest.approx(100 * ADAPTER[method] / bert() / 3)


@pytest.mark.parametrize("conditioning", ["none", "task"])
def test_parameter_counts_of_other_conditionings(conditioning):
    settings = tiny.settings(adapter={"conditioning": conditioning})
    model, _ = runs.build(settings, "unolora", tasks.resolve(tiny_tasks()), {})
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == LORA + HEADS + (hypernetwork(sample=False) if conditioning == "task" else 0)


def tiny_tasks():
    """With the labels that the training finds."""
    return [{**tiny.tasks("mood")[0], "labels": ["bad", "good"]}, *tiny.tasks("topic", "heat")]


# --- loading -------------------------------------------------------------------------------------------------------


def logits(model, trainer):
    splits = trainer.splits["test"]
    rows = [(row, split, i) for row, split in splits.items() for i in range(len(split))]
    return scoring.outputs(model, rows, trainer.data_collator)[0]


@pytest.mark.parametrize("method", tiny.METHODS)
def test_a_loaded_run_is_the_trained_model(method):
    folder = tiny.trained(method)
    trainer = tiny.TRAINERS[method]
    run = runs.load_run(folder)
    found = logits(run.model, trainer)
    assert torch.equal(found, logits(trainer.model, trainer))
    fresh, _ = runs.build(run.settings, method, run.tasks, {})
    assert not torch.equal(found, logits(fresh, trainer)), "training changed nothing"
    assert not run.model.training
    assert [task.name for task in run.tasks] == tiny.NAMES
    assert run.tasks[0].labels == ("bad", "good")
    assert run.settings.method == method


@pytest.mark.parametrize("method", tiny.METHODS)
def test_a_loaded_run_scores_as_its_results_say(method):
    run = runs.load_run(tiny.trained(method))
    results = tiny.results(tiny.trained(method))["tasks"]
    for split in ("validation", "test"):
        scores, rows = scoring.evaluate_run(run, split)
        assert scores == {task["name"]: task["metrics"][split] for task in results}
        assert rows == {task["name"]: task["rows"][split] for task in results}


@pytest.mark.parametrize("conditioning", ["none", "task"])
def test_other_conditionings_load_too(conditioning, tmp_path):
    from unolora import training

    settings = tiny.settings(tmp_path / "run", adapter={"conditioning": conditioning}, training={"steps": 3})
    trainers = {}
    training.train(settings, progress=tiny.watched(trainers, "it"))
    run = runs.load_run(tmp_path / "run")
    assert torch.equal(logits(run.model, trainers["it"]), logits(trainers["it"].model, trainers["it"]))


@pytest.mark.parametrize("method", ["unolora", "lora-shared"])
def test_peft_loads_the_adapter(method):
    """Plain PEFT, with no word of this library's loader: the same states."""
    folder = tiny.trained(method)
    model = PeftModel.from_pretrained(tf.AutoModel.from_pretrained(tiny.backbone()), folder / "adapter").eval()
    trainer = tiny.TRAINERS[method]
    split = trainer.splits["test"][2]
    batch = trainer.data_collator([(2, split, i) for i in range(4)])
    batch.pop("labels")
    arguments = batch if method == "unolora" else {name: value for name, value in batch.items() if name != "tasks"}
    with torch.no_grad():
        wanted = trainer.model.method.eval()(**batch)
        assert torch.equal(model(**arguments).last_hidden_state, wanted)
        with model.disable_adapter():
            assert not torch.equal(model(**arguments).last_hidden_state, wanted)
    if method == "unolora":
        assert isinstance(model.peft_config["default"], UnoLoraConfig)
        assert model.peft_config["default"].tasks == tiny.NAMES


def test_transformers_loads_a_fully_trained_backbone():
    folder = tiny.trained("full")
    model = tf.AutoModel.from_pretrained(folder / "adapter").eval()
    trained = tiny.TRAINERS["full"].model.method.backbone.state_dict()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in trained.items())


# --- what lies there -----------------------------------------------------------------------------------------------

PEFTS = {"adapter_config.json", "adapter_model.safetensors"}
FILES = {
    "c-poly": {"method.safetensors"},
    "full": {"config.json", "model.safetensors"},
    "full-per-task": {"method.safetensors"},
    "heads-only": set(),
    "hyperformer": {"method.safetensors"},
    "ia3": PEFTS,
    "lora-matched": PEFTS,
    "lora-per-task": {
        f"task_{n}/{f}" for n in tiny.NAMES for f in ("adapter_config.json", "adapter_model.safetensors")
    },
    "lora-shared": PEFTS,
    "mtl-lora": {"method.safetensors"},
    "poly": PEFTS,
    "prompt-tuning": {"method.safetensors"},
    "unolora": PEFTS,
}


@pytest.mark.parametrize("method", tiny.METHODS)
def test_the_files_of_a_run(method):
    run = tiny.trained(method)
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    adapter = {f"adapter/{name}" for name in FILES[method] | {"heads.safetensors", "tasks.json", "README.md"}}
    files = {
        "config.yaml", "data.json", "environment.json", "metrics.jsonl", "predictions.json", "results.json",
        "report.html",
    }  # fmt: skip
    learned = {f"analysis/{name}.{kind}" for name in ("table", "summary") for kind in ("csv", "parquet")}
    learned |= {"analysis/about.json", "analysis/arrays.safetensors"}
    if method == analysis.collect.PER_TASK:  # whose tasks compare with each other
        learned |= {"analysis/comparisons.csv", "analysis/comparisons.parquet"}
    assert found == files | adapter | (learned if method in analysis.WITH_PAIRS else set())
    modes = {stat.S_IMODE(path.stat().st_mode) for path in run.rglob("*") if path.is_file()}
    assert modes == {stat.S_IMODE((run / "metrics.jsonl").stat().st_mode)}, "as other programs' files, not private"


def test_tasks_json_and_the_card():
    adapter = tiny.trained() / "adapter"
    rows = json.loads((adapter / "tasks.json").read_text(encoding="utf-8"))
    assert [row["row"] for row in rows] == [0, 1, 2]
    assert [row["name"] for row in rows] == tiny.NAMES
    assert [row["labels"] for row in rows] == [["bad", "good"], ["plant", "animal", "tool"], []]
    assert runs.read_tasks(adapter / "tasks.json") == runs.load_run(tiny.trained()).tasks
    card = (adapter / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"library_name": "peft", "tags": ["unolora", "multi-task"]}
    assert "| 1 | topic | plant, animal, tool |" in card
    assert "| 2 | heat | a number |" in card
    assert "UnoLoRA* (task+sample)" in card


def test_heads_are_named_by_their_tasks():
    found = load_file(tiny.trained() / "adapter" / "heads.safetensors")
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "linear.task_mood.weight": (2, 32),
        "linear.task_mood.bias": (2,),
        "linear.task_topic.weight": (3, 32),
        "linear.task_topic.bias": (3,),
        "linear.task_heat.weight": (1, 32),
        "linear.task_heat.bias": (1,),
        "mean": (3,),
        "std": (3,),
    }


def test_the_environment_is_described():
    found = json.loads((tiny.trained() / "environment.json").read_text(encoding="utf-8"))
    assert set(found) == {
        "unolora", "torch", "transformers", "peft", "python", "platform", "processor", "processes", "threads", "date"
    }  # fmt: skip
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()


def test_the_config_is_the_settings_with_an_absolute_root():
    settings = runs.read_settings(tiny.trained())
    assert settings == tiny.settings(settings.output)


def test_a_relative_root_is_written_as_what_it_is_now(tmp_path, monkeypatch):
    from unolora import training

    monkeypatch.chdir(tiny.data().parent)
    settings = tiny.settings(tmp_path / "run", data={"root": tiny.data().name}, method="heads-only")
    training.train(settings)
    assert runs.read_settings(tmp_path / "run").data.root == str(tiny.data())
    monkeypatch.chdir(tmp_path)
    assert set(scoring.evaluate_run(runs.load_run("run"), "test")[0]) == set(tiny.NAMES)


# --- what is no run ------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"config\.yaml: no such file; a run folder holds config.yaml"):
        runs.load_run(tmp_path / "nothing")
    (tmp_path / "other.yaml").write_text("a: 1")
    with pytest.raises(InputError, match=r"no such file; a run folder holds config.yaml \(there: \['other.yaml'\]\)"):
        runs.load_run(tmp_path)


def test_an_unfinished_run(tmp_path):
    run = tiny.copied(tiny.trained(), tmp_path)
    (run / "adapter").rename(run / "elsewhere")
    with pytest.raises(InputError, match=r"no adapter/ in it; the run did not finish, go on with `unolora train --res"):
        runs.load_run(run)


WEIGHTS = {method: [file for file in FILES[method] if file.endswith(".safetensors")] for method in tiny.METHODS}
WEIGHTS["lora-per-task"] = ["task_topic/adapter_model.safetensors"]
DAMAGED = [(m, f) for m in tiny.METHODS for f in [*WEIGHTS[m], *(["heads.safetensors"] if m == "heads-only" else [])]]


@pytest.mark.parametrize(("method", "file"), DAMAGED)
@pytest.mark.parametrize("how", ["truncated", "missing", "empty", "foreign", "other shape", "one tensor less"])
def test_damaged_weights_are_named(method, file, how, tmp_path):
    run = tiny.copied(tiny.trained(method), tmp_path)
    runs.load_run(run)
    path = run / "adapter" / file
    data, tensors = path.read_bytes(), load_file(path)
    path.unlink()
    if how in ("truncated", "empty"):
        path.write_bytes(data[: len(data) // 2 if how == "truncated" else 0])
    elif how == "foreign":
        save_file({"weight": torch.zeros(3)}, path)
    elif how != "missing":
        name = next(name for name, value in tensors.items() if value.dim() == 2)
        other = {"other shape": {name: torch.zeros(5, 5)}, "one tensor less": {}}[how]
        save_file({k: v for k, v in tensors.items() if k != name} | other, path)
    with pytest.raises(CheckpointError) as error:
        runs.load_run(run)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"peft_type": "LORA"}', None])
@pytest.mark.parametrize("method", ["lora-shared", "unolora"])
def test_a_run_has_its_settings_in_its_own_config(method, text, tmp_path):
    """PEFT's adapter_config.json is for others: a damaged one costs no prediction."""
    run = tiny.copied(tiny.trained(method), tmp_path)
    path = run / "adapter" / "adapter_config.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert torch.equal(
        logits(runs.load_run(run).model, tiny.TRAINERS[method]),
        logits(tiny.TRAINERS[method].model, tiny.TRAINERS[method]),
    )


BROKEN_TASKS = ["", "{", "5", "[]", "[5]", '{"a": 1}', '[{"name": "x"}]', None]


@pytest.mark.parametrize("text", BROKEN_TASKS)
def test_damaged_tasks_are_named(text, tmp_path):
    run = tiny.copied(tiny.trained(), tmp_path)
    path = run / "adapter" / "tasks.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(CheckpointError, match=rf"^{path}: expected the list of tasks that a run writes"):
        runs.load_run(run)


def test_tasks_of_another_run_do_not_fit(tmp_path):
    run = tiny.copied(tiny.trained("lora-shared"), tmp_path)
    path = run / "adapter" / "tasks.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:2]))
    with pytest.raises(CheckpointError, match=r"heads.safetensors: does not fit tasks.json beside it: .*task_heat"):
        runs.load_run(run)


def test_tasks_in_another_order_do_not_fit(tmp_path):
    """The numbers would fit; only the names tell that each task would get another's scale."""
    run = tiny.copied(tiny.trained(), tmp_path)
    path = run / "adapter" / "tasks.json"
    path.write_text(json.dumps(json.loads(path.read_text())[::-1]))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        runs.load_run(run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "expected a mapping of settings, got list"),
        ("a: [", "not YAML: while parsing"),
        ("tasks: [mood]\ntraining: 5", "`training` must be a mapping of names to values, got 5"),
        ("tasks: [mood]\ntraining: {stepz: 5}", "unknown setting 'training.stepz'; did you mean 'training.steps'"),
        (
            "tasks: [mood]\ntraining: {learning_rate: fast}",
            "`training.learning_rate` must be of type float, got 'fast'",
        ),
        ("tasks: [mood]\nmethod: [unolora]", "`method` must be of type str"),
        ("tasks: mood", r"`tasks` must be of type list\[Any\], got 'mood'"),
    ],
)
def test_a_damaged_config_says_what_is_wrong(text, message, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        runs.load_run(tmp_path)


def test_a_config_that_is_not_utf8(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"backbone: \xff")
    with pytest.raises(InputError, match=r"config.yaml: not UTF-8 at byte 10; save it as UTF-8"):
        runs.load_run(tmp_path)


# --- backbones -----------------------------------------------------------------------------------------------------


def test_the_backbone_is_frozen_and_has_no_pooler():
    model, tokenizer = runs.load_backbone(str(tiny.backbone()))
    assert model.pooler is None
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer("bad")["input_ids"] == tiny.tokenizer()("bad")["input_ids"]
    assert len(tiny.tokenizer()("bad")["input_ids"]) == 3, "the words of the tasks are whole"


@pytest.mark.parametrize("name", ["./nothing", "/nothing/at/all", "a/b/c"])
def test_a_backbone_folder_that_is_not_there(name):
    with pytest.raises(InputError, match=rf"backbone '{name}': no such folder; give a folder with config.json"):
        runs.load_backbone(name)


def test_a_hub_backbone_without_a_network():
    with pytest.raises(InputError, match=r"backbone 'nobody/nothing' can't be loaded: .*give a folder, a hub id"):
        runs.load_backbone("nobody/nothing")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_backbone_is_one_line(file, tmp_path):
    folder = tiny.copied(tiny.backbone(), tmp_path)
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=rf"backbone '{folder}' can't be loaded: ") as error:
        runs.load_backbone(str(folder))
    assert "\n" not in str(error.value)


def test_a_backbone_without_a_width(tmp_path):
    config = tf.CLIPConfig(
        text_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
        vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
    )
    tf.CLIPModel(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="does not say how wide its states are"):
        runs.load_backbone(str(tmp_path))


def test_inputs_longer_than_the_positions_are_refused():
    settings = tiny.settings(data={"max_length": 48})
    runs.build(settings, "heads-only", tasks.resolve(tiny_tasks()), {})
    settings = tiny.settings(data={"max_length": 49})
    with pytest.raises(InputError, match=r"`data.max_length` is 49, but '.*tiny-bert' takes 48 tokens"):
        runs.build(settings, "heads-only", tasks.resolve(tiny_tasks()), {})


def test_roberta_counts_its_positions_from_the_padding_on(tmp_path):
    config = tf.RobertaConfig(
        vocab_size=len(tiny.tokenizer()), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=20, pad_token_id=0,
    )  # fmt: skip
    tf.RobertaModel(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    found = {}
    for length in (19, 20):
        settings = tiny.settings(backbone=str(tmp_path), data={"max_length": length})
        try:
            model, tokenizer = runs.build(settings, "heads-only", tasks.resolve(tiny_tasks()), {})
        except InputError as error:
            found[length] = str(error)
            continue
        inputs = tokenizer(["bad " * 50], truncation=True, max_length=length, return_tensors="pt")
        found[length] = model(**inputs, tasks=torch.tensor([0]))["logits"].shape
    assert found[19] == (1, 3)
    assert "takes 19 tokens" in found[20]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_trains_and_padding_does_not_matter(side, tmp_path):
    """GPT-2 has neither padding nor a mask for it in its positions."""
    from unolora import training

    words = tiny.tokenizer(padding_side=side, pad_token=None, eos_token="[SEP]")
    config = tf.GPT2Config(vocab_size=len(words), n_embd=32, n_layer=2, n_head=4, n_positions=48, initializer_range=0.3)
    backbone = tmp_path / "gpt2"
    tf.GPT2Model(config).save_pretrained(backbone)
    words.save_pretrained(backbone)
    settings = tiny.settings(tmp_path / "run", backbone=str(backbone), training={"steps": 3})
    trainers = {}
    training.train(settings, progress=tiny.watched(trainers, "it"))
    run = runs.load_run(tmp_path / "run")
    assert run.tokenizer.padding_side == side
    split = trainers["it"].splits["test"][0]
    assert len(set(split.lengths())) > 1
    rows = [(0, split, i) for i in range(len(split))]
    together, alone = (scoring.outputs(run.model, rows, Collator(run.tokenizer), size)[0] for size in (8, 1))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_methods_that_do_not_fit_are_one_line():
    for targets in (["nothing"], "(("):
        for method in ("unolora", "lora-shared", "lora-per-task"):
            settings = tiny.settings(adapter={"target_modules": targets})
            with pytest.raises(InputError) as error:
                runs.build(settings, method, tasks.resolve(tiny_tasks()), {})
            assert "\n" not in str(error.value)
