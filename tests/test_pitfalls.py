"""What has bitten other multi-task adapters: leaks, threads, nesting, copies, the Trainer."""

import copy
import gc
import inspect
import io
import pickle
import threading
import weakref

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, default_data_collator

from conftest import (
    CONDITIONINGS,
    MIXED,
    TASKS,
    VOCAB,
    adapted,
    adapter_weights,
    apart,
    backbone,
    batch,
    output,
    prompts,
    rows,
    same_weights,
    settings,
    training,
    wake,
)
from unolora import InputError, UnoLoraModel, register
from unolora.layer import current_scales

GIVEN = pytest.mark.parametrize("conditioning", CONDITIONINGS)


# Errors that leak


class OnPurposeError(RuntimeError):
    pass


@pytest.mark.parametrize("family", ["t5", "bert", "gpt2"])
def test_a_forward_that_fails_leaves_the_next_one_alone(family):
    model, inputs = adapted(family), batch(family)
    expected = output(model, **inputs, tasks=MIXED)

    def fail(*_):
        assert current_scales() is not None  # it fails in the middle
        raise OnPurposeError

    handle = list(model.layers("default").values())[1].register_forward_pre_hook(fail)
    for _ in range(2):
        with pytest.raises(OnPurposeError):
            model(**inputs, tasks="name")
        assert current_scales() is None
    handle.remove()
    assert torch.equal(output(model, **inputs, tasks=MIXED), expected)
    with pytest.raises(InputError, match="`tasks` is missing"):
        model(**inputs)


def test_a_generation_that_fails_leaves_the_next_one_alone():
    model, inputs = adapted("t5"), prompts("t5")
    expected = model.generate(**inputs, tasks=MIXED, max_new_tokens=4)

    def fail(*_):
        raise OnPurposeError

    handle = model.get_decoder().register_forward_pre_hook(fail)
    with pytest.raises(OnPurposeError):
        model.generate(**inputs, tasks="name", num_beams=2, max_new_tokens=4)
    handle.remove()
    assert current_scales() is None
    assert torch.equal(model.generate(**inputs, tasks=MIXED, max_new_tokens=4), expected)


def test_a_condition_that_fails_brings_back_the_one_before():
    model, inputs = adapted("bert"), batch("bert")
    expected = output(model, **inputs, tasks=MIXED)
    with model.condition(MIXED, **inputs):
        with pytest.raises(OnPurposeError), model.condition("name", **inputs):
            raise OnPurposeError
        with pytest.raises(InputError, match="unknown task"):
            model(**inputs, tasks="zzz")
        assert torch.equal(output(model, **inputs), expected)
    assert current_scales() is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_backward_that_fails_leaves_no_scale(reentrant):
    model, inputs = adapted("bert"), batch("bert")
    with training(model):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = model(**inputs, tasks=MIXED).loss

        def fail(*_):
            raise OnPurposeError

        handle = next(iter(model.layers("default").values())).register_forward_pre_hook(fail)
        with pytest.raises(OnPurposeError):
            loss.backward()
        handle.remove()
        assert current_scales() is None
        model(**inputs, tasks=MIXED).loss.backward()
    assert current_scales() is None


# Threads


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_two_threads_with_two_tasks(family):
    model, inputs = adapted(family), batch(family)
    tasks = ["rank", "sort"]
    expected = [output(model, **inputs, tasks=task) for task in tasks]
    assert apart(*expected) > 0.01
    barrier, wrong, errors = threading.Barrier(2, timeout=30), [], []

    def wait(*_):  # both threads are in the middle of a forward at once
        barrier.wait()

    handle = next(iter(model.layers("default").values())).register_forward_pre_hook(wait)

    def run(k: int) -> None:
        try:
            for _ in range(20):
                found = output(model, **inputs, tasks=tasks[k])
                if not torch.equal(found, expected[k]):
                    wrong.append(k)
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    handle.remove()
    assert not errors
    assert not wrong
    assert current_scales() is None


def test_a_condition_is_not_seen_by_other_threads():
    model, inputs, caught = adapted("bert"), batch("bert"), []

    def run() -> None:
        try:
            model(**inputs)
        except InputError as error:
            caught.append(error)

    with model.condition(MIXED, **inputs):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(60)
        model(**inputs)
    assert len(caught) == 1
    assert "`tasks` is missing" in str(caught[0])


def test_two_threads_train_with_two_tasks():
    """Gradients too, with checkpointing, whose recomputation comes in the backward."""
    inputs, tasks = batch("bert"), ["rank", "sort"]

    def gradients(model, task):
        parameters = [p for n, p in model.named_parameters() if ".uno_" in n]
        return torch.autograd.grad(model(**inputs, tasks=task).loss, parameters)

    with training(adapted("bert")) as model:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        expected = [gradients(model, task) for task in tasks]
        assert any(apart(a, b) > 1e-3 for a, b in zip(*expected, strict=True))
        found, barrier = [None, None], threading.Barrier(2, timeout=30)

        def run(k: int) -> None:
            barrier.wait()
            for _ in range(5):
                found[k] = gradients(model, tasks[k])

        threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    for k in range(2):
        assert all(apart(a, b) < 1e-5 for a, b in zip(found[k], expected[k], strict=True))


# Nesting


class Outer(nn.Module):
    """A model that asks another adapted model in the middle of its forward."""

    def __init__(self, inner: PeftModel, tasks: str | None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)
        self.inner, self.tasks = [inner], tasks  # not a submodule: an adapter of its own

    def forward(self, x: torch.Tensor, inputs: dict | None = None) -> torch.Tensor:
        hidden = self.first(x)
        if inputs is not None:
            more = {} if self.tasks is None else {"tasks": self.tasks}
            self.found = self.inner[0](**inputs, **more).logits
        return self.second(hidden.tanh())


def test_a_model_inside_another_models_forward():
    inner, inputs, x = adapted("bert"), batch("bert"), torch.randn(3, 8)
    wanted = {"target_modules": ["first", "second"], "sample_dim": 8}
    outer = wake(get_peft_model(Outer(inner, "name"), settings(**wanted))).eval()
    alone, theirs = output(outer, x=x, tasks=MIXED), output(inner, **inputs, tasks="name")
    assert apart(theirs, output(inner, **inputs, tasks=MIXED)) > 1e-3
    assert torch.equal(output(outer, x=x, inputs=inputs, tasks=MIXED), alone)
    assert torch.equal(outer.base_model.model.found, theirs)


def test_a_model_inside_another_does_not_take_the_others_tasks():
    inner, inputs, x = adapted("bert"), batch("bert"), torch.randn(3, 8)
    wanted = {"target_modules": ["first", "second"], "sample_dim": 8}
    outer = wake(get_peft_model(Outer(inner, None), settings(**wanted))).eval()
    with pytest.raises(InputError, match="`tasks` is missing"):
        outer(x, inputs=inputs, tasks=MIXED)
    assert current_scales() is None


# Modes


@GIVEN
def test_no_grad_and_inference_mode(conditioning):
    model, inputs = adapted("bert", conditioning), batch("bert")
    expected = output(model, **inputs, tasks=MIXED)
    with torch.inference_mode():
        assert torch.equal(model(**inputs, tasks=MIXED).logits.clone(), expected)
    found = model(**inputs, tasks=MIXED).logits
    assert found.requires_grad
    assert apart(found.detach(), expected) < 1e-5


def test_dropout_of_the_adapter_in_training_only():
    model, inputs = adapted("bert", dropout=0.5), batch("bert")
    assert torch.equal(output(model, **inputs, tasks=MIXED), output(model, **inputs, tasks=MIXED))
    assert torch.equal(output(model, **inputs, tasks=MIXED), output(adapted("bert"), **inputs, tasks=MIXED))
    with training(model):
        for layer in model.layers("default").values():
            layer.uno_dropout["default"].p = 0.5
        assert apart(output(model, **inputs, tasks=MIXED), output(model, **inputs, tasks=MIXED)) > 1e-3


# Copies


@GIVEN
@pytest.mark.parametrize("family", ["t5", "bert", "gpt2"])
def test_a_deep_copy_is_a_model_of_its_own(family, conditioning):
    model, inputs = adapted(family, conditioning), batch(family)
    expected = output(model, **inputs, tasks=MIXED)
    copied = copy.deepcopy(model)
    assert torch.equal(output(copied, **inputs, tasks=MIXED), expected)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if ".uno_" in name:
                parameter.zero_()
    changed = output(copied, **inputs, tasks=MIXED)
    assert apart(changed, expected) > 1e-3
    assert torch.equal(output(model, **inputs, tasks=MIXED), expected)
    assert apart(changed, output(backbone(family), **inputs)) < 1e-5  # B is zero
    wake(copied)
    if conditioning != "none":  # it asks its own hypernetwork
        with torch.no_grad():
            copied.uno_hypernetwork["default"].scale_bias.add_(1)
        assert apart(output(copied, **inputs, tasks=MIXED), expected) > 1e-3
        assert torch.equal(output(model, **inputs, tasks=MIXED), expected)


def test_a_deep_copy_lives_without_the_original():
    model, inputs = adapted("bert"), batch("bert")
    expected = output(model, **inputs, tasks=MIXED)
    copied, gone = copy.deepcopy(model), weakref.ref(model.base_model)
    del model
    gc.collect()
    assert gone() is None
    assert torch.equal(output(copied, **inputs, tasks=MIXED), expected)


@GIVEN
@pytest.mark.parametrize("family", ["t5", "bert"])
def test_pickled_and_back(family, conditioning):
    model, inputs = adapted(family, conditioning), batch(family)
    expected = output(model, **inputs, tasks=MIXED)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(output(loaded, **inputs, tasks=MIXED), expected)
    with pytest.raises(TypeError, match="did you mean 'tasks'"):
        loaded(**inputs, taks=MIXED)
    if family == "t5":
        a, b = (m.generate(**prompts("t5"), tasks=MIXED, num_beams=2, max_new_tokens=4) for m in (model, loaded))
        assert torch.equal(a, b)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(output(torch.load(buffer, weights_only=False), **inputs, tasks=MIXED), expected)


def test_a_deep_copy_of_a_model_that_checkpoints():
    inputs = batch("bert")
    with training(adapted("bert")) as model:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs, tasks=MIXED).loss.backward()
        copied = copy.deepcopy(model)
        copied.zero_grad()
        copied(**inputs, tasks=MIXED).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), copied.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            assert apart(ours.grad, theirs.grad) < 1e-5, name


def test_a_model_is_freed():
    model = adapted("t5")
    output(model, **batch("t5"), tasks=MIXED)
    gone = weakref.ref(model.base_model)
    del model
    gc.collect()
    assert gone() is None


# Wrapping twice


def test_wrapping_a_backbone_again_starts_afresh():
    bare, inputs = backbone("bert"), batch("bert")
    expected = output(bare, **inputs)
    wake(get_peft_model(bare, settings(task_type="SEQ_CLS")))
    other = settings("task", tasks=["x", "y"], target_modules=["key"], task_type="SEQ_CLS")
    # A notebook's cell that runs again; PEFT warns as well.
    with (
        pytest.warns(UserWarning, match="those adapters are taken out"),
        pytest.warns(UserWarning, match="second time"),
    ):
        again = get_peft_model(bare, other)
    assert [name.rpartition(".")[2] for name in again.layers("default")] == ["key", "key"]
    assert torch.equal(output(again.eval(), **inputs, tasks="x"), expected)
    assert sum(".uno_A." in name for name in again.state_dict()) == 2


def test_registering_again_changes_nothing():
    from peft import peft_model

    reader = peft_model.load_peft_weights
    register()
    assert peft_model.load_peft_weights is reader


# The Trainer


class Examples(torch.utils.data.Dataset):
    """Rows with a `tasks` column and one that nothing takes."""

    def __init__(self, n: int = 12, names: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(2, VOCAB, (n, 6), generator=generator).tolist()
        self.names = names

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict:
        task = TASKS[i % 3] if self.names else i % 3
        return {"input_ids": self.ids[i], "attention_mask": [1] * 6, "labels": i % 2, "tasks": task, "note": "unused"}


def table(n: int = 12):
    import datasets

    return datasets.Dataset.from_list([Examples(n)[i] for i in range(n)])


def arguments(folder, **more) -> TrainingArguments:
    return TrainingArguments(
        folder, max_steps=3, per_device_train_batch_size=4, per_device_eval_batch_size=4, learning_rate=0.05,
        report_to=[], use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True,
        **more,
    )  # fmt: skip


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
@GIVEN
def test_the_trainer_keeps_the_tasks(tmp_path, conditioning, task_type):
    model = get_peft_model(backbone("bert", num_labels=2), settings(conditioning, task_type=task_type))
    before, seen = adapter_weights(model), []
    forward = model.base_model.model.forward
    assert {"tasks", "sample_mask"} < set(inspect.signature(forward).parameters)
    model.base_model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("tasks")), with_kwargs=True
    )
    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=table(), eval_dataset=table(), data_collator=default_data_collator
    )
    assert trainer.args.remove_unused_columns
    trainer.train()
    assert len(seen) == 3
    assert all(isinstance(tasks, torch.Tensor) and tasks.shape == (4,) for tasks in seen)
    assert set(torch.cat(seen).tolist()) == {0, 1, 2}
    changed = {name for name, value in adapter_weights(model).items() if not torch.equal(value, before[name])}
    if conditioning != "none":
        assert any("task_embedding" in name for name in changed)
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(table()).predictions.shape == (12, 2)


def test_the_trainer_pads_and_checkpoints(tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "x": 1}, unk_token="x")),
        pad_token="[PAD]",
    )
    model = get_peft_model(backbone("bert", num_labels=2), settings(task_type="SEQ_CLS"))
    before = adapter_weights(model)
    trainer = Trainer(
        model,
        arguments(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
        train_dataset=table(),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    changed = {name for name, value in adapter_weights(model).items() if not torch.equal(value, before[name])}
    assert any("task_embedding" in name for name in changed)
    assert any("bottleneck" in name for name in changed)


def test_the_trainers_checkpoint_is_an_adapter_and_can_be_resumed(tmp_path):
    def trainer(steps: int) -> Trainer:
        model = get_peft_model(backbone("bert", num_labels=2), wake_free())
        settings_ = arguments(tmp_path, save_steps=2, seed=3)
        settings_.max_steps, settings_.save_strategy = steps, "steps"
        return Trainer(model, settings_, train_dataset=table(), data_collator=default_data_collator)

    def wake_free():
        torch.manual_seed(1)
        return settings(task_type="SEQ_CLS")

    whole = trainer(3)
    whole.train()
    resumed = trainer(3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ours, theirs = adapter_weights(whole.model), adapter_weights(resumed.model)
    assert ours.keys() == theirs.keys()
    assert all(apart(ours[name], theirs[name]) < 1e-5 for name in ours)
    loaded = PeftModel.from_pretrained(backbone("bert", num_labels=2), tmp_path / "checkpoint-3")
    assert same_weights(loaded, adapter_weights(whole.model))


def test_data_parallel_loaders_of_names():
    """Names as a collator of lists gives them."""
    model, inputs = adapted("bert"), batch("bert")
    names = [Examples(names=True)[i]["tasks"] for i in range(3)]
    assert names == TASKS
    assert torch.equal(output(model, **inputs, tasks=names), output(model, **inputs, tasks=torch.tensor([0, 1, 2])))


# Signatures


def test_signature_names_what_the_backbone_takes_and_ours():
    own = inspect.signature(type(backbone("t5")).forward).parameters
    forward = adapted("t5").base_model.model.forward
    assert forward.__name__ == "forward"
    found = inspect.signature(forward).parameters
    assert list(found) == [
        *[name for name in own if name not in ("self", "kwargs")],
        "tasks",
        "sample_mask",
        *[name for name in own if name == "kwargs"],
    ]


class Heads(nn.Module):
    """A backbone that looks at the tasks itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.heads = nn.Linear(8, 8), nn.Parameter(torch.randn(3, 8, 2))

    def forward(self, x: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bd,bdk->bk", self.first(x), self.heads[tasks])


def test_tasks_reach_a_backbone_that_names_them():
    bare, x, tasks = Heads(), torch.randn(3, 8), torch.tensor([1, 0, 2])
    expected = output(bare, x=x, tasks=tasks)
    model = get_peft_model(bare, settings("task", target_modules=["first"])).eval()
    assert list(inspect.signature(bare.forward).parameters) == ["x", "tasks", "sample_mask"]
    assert torch.equal(output(model, x=x, tasks=tasks), expected)
    assert apart(output(wake(model), x=x, tasks=tasks), expected) > 0.01


def test_arguments_by_position_reach_the_encoding():
    model, inputs = wake(get_peft_model(backbone("bert"), settings())).eval(), batch("bert")
    with torch.no_grad():
        found = model(inputs["input_ids"], inputs["attention_mask"], tasks=MIXED).logits
    assert torch.equal(
        found, output(model, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], tasks=MIXED)
    )
    with pytest.raises(TypeError, match="task"):
        model(inputs["input_ids"], inputs["attention_mask"], task=MIXED)


def test_a_tuner_called_directly_is_the_same():
    model, inputs = adapted("bert"), batch("bert")
    assert isinstance(model.base_model, UnoLoraModel)
    expected = output(model, **inputs, tasks=MIXED)
    assert torch.equal(output(model.base_model, **inputs, tasks=MIXED), expected)
    assert torch.equal(output(model.get_base_model(), **inputs, tasks=MIXED), expected)


def test_a_part_of_the_backbone_called_by_hand_needs_a_condition():
    model, inputs = adapted("bert"), batch("bert")
    part = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(InputError, match=r"scale of adapter 'default' is not known here.*model\.condition"):
        model.base_model.model.bert(**part)
    with model.condition(MIXED, **inputs):
        assert model.base_model.model.bert(**part).last_hidden_state.shape == (3, 7, 32)


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_batches_of_one_and_of_one_token(family):
    model, inputs = adapted(family), rows(batch(family), 0)
    del inputs["labels"]
    short = {name: value[:, -1:] for name, value in inputs.items()}
    more = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)} if family == "t5" else {}
    for part in (inputs, short):
        found = output(model, **part, **more, tasks="rank")
        assert found.isfinite().all()
        assert apart(found, output(model, **part, **more, tasks="name")) > 1e-4


def test_a_row_without_tokens_is_finite():
    model, inputs = adapted("bert"), batch("bert")
    inputs["attention_mask"][1] = 0
    assert output(model, **inputs, tasks=MIXED)[[0, 2]].isfinite().all()
