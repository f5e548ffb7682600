"""PEFT's interface: adapters added, switched, merged, deleted; what else hangs on to a model."""

import inspect

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.peft_model import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from safetensors.torch import load_file
from torch import nn

from conftest import (
    CONDITIONINGS,
    FAMILIES,
    MIXED,
    TASKS,
    adapted,
    adapter_weights,
    apart,
    backbone,
    batch,
    first_head,
    output,
    prompts,
    rows,
    same_weights,
    scales_of,
    settings,
    training,
    wake,
)
from unolora import InputError, UnoLoraConfig, UnoLoraModel
from unolora.layer import current_scales

GIVEN = pytest.mark.parametrize("conditioning", CONDITIONINGS)
MERGEABLE = pytest.mark.parametrize("conditioning", ["none", "task"])
CLASSES = [
    ("SEQ_CLS", "bert", PeftModelForSequenceClassification),
    ("TOKEN_CLS", "bert", PeftModelForTokenClassification),
    ("QUESTION_ANS", "bert", PeftModelForQuestionAnswering),
    ("FEATURE_EXTRACTION", "bert", PeftModelForFeatureExtraction),
    ("CAUSAL_LM", "gpt2", PeftModelForCausalLM),
    ("SEQ_2_SEQ_LM", "t5", PeftModelForSeq2SeqLM),
]
HEADS = [(family, head, head, kind) for head, family, kind in CLASSES] + [
    (family, head, None, PeftModel) for head, family, _ in CLASSES
]
EVERY_CLASS = pytest.mark.parametrize(
    ("family", "head", "task_type", "kind"), HEADS, ids=[f"{h}-{k.__name__}" for _, h, _, k in HEADS]
)
OTHER = ["late", "sort", "wide", "deep"]  # one name of theirs is of the first adapter's, in another row


def two_adapters(family: str = "bert", second: str = "task", **more) -> PeftModel:
    """A model with the adapter "default" (task+sample) and "second", with other tasks, rank and conditioning."""
    model = adapted(family)
    model.add_adapter("second", settings(second, tasks=OTHER, r=3, task_type=first_head(family), **more))
    return wake(model).eval()


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def of_adapter(model: nn.Module, adapter: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if ".uno_" in name and adapter in name.split(".")}


# Every class of PEFT's


@GIVEN
@EVERY_CLASS
def test_tasks_reach_every_class(family, head, task_type, kind, conditioning):
    model = wake(get_peft_model(backbone(family, head), settings(conditioning, task_type=task_type))).eval()
    assert type(model) is kind
    assert isinstance(model.base_model, UnoLoraModel)
    inputs = batch(family, head)
    together = output(model, **inputs, tasks=MIXED)
    assert apart(together, output(backbone(family, head), **inputs)) > 1e-3
    for i, task in enumerate(MIXED):
        assert apart(together[i : i + 1], output(model, **rows(inputs, i), tasks=[task])) < 1e-4
    if conditioning != "none":
        assert apart(together, output(model, **inputs, tasks="sort")) > 1e-3


@EVERY_CLASS
def test_missing_tasks_are_noticed_in_every_class(family, head, task_type, kind):
    model, inputs = get_peft_model(backbone(family, head), settings(task_type=task_type)), batch(family, head)
    for wrong in ({}, {"tasks": None}):
        with pytest.raises(InputError, match=r"`tasks` is missing.*known: sort, rank, name"):
            model(**inputs, **wrong)


@EVERY_CLASS
@pytest.mark.parametrize("wrong", ["task_ids", "task", "taks", "task_id", "taskes", "task_names"])
def test_misspelt_tasks_are_noticed_in_every_class(family, head, task_type, kind, wrong):
    model, inputs = get_peft_model(backbone(family, head), settings(task_type=task_type)), batch(family, head)
    # PEFT's own classes drop `task_ids` before anybody else can see it
    with pytest.raises((InputError, TypeError), match=r"did you mean 'tasks'|`tasks` is missing.*`task_ids`"):
        model(**inputs, **{wrong: torch.tensor([0, 1, 2])})
    if wrong != "task_ids":
        with pytest.raises(TypeError, match=f"unexpected argument {wrong!r}; did you mean 'tasks'"):
            model(**inputs, tasks=MIXED, **{wrong: torch.tensor([0, 1, 2])})


def test_misspelt_sample_mask_is_noticed():
    with pytest.raises(TypeError, match="unexpected argument 'sample_masks'; did you mean 'sample_mask'"):
        adapted("bert")(**batch("bert"), tasks=MIXED, sample_masks=torch.ones(3, 7))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["rank", "sort"], "one task for each sample: got 2 for a batch of 3"),
        (["rank"], "got 1 for a batch of 3"),
        (["rank"] * 4, "got 4 for a batch of 3"),
        ([], "got 0 for a batch of 3"),
        (torch.tensor([0, 1]), "got 2 for a batch of 3"),
        (["rank", "srot", "sort"], "unknown task 'srot'; did you mean 'sort'.*known: sort, rank, name"),
        ("names", "unknown task 'names'; did you mean 'name'"),
        ("zzz", r"unknown task 'zzz' \(known"),
        ([0, 1, 3], "unknown task row 3: the rows are 0 to 2"),
        ([0, -1, 2], "unknown task row -1"),
        (torch.tensor([0, 1, 7]), "unknown task row 7"),
        (torch.tensor([[0, 1, 2]]), r"must be a LongTensor \[batch\]"),
        (torch.tensor(1), r"must be a LongTensor \[batch\]"),
        (torch.tensor([0.0, 1.0, 2.0]), "must be a LongTensor"),
        (torch.tensor([True, False, True]), "must be a LongTensor"),
        (1, "must be names or rows"),
        ([0.0, 1.0, 2.0], "must be names or rows"),
        ([["rank"], ["sort"], ["name"]], "must be names or rows"),
    ],
)
def test_wrong_tasks_are_refused(tasks, message):
    model, inputs = adapted("bert"), batch("bert")
    output(model, **inputs, tasks=MIXED)
    with pytest.raises(InputError, match=message) as caught:
        model(**inputs, tasks=tasks)
    assert "\n" not in str(caught.value)
    assert current_scales() is None


@EVERY_CLASS
def test_adapter_names_are_not_dropped_silently(family, head, task_type, kind):
    model, inputs = get_peft_model(backbone(family, head), settings(task_type=task_type)), batch(family, head)
    with pytest.raises(InputError, match="`adapter_names` can't differ within a batch; what differs are `tasks`"):
        model(**inputs, tasks=MIXED, adapter_names=["default"] * 3)


def test_plain_unolora_ignores_tasks():
    model, inputs = adapted("bert", "none", tasks=[]), batch("bert")
    assert torch.equal(output(model, **inputs), output(model, **inputs, tasks=["anything"] * 3))


# Several adapters


@pytest.mark.parametrize("second", CONDITIONINGS)
def test_two_adapters_with_different_tasks(second):
    model, inputs = two_adapters(second=second), batch("bert")
    first = output(adapted("bert"), **inputs, tasks=MIXED)
    assert torch.equal(output(model, **inputs, tasks=MIXED), first)
    model.set_adapter("second")
    theirs = output(model, **inputs, tasks=["deep", "late", "sort"])
    assert apart(theirs, first) > 0.01
    if second != "none":
        with pytest.raises(InputError, match=r"unknown task 'rank'.*known: late, sort, wide, deep"):
            model(**inputs, tasks=MIXED)
        assert apart(output(model, **inputs, tasks="sort"), output(model, **inputs, tasks="late")) > 1e-3
        assert torch.equal(output(model, **inputs, tasks="sort"), output(model, **inputs, tasks=[1, 1, 1]))
    model.set_adapter("default")
    assert torch.equal(output(model, **inputs, tasks=MIXED), first)


def test_adding_an_adapter_leaves_the_first_ones_weights_and_training_alone():
    model = adapted("bert")
    before, trained = adapter_weights(model), trainable(model)
    model.add_adapter("second", settings("task", tasks=OTHER, task_type="SEQ_CLS"))
    assert same_weights(model, before)
    assert trainable(model) == trained
    assert "second" not in {part for name in trained for part in name.split(".")}


def test_only_the_active_adapter_is_trained():
    model = two_adapters()
    assert of_adapter(model, "default") <= trainable(model)
    assert not of_adapter(model, "second") & trainable(model)
    model.set_adapter("second")
    assert of_adapter(model, "second") <= trainable(model)
    assert any("uno_hypernetwork" in name for name in of_adapter(model, "second"))
    assert not of_adapter(model, "default") & trainable(model)
    model.set_adapter("default", inference_mode=True)
    assert not (of_adapter(model, "default") | of_adapter(model, "second")) & trainable(model)


def test_requires_grad_is_switched_with_the_hypernetwork():
    model = two_adapters()
    model.set_requires_grad("default", requires_grad=False)
    assert not of_adapter(model, "default") & trainable(model)
    model.set_requires_grad(["default", "second"])
    assert of_adapter(model, "default") | of_adapter(model, "second") <= trainable(model)


def test_several_adapters_at_once_add_up():
    # One layer, and no layer norm or attention in between, so that the updates themselves can be added.
    torch.manual_seed(0)
    x, bare = torch.randn(3, 5, 8), nn.Sequential(nn.Linear(8, 6))
    model = get_peft_model(bare, settings("task", target_modules=["0"]))
    model.add_adapter("second", settings("none", tasks=[], target_modules=["0"]))
    model.add_adapter(
        "third", settings("task+sample", r=2, tasks=["rank", "name", "sort"], target_modules=["0"], sample_dim=8)
    )
    wake(model).eval()
    base = output(model.base_model.model[0].base_layer, input=x)
    found = {}
    for active in (["default"], ["second"], ["third"], ["default", "second", "third"]):
        model.base_model.set_adapter(active)
        found[len(active), active[0]] = output(model, input=x, tasks=MIXED) - base
    singles = [found[1, name] for name in ("default", "second", "third")]
    assert all(update.abs().max() > 0.1 for update in singles)
    torch.testing.assert_close(found[3, "default"], sum(singles))
    model.base_model.set_adapter(["default", "third"])
    with pytest.raises(InputError, match="unknown task"):
        model(x, tasks=["zzz"] * 3)


def test_disabled_adapter_is_the_backbone_and_asks_no_tasks():
    model, inputs = two_adapters(), batch("bert")
    active, trained = output(model, **inputs, tasks=MIXED), trainable(model)
    with model.disable_adapter():
        assert torch.equal(output(model, **inputs), output(backbone("bert"), **inputs))
        assert torch.equal(output(model, **inputs, tasks=MIXED), output(backbone("bert"), **inputs))
        assert not (of_adapter(model, "default") | of_adapter(model, "second")) & trainable(model)
    assert torch.equal(output(model, **inputs, tasks=MIXED), active)
    assert trainable(model) == trained
    with pytest.raises(RuntimeError, match="on purpose"), model.disable_adapter():
        raise RuntimeError("on purpose")
    assert torch.equal(output(model, **inputs, tasks=MIXED), active)


def test_deleting_the_inactive_adapter():
    model, inputs = two_adapters(), batch("bert")
    expected, trained = output(model, **inputs, tasks=MIXED), trainable(model)
    model.delete_adapter("second")
    assert set(model.peft_config) == {"default"}
    assert not of_adapter(model, "second")
    assert trainable(model) == trained
    assert torch.equal(output(model, **inputs, tasks=MIXED), expected)


@pytest.mark.parametrize("second", CONDITIONINGS)
def test_deleting_the_active_adapter_makes_the_other_the_active_one(second):
    model, inputs = two_adapters(second=second), batch("bert")
    model.set_adapter("second")
    expected = output(model, **inputs, tasks="sort")
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="default was active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert torch.equal(output(model, **inputs, tasks="sort"), expected)
    assert of_adapter(model, "second") <= trainable(model)
    assert not of_adapter(model, "default")
    model(**inputs, tasks="sort").loss.backward()
    assert model.get_model_status().active_adapters == ["second"]


def test_deleting_an_adapter_with_other_projections():
    model, inputs = adapted("bert", target_modules=["query"]), batch("bert")
    model.add_adapter("second", settings("task", target_modules=["value"], task_type="SEQ_CLS"))
    wake(model).eval()
    model.set_adapter("second")
    expected = output(model, **inputs, tasks=MIXED)
    model.set_adapter("default")
    assert apart(output(model, **inputs, tasks=MIXED), expected) > 1e-3
    with pytest.warns(UserWarning, match="default was active"):
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert torch.equal(output(model, **inputs, tasks=MIXED), expected)
    assert of_adapter(model, "second") <= trainable(model)


def test_deleting_the_last_adapter_leaves_the_backbone():
    model, inputs = adapted("gpt2"), batch("gpt2")
    model.base_model.delete_adapter("default")
    assert torch.equal(output(model.base_model, **inputs), output(backbone("gpt2"), **inputs))


def test_adapters_of_the_same_name_and_of_another_method_are_refused():
    model = adapted("gpt2")
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("default", settings())
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("other", LoraConfig())


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_beside_a_plain_lora(tmp_path):
    """LoRA on the keys, UnoLoRA* on queries and values, each with its own files."""
    inputs = batch("bert")
    lora = get_peft_model(backbone("bert"), LoraConfig(target_modules=["key"], init_lora_weights=False)).eval()
    lora.save_pretrained(tmp_path / "lora")  # later, PEFT would put what UnoLoRA adds into the file as well
    lora.requires_grad_(False)  # else the two train together
    alone = output(lora, **inputs)
    model = wake(get_peft_model(lora.base_model.model, settings())).eval()
    both = output(model, **inputs, tasks=MIXED)
    assert apart(both, alone) > 1e-3, "UnoLoRA is felt"
    assert apart(both, output(adapted("bert"), **inputs, tasks=MIXED)) > 1e-3, "LoRA is felt"
    assert (type(lora.peft_config["default"]), type(model.peft_config["default"])) == (LoraConfig, UnoLoraConfig)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert [n for n in trained if ".uno_" not in n] == [], "LoRA stays frozen"
    model.save_pretrained(tmp_path / "uno")
    assert all(".uno_" in name for name in load_file(tmp_path / "uno" / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(backbone("bert"), tmp_path / "lora").eval()
    assert torch.equal(output(again, **inputs), alone), "its files go alone"
    again = PeftModel.from_pretrained(again.base_model.model, tmp_path / "uno").eval()
    assert torch.equal(output(again, **inputs, tasks=MIXED), both)
    with again.disable_adapter():  # PEFT's switch is for all adapters of a backbone
        assert torch.equal(output(again, **inputs), output(backbone("bert"), **inputs))
    query_value = settings(target_modules="query-value")
    with pytest.raises(InputError, match="which has an adapter of another method already"):
        get_peft_model(get_peft_model(backbone("bert"), LoraConfig()).base_model.model, query_value)


@pytest.mark.parametrize("name", ["a.b", "train", "keys", "to"])
def test_adapter_names_that_torch_cannot_hold(name):
    with pytest.raises(InputError, match=f"an adapter can't be called {name!r}"):
        get_peft_model(backbone("gpt2"), settings(), adapter_name=name)
    model = adapted("gpt2")
    before = list(model.state_dict())
    model.base_model.peft_config[name] = settings()
    with pytest.raises(InputError, match="an adapter can't be called"):
        model.base_model.inject_adapter(model.base_model.model, name)
    assert list(model.state_dict()) == before


def test_adding_an_adapter_that_fails_leaves_no_trace():
    model, inputs = adapted("bert"), batch("bert")
    before, names = output(model, **inputs, tasks=MIXED), list(model.state_dict())
    with pytest.raises(InputError, match=r"matches 'bert\.embeddings\.word_embeddings'"):
        model.add_adapter("second", settings(target_modules=["query", "word_embeddings"], task_type="SEQ_CLS"))
    assert list(model.peft_config) == ["default"]
    assert list(model.state_dict()) == names
    assert torch.equal(output(model, **inputs, tasks=MIXED), before)
    model.add_adapter("second", settings(target_modules=["query"], task_type="SEQ_CLS"))


# Merging


@MERGEABLE
def test_merge_and_unmerge(conditioning):
    model, inputs = adapted("t5", conditioning), batch("t5")
    W = {name: value.clone() for name, value in model.state_dict().items() if name.endswith("base_layer.weight")}
    expected = output(model, **inputs, tasks="name")
    model.merge_adapter(tasks="name")
    assert all(apart(model.state_dict()[name], value) > 1e-3 for name, value in W.items())
    assert apart(output(model, **inputs, tasks="name"), expected) < 1e-5 * expected.abs().max()
    assert apart(output(model, **inputs), output(model, **inputs, tasks="name")) == 0  # nothing left to tell apart
    model.merge_adapter(tasks="name")  # again: nothing more to merge
    assert apart(output(model, **inputs), expected) < 1e-5 * expected.abs().max()
    model.unmerge_adapter()
    assert all(apart(model.state_dict()[name], value) < 1e-6 for name, value in W.items())
    assert apart(output(model, **inputs, tasks="name"), expected) < 1e-5 * expected.abs().max()


def test_merged_model_serves_its_task_only():
    model, inputs = adapted("bert", "task"), batch("bert")
    model.merge_adapter(tasks="name")
    for tasks in (MIXED, "rank", [0, 1, 2]):
        with pytest.raises(InputError, match="adapter 'default' is merged for task 'name' only; call unmerge_adapter"):
            model(**inputs, tasks=tasks)
    with pytest.raises(InputError, match="is merged for task 'name' already; call unmerge_adapter"):
        model.merge_adapter(tasks="rank")
    with pytest.raises(InputError, match="is merged for task 'name' already"):
        model.merge_and_unload(tasks="rank")
    expected = output(model, **inputs, tasks=[2, 2, 2])
    merged = model.merge_and_unload(tasks=[2])
    assert torch.equal(output(merged, **inputs), expected)


@pytest.mark.parametrize("tasks", ["name", ["name"], [2], torch.tensor([2])])
def test_task_to_merge_is_named_as_any_task(tasks):
    model, inputs = adapted("bert", "task"), batch("bert")
    expected = output(model, **inputs, tasks="name")
    assert apart(output(model.merge_and_unload(tasks=tasks), **inputs), expected) < 1e-5


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize(
    ("conditioning", "arguments", "message"),
    [
        ("task+sample", {"tasks": "name"}, r"for each sample \(conditioning='task\+sample'\)"),
        ("task", {}, "name the one task to merge, e.g. tasks='sort'"),
        ("task", {"tasks": ["name", "sort"]}, "name the one task to merge"),
        ("task", {"tasks": []}, "name the one task to merge"),
        ("task", {"tasks": "nome"}, "unknown task 'nome'; did you mean 'name'"),
        ("task", {"tasks": [3]}, "unknown task row 3"),
        ("none", {"adapter_names": "default"}, "`adapter_names` must be a list of names, got 'default'"),
        ("none", {"adapter_names": ["defualt"]}, "unknown adapter 'defualt'; did you mean 'default'"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_nothing_changes(method, conditioning, arguments, message):
    model, inputs = adapted("bert", conditioning), batch("bert")
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, output(model, **inputs, tasks=MIXED)
    with pytest.raises(InputError, match=message):
        getattr(model, method)(**arguments)
    assert same_weights(model, before)
    assert torch.equal(output(model, **inputs, tasks=MIXED), expected)


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_changes_nothing_when_a_weight_is_broken(method):
    model, inputs = adapted("bert", "none"), batch("bert")
    last = list(model.layers("default").values())[-1]
    with torch.no_grad():
        last.uno_B["default"][0, 0] = torch.inf
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        InputError, match=r"merging adapter 'default' into '.*output.dense' gives values that are not finite"
    ):
        getattr(model, method)(safe_merge=True)
    assert same_weights(model, before)
    with torch.no_grad():
        last.uno_B["default"][0, 0] = 0.1
    expected = output(model, **inputs)
    merged = model.merge_and_unload(safe_merge=True)
    assert apart(output(merged, **inputs), expected) < 1e-5


def test_merging_into_a_quantised_weight_is_refused():
    model = adapted("bert", "none")
    for layer in model.layers("default").values():
        weight = layer.base_layer.weight
        layer.base_layer.weight = nn.Parameter((weight * 10).to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"W is stored as torch\.int8: load the backbone unquantised"):
        model.merge_adapter()


@MERGEABLE
def test_disabling_a_merged_adapter_takes_it_out(conditioning):
    model, inputs = adapted("bert", conditioning), batch("bert")
    expected = output(model, **inputs, tasks="name")
    model.merge_adapter(tasks="name")
    with model.disable_adapter():
        assert apart(output(model, **inputs), output(backbone("bert"), **inputs)) < 1e-5
    assert apart(output(model, **inputs, tasks="name"), expected) < 1e-5
    assert (
        apart(output(model, **inputs, tasks=MIXED), output(adapted("bert", conditioning), **inputs, tasks=MIXED)) < 1e-5
    )


def test_switching_a_merged_model_takes_the_first_adapter_out():
    model, inputs = adapted("bert", "task"), batch("bert")
    model.add_adapter("second", settings("task", tasks=OTHER, task_type="SEQ_CLS"))
    wake(model).eval()
    model.set_adapter("second")
    theirs = output(model, **inputs, tasks="late")
    model.set_adapter("default")
    ours = output(model, **inputs, tasks=MIXED)
    model.merge_adapter(tasks="name")
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("second")
    assert apart(output(model, **inputs, tasks="late"), theirs) < 1e-5
    model.set_adapter("default")
    assert apart(output(model, **inputs, tasks=MIXED), ours) < 1e-5


def test_merged_adapter_cannot_be_deleted():
    model = adapted("bert", "none")
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")


def test_several_adapters_merged_into_one_weight():
    model, inputs = adapted("gpt2", "task"), batch("gpt2")
    model.add_adapter("second", settings("none", tasks=[], r=2, task_type="CAUSAL_LM"))
    wake(model).eval()
    model.base_model.set_adapter(["default", "second"])
    expected = output(model, **inputs, tasks="rank")
    assert apart(expected, output(adapted("gpt2", "task"), **inputs, tasks="rank")) > 0.01
    merged = model.merge_and_unload(tasks="rank")
    assert apart(output(merged, **inputs), expected) < 1e-4


def test_merging_the_inactive_adapter_by_name():
    model, inputs = two_adapters(second="task"), batch("bert")
    model.set_adapter("second")
    expected = output(model, **inputs, tasks="wide")
    model.set_adapter("default")
    classifier = {n: p for n, p in model.named_modules() if n.endswith("classifier")}
    assert classifier
    merged = model.merge_and_unload(adapter_names=["second"], tasks="wide")
    assert (
        apart(
            merged.bert(**{k: v for k, v in inputs.items() if k != "labels"}).last_hidden_state,
            backbone("bert").bert(**{k: v for k, v in inputs.items() if k != "labels"}).last_hidden_state,
        )
        > 1e-3
    )
    assert expected.shape == output(merged, **inputs).shape


def test_unload_gives_back_the_backbone():
    bare = backbone("t5")
    state, attributes = {k: v.clone() for k, v in bare.state_dict().items()}, set(vars(bare))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in bare.modules()]
    types, inputs = [type(m) for m in bare.modules()], batch("t5")
    expected = output(bare, **inputs)
    with training(wake(get_peft_model(bare, settings(task_type="SEQ_2_SEQ_LM")))) as model:
        model(**inputs, tasks=MIXED).loss.backward()
    clean = model.unload()
    assert clean is bare
    assert [type(m) for m in clean.modules()] == types
    assert set(vars(clean)) == attributes
    assert "forward" not in vars(clean)
    assert "generate" not in vars(clean)
    assert "tasks" not in inspect.signature(clean.forward).parameters
    assert list(clean.state_dict()) == list(state)
    assert same_weights(clean, state)
    assert torch.equal(output(clean.eval(), **inputs), expected)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in clean.modules()] == hooks
    again = get_peft_model(clean, settings(task_type="SEQ_2_SEQ_LM")).eval()
    assert torch.equal(output(again, **inputs, tasks=MIXED), expected)


@pytest.mark.parametrize("merge", [True, False])
def test_unload_gives_back_the_checkpointing(merge):
    bare, inputs = backbone("bert"), batch("bert")
    bare.gradient_checkpointing_enable({"use_reentrant": False})
    function = bare.bert.encoder.layer[0]._gradient_checkpointing_func
    model = get_peft_model(bare, settings("task", task_type="SEQ_CLS")).train()
    model(**inputs, tasks=MIXED).loss.backward()
    assert bare.bert.encoder.layer[0]._gradient_checkpointing_func is not function
    clean = model.merge_and_unload(tasks="rank") if merge else model.unload()
    assert all(getattr(m, "_gradient_checkpointing_func", function) is function for m in clean.modules())
    clean(**inputs).loss.backward()


def test_unload_after_merging_gives_back_the_backbone():
    model, inputs = adapted("bert", "none"), batch("bert")
    model.merge_adapter()
    hidden = {k: v for k, v in inputs.items() if k != "labels"}
    assert apart(output(model.unload().bert, **hidden), output(backbone("bert").bert, **hidden)) < 1e-5


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"vit"}))
def test_merged_and_unloaded_backbone_is_an_ordinary_model(family, tmp_path):
    inputs = batch(family)
    merged = adapted(family, "task").merge_and_unload(tasks="sort")
    assert not [name for name in merged.state_dict() if "uno_" in name or "base_layer" in name]
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path).eval()
    assert apart(output(loaded, **inputs), output(merged, **inputs)) < 1e-5


# Modules trained beside the adapter


def test_modules_to_save(tmp_path):
    model, inputs = adapted("bert", modules_to_save=["pooler"]), batch("bert")
    saved = {name for name in trainable(model) if "modules_to_save" in name}
    assert {name.split(".modules_to_save")[0].rpartition(".")[2] for name in saved} == {"pooler", "classifier"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in saved:
                parameter.add_(0.1)
    expected = output(model, **inputs, tasks=MIXED)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(backbone("bert"), tmp_path)
    assert torch.equal(output(loaded, **inputs, tasks=MIXED), expected)
    with model.disable_adapter():
        assert torch.equal(output(model, **inputs), output(backbone("bert"), **inputs))


def test_modules_to_save_train_with_the_adapter():
    model, inputs = adapted("gpt2", modules_to_save=["wte"], task_type="TOKEN_CLS"), batch("gpt2", "TOKEN_CLS")
    model(**inputs, tasks=MIXED).loss.backward()
    wanted = {name for name in trainable(model) if "modules_to_save" in name}
    assert wanted
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if name in wanted)


# Gradient checkpointing


@GIVEN
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["t5", "bert", "gpt2", "llama", "vit", "deberta-v2"])
def test_gradient_checkpointing_changes_no_gradient(family, reentrant, conditioning):
    inputs = batch(family)

    def gradients(checkpointing: bool):
        with training(adapted(family, conditioning)) as model:
            calls = []
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()  # as re-entrant checkpointing needs it with any adapter
                count_forwards(model, calls)
            model(**inputs, tasks=MIXED).loss.backward()
        if checkpointing:
            assert len(calls) == 2 * len(model.layers("default"))  # each ran again in the backward
        assert current_scales() is None
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    if conditioning != "none":
        assert any("task_embedding" in name and grad.any() for name, grad in checkpointed.items())
    for name, grad in plain.items():
        assert apart(checkpointed[name], grad) < 1e-5 * max(1, grad.abs().max()), name


def count_forwards(model: nn.Module, calls: list) -> None:
    for layer in model.layers("default").values():
        layer.base_layer.register_forward_hook(lambda *_: calls.append(1))


@GIVEN
@pytest.mark.parametrize("reentrant", [True, False])
def test_two_checkpointed_forwards_before_one_backward(reentrant, conditioning):
    parts = [(batch("t5"), MIXED), (batch("t5", seed=4), ["name", "name", "sort"])]

    def gradients(checkpointing: bool):
        with training(adapted("t5", conditioning)) as model:
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            losses = [model(**inputs, tasks=tasks).loss for inputs, tasks in parts]
            sum(losses).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        assert apart(checkpointed[name], grad) < 1e-5 * max(1, grad.abs().max()), name


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_with_two_conditioned_adapters(reentrant):
    inputs = batch("bert", "FEATURE_EXTRACTION")

    def gradients(checkpointing: bool):
        model = adapted("bert", task_type="FEATURE_EXTRACTION")
        model.add_adapter("second", settings("task", r=2, task_type="FEATURE_EXTRACTION"))
        wake(model)
        model.base_model.set_adapter(["default", "second"])
        with training(model):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model(**inputs, tasks=MIXED).last_hidden_state.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert sum("task_embedding" in name for name in plain) == 2
    for name, grad in plain.items():
        assert apart(checkpointed[name], grad) < 1e-5 * max(1, grad.abs().max()), name


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_inside_a_condition(reentrant):
    inputs = batch("bert")

    def gradients(inside: bool):
        with training(adapted("bert")) as model:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if inside:
                with model.condition(MIXED, **inputs):
                    loss = model(**inputs).loss
                loss.backward()
            else:
                model(**inputs, tasks=MIXED).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, inside = gradients(False), gradients(True)
    assert plain.keys() == inside.keys()
    assert all(torch.equal(inside[name], grad) for name, grad in plain.items())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_with_dropout_replays_it(reentrant):
    def gradients(checkpointing: bool):
        model = adapted("bert", dropout=0.3)
        with training(model):
            for layer in model.layers("default").values():
                layer.uno_dropout["default"].p = 0.3
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            torch.manual_seed(11)
            model(**batch("bert"), tasks=MIXED).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    for name, grad in plain.items():
        assert apart(checkpointed[name], grad) < 1e-5 * max(1, grad.abs().max()), name


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_blocks_that_alone_are_in_training(reentrant):
    model = adapted("bert")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.base_model.model.bert.encoder.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    calls = []
    count_forwards(model, calls)
    model(**batch("bert"), tasks=MIXED).loss.backward()
    assert len(calls) == 2 * len(model.layers("default"))


def test_checkpointing_switched_on_before_wrapping_and_off_after():
    bare = backbone("bert")
    bare.gradient_checkpointing_enable({"use_reentrant": False})
    with training(wake(get_peft_model(bare, settings(task_type="SEQ_CLS")))) as model:
        model(**batch("bert"), tasks=MIXED).loss.backward()
        model.gradient_checkpointing_disable()
        model(**batch("bert"), tasks=MIXED).loss.backward()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model(**batch("bert"), tasks=MIXED).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".uno_" in n)


# torch.compile


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@GIVEN
@pytest.mark.parametrize("family", ["t5", "bert", "gpt2"])
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_forward_is_one_graph(family, conditioning):
    model, inputs = adapted(family, conditioning), prompts(family)
    if family == "t5":
        inputs["labels"] = batch(family)["labels"]
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    tasks = torch.tensor([1, 0, 2])
    assert apart(output(compiled, **inputs, tasks=tasks), output(model, **inputs, tasks=tasks)) < 1e-5
    other = torch.tensor([2, 2, 1])
    assert apart(output(compiled, **inputs, tasks=other), output(model, **inputs, tasks=other)) < 1e-5
    assert len(graphs) == 1  # other tasks need no other graph


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_forward_takes_names_and_trains():
    model, inputs = adapted("bert"), batch("bert")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert apart(output(compiled, **inputs, tasks=MIXED), output(model, **inputs, tasks=MIXED)) < 1e-5
    compiled(**inputs, tasks=MIXED).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**inputs, tasks=MIXED).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert apart(found[name], parameter.grad) < 1e-5, name
    with pytest.raises(InputError, match="`tasks` is missing"):
        model(**inputs)


@pytest.mark.slow  # a C++ compiler runs, once
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, from inductor
def test_compiled_by_inductor():
    torch.manual_seed(0)
    model = wake(get_peft_model(nn.Sequential(nn.Linear(8, 8)), settings(target_modules=["0"], sample_dim=8))).eval()
    x = torch.randn(3, 5, 8)
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    tasks = torch.tensor([1, 0, 2])
    with torch.no_grad():
        assert apart(compiled(x, tasks=tasks), model(x, tasks=tasks)) < 1e-5


# What else PEFT offers


def test_status_is_regular():
    status = two_adapters().get_model_status()
    assert status.adapter_model_type == "UnoLoraModel"
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default", "second"]
    assert status.requires_grad == {"default": True, "second": False}
    assert status.num_adapter_layers == 2 + 1  # and the classifier, which PEFT trains as well


def test_scale_is_there_for_each_projection():
    model = adapted("t5")
    s = scales_of(model, MIXED, **batch("t5"))
    assert s.shape == (3, 12, 8)
    assert apart(s[0], s[1]) > 0.05
    assert apart(s[:, 0], s[:, 1]) > 0.05


def test_scales_of_a_fresh_adapter_are_around_their_start():
    paper = get_peft_model(backbone("bert"), UnoLoraConfig.paper(TASKS, task_type="SEQ_CLS"))
    assert 0 < scales_of(paper, MIXED, **batch("bert")).abs().max() < 0.3
    own = get_peft_model(backbone("bert"), UnoLoraConfig(tasks=TASKS, task_type="SEQ_CLS"))
    s = scales_of(own, MIXED, **batch("bert"))
    assert 0.5 < s.mean() < 1.5
    assert apart(s[0], s[1]) > 0.05


def test_layers_replicated_on_the_fly_are_refused_or_absent():
    """`inject_adapter_in_model` returns no tuner, so there would be nobody to make a scale."""
    from peft import inject_adapter_in_model

    with pytest.raises(ValueError, match="shared"):
        inject_adapter_in_model(settings(), backbone("bert"))


def test_low_cpu_mem_usage(tmp_path):
    model, inputs = adapted("bert"), batch("bert")
    expected = output(model, **inputs, tasks=MIXED)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(backbone("bert"), tmp_path, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    assert torch.equal(output(loaded, **inputs, tasks=MIXED), expected)
    model.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    model.set_adapter("second")
    assert torch.equal(output(model, **inputs, tasks=MIXED), expected)
