"""Methods: any mix of tasks in a batch is each row by itself, and a task's own LoRA is PEFT's."""

import copy

import pytest
import torch
from peft import get_peft_model

import tiny
from unolora import runs, scoring
from unolora.data import Collator, encode
from unolora.methods import METHODS, label
from unolora.methods.baselines import LoraPerTask, lora_config
from unolora.settings import Adapter, Settings
from unolora.tasks.rows import Rows

KNOW_TASKS = ("lora-per-task", "unolora")
TEXTS = [
    ("bad day",),
    ("the cat saw a good oak then it was very very very sad",),
    ("so",),
    ("hot ice", "fire and cold"),
]


@pytest.fixture(scope="module", params=tiny.METHODS)
def run(request):
    return runs.load_run(tiny.trained(request.param))


def mixed(run):
    """Rows of all tasks, of different lengths, in no order."""
    splits = [encode(Rows([text], torch.zeros(1).numpy()), run.tokenizer, 32) for text in TEXTS]
    tasks = [1, 0, 2, 2, 0, 1, 2]
    texts = [0, 1, 2, 3, 0, 1, 1]
    return [(task, splits[text], 0) for task, text in zip(tasks, texts, strict=True)]


def test_the_methods_are_all_tested():
    assert tuple(METHODS) == tiny.METHODS


def test_mixed_batch_is_row_by_row(run):
    rows = mixed(run)
    collate = Collator(run.tokenizer)
    together = scoring.logits(run.model, rows, collate)
    alone = torch.cat([scoring.logits(run.model, [row], collate) for row in rows])
    widths = collate(rows)["attention_mask"].sum(1)
    assert len(set(widths.tolist())) > 2, "no padding"
    finite = together.isfinite()
    assert torch.equal(finite, alone.isfinite())
    assert (together[finite] - alone[finite]).abs().max() < 1e-5
    for order in ([6, 5, 4, 3, 2, 1, 0], [3, 3, 0, 6]):
        found = scoring.logits(run.model, [rows[i] for i in order], collate)
        torch.testing.assert_close(found, together[order], atol=1e-5, rtol=0)


def test_tasks_are_felt_where_a_method_knows_them(run):
    """The states of one text under two tasks differ, or are the same, by method: the premise of the test above."""
    batch = Collator(run.tokenizer)([(0, mixed(run)[0][1], 0)] * 2)
    batch["tasks"] = torch.tensor([0, 2])
    batch.pop("labels")
    with torch.no_grad():
        states = run.model.method(**batch)
    assert torch.equal(states[0], states[1]) == (run.settings.method not in KNOW_TASKS)


def test_padding_tokens_are_not_felt(run):
    """What stands under a zero of the mask may be anything."""
    batch = Collator(run.tokenizer)(mixed(run))
    batch.pop("labels")
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7)}
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    with torch.no_grad():
        assert torch.equal(run.model(**batch)["logits"], run.model(**other)["logits"])


# --- LoRA for each task --------------------------------------------------------------------------------------------


def lora_per_task(dropout=0.0):
    backbone, _ = runs.load_backbone(str(tiny.backbone(dropout=0.0)))
    torch.manual_seed(3)
    config = lora_config(backbone, Adapter(r=4, dropout=dropout))
    model = LoraPerTask(backbone, tiny.NAMES, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def loras(model, task):
    """The parameters of a task's LoRA by their names in plain PEFT."""
    return {
        name.removeprefix("backbone.").replace(f".task_{task}.", ".default."): parameter
        for name, parameter in model.named_parameters()
        if f".task_{task}." in name
    }


def inputs(seed, tasks):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 40, (len(tasks), 6), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("tasks", [[0, 2, 0, 2], [2], [1, 0, 2, 1, 1]])
def test_only_the_tasks_of_a_batch_get_gradients(tasks):
    model = lora_per_task().train()
    assert len(loras(model, "mood")) == 8
    model(torch.tensor(tasks), **inputs(0, tasks)).square().mean().backward()
    for row, name in enumerate(tiny.NAMES):
        for key, parameter in loras(model, name).items():
            assert parameter.requires_grad, key
            if row in tasks:
                assert parameter.grad.abs().max() > 0, key
            else:
                assert parameter.grad is None, key
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_gradients_of_a_mixed_batch_are_those_of_its_rows():
    tasks, batch = [1, 0, 1, 2], inputs(1, range(4))
    model = lora_per_task().train()
    model(torch.tensor(tasks), **batch).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, task in enumerate(tasks):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        model(torch.tensor([task]), **one).square().sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == 24
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-4)


def test_a_tasks_lora_is_peft_alone_on_its_rows():
    """Batches of one task, in turn: each LoRA ends where PEFT's LoRA ends that saw that task's batches only."""
    together = lora_per_task()
    start = {task: {name: p.detach().clone() for name, p in loras(together, task).items()} for task in tiny.NAMES}
    steps = [(seed, seed % 3) for seed in range(9)]

    def train(model, call, batches):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for seed, task in batches:
            (call(task, inputs(seed, [task] * 4)) - 0.5).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    train(together, lambda task, batch: together(torch.full((4,), task), **batch), steps)
    for row, task in enumerate(tiny.NAMES):
        backbone, _ = runs.load_backbone(str(tiny.backbone(dropout=0.0)))
        alone = get_peft_model(backbone, copy.deepcopy(lora_config(backbone, Adapter(r=4))))
        assert {name for name, p in alone.named_parameters() if p.requires_grad} == start[task].keys()
        alone.load_state_dict(start[task], strict=False)
        train(
            alone,
            lambda _, batch, model=alone: model(**batch).last_hidden_state,
            [step for step in steps if step[1] == row],
        )
        found = {name: p for name, p in alone.named_parameters() if p.requires_grad}
        for name, parameter in loras(together, task).items():
            assert torch.equal(parameter, found[name]), name
            assert not torch.equal(parameter, start[task][name]), name


def test_names_of_tasks_do_not_meet():
    """`sort` begins `sort_more`, and `dense` is the name of a projection."""
    names = ["sort", "sort_more", "dense", "lora_A"]
    backbone, _ = runs.load_backbone(str(tiny.backbone()))
    model = LoraPerTask(backbone, names, lora_config(backbone, Adapter(r=2)))
    found = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(found) == len(set(found)) == len(names) * 8
    assert model(torch.tensor([3, 0]), **inputs(0, [0, 0])).shape == (2, 6, 32)


def test_lora_adapts_what_unolora_adapts():
    found = {}
    settings = Settings(tasks=list(tiny.NAMES), adapter=Adapter(r=4, alpha=12, dropout=0.25))
    for method in ("unolora", "lora-shared"):
        backbone, _ = runs.load_backbone(str(tiny.backbone()))
        model = METHODS[method](backbone, tiny.NAMES, settings)
        found[method] = {
            name.rpartition("base_model.model.")[2]
            for name, module in model.named_modules()
            if hasattr(module, "base_layer")
        }
        config = model.backbone.peft_config["default"]
        assert config.r == 4
        assert (config.alpha if method == "unolora" else config.lora_alpha) == 12
        assert (config.dropout if method == "unolora" else config.lora_dropout) == 0.25
    assert found["unolora"] == found["lora-shared"]
    assert len(found["unolora"]) == 4


def test_labels_of_methods():
    labels = [label(method, Adapter()) for method in METHODS]
    assert len(set(labels)) == len(METHODS)
    assert label("unolora", Adapter(conditioning="none")) == "UnoLoRA"
    assert label("unolora", Adapter(conditioning="task")) == "UnoLoRA* (task)"
