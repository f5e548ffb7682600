"""UnoLoRA against what it must equal: the backbone, PEFT's LoRA, itself row by row, itself merged."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model

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
    first_head,
    output,
    rows,
    scales_of,
    settings,
    training,
    wake,
)

CORE = pytest.mark.parametrize("family", ["t5", "bert", "gpt2"])
GIVEN = pytest.mark.parametrize("conditioning", CONDITIONINGS)


# The backbone


@CORE
@GIVEN
def test_fresh_adapter_keeps_training_mode_outputs_too(family, conditioning):
    inputs = batch(family)
    with training(backbone(family)) as bare:
        expected = bare(**inputs).loss
    with training(get_peft_model(backbone(family), settings(conditioning, task_type=first_head(family)))) as fresh:
        found = fresh(**inputs, tasks=MIXED).loss
    assert apart(found, expected) < 1e-5  # with gradients on, attention may pick another kernel


@CORE
def test_fresh_adapter_with_the_papers_start_is_the_backbone(family):
    inputs, model = batch(family), backbone(family)
    expected = output(model, **inputs)
    fresh = get_peft_model(model, settings(scale_init="paper", task_type=first_head(family))).eval()
    assert torch.equal(output(fresh, **inputs, tasks=MIXED), expected)


# PEFT's LoRA


def with_loras_weights(family: str, dropout: float = 0.0) -> tuple[PeftModel, PeftModel]:
    """Plain UnoLoRA and PEFT's LoRA with the same A and B, B not zero."""
    uno = get_peft_model(
        backbone(family), settings("none", tasks=[], r=4, alpha=12, dropout=dropout, task_type=first_head(family))
    )
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        lora_dropout=dropout,
        target_modules=list(uno.layers("default")),
        fan_in_fan_out=family == "gpt2",
        task_type=first_head(family),
    )
    lora = get_peft_model(backbone(family), config)
    wake(uno)
    theirs = lora.state_dict()
    copied = 0
    for name, layer in uno.layers("default").items():
        theirs[f"base_model.model.{name}.lora_A.default.weight"].copy_(layer.uno_A["default"])
        theirs[f"base_model.model.{name}.lora_B.default.weight"].copy_(layer.uno_B["default"])
        copied += 2
    assert copied == sum("lora_" in name for name in theirs)
    return uno, lora


@CORE
def test_plain_unolora_is_lora(family):
    uno, lora = with_loras_weights(family)
    inputs = batch(family)
    found = output(uno.eval(), **inputs)
    assert apart(found, output(backbone(family), **inputs)) > 0.01
    assert apart(found, output(lora.eval(), **inputs)) < 1e-6 * found.abs().max().clamp(min=1)


@CORE
def test_plain_unolora_trains_as_lora_does(family):
    losses = []
    for model in with_loras_weights(family):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        with training(model):
            for step in range(5):
                loss = model(**batch(family, seed=step % 2)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[-1].append(loss.item())
    assert abs(losses[0][4] - losses[0][0]) > 0.01  # it trained
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@CORE
def test_dropout_is_loras(family, monkeypatch):
    """With masks that torch draws; those of `fused` have another stream, and tests of their own."""
    monkeypatch.setattr("unolora.fused._here", lambda x: False)
    found = []
    for model in with_loras_weights(family, dropout=0.5):
        for module in model.modules():  # only the adapter's dropout stays
            if isinstance(module, torch.nn.Dropout) and module.p != 0.5:
                module.p = 0.0
        model.train()
        torch.manual_seed(5)
        found.append(output(model, **batch(family)))
    assert apart(found[0], output(model.eval(), **batch(family))) > 1e-3
    if family != "t5":  # whose own dropout has other attributes that draw from the same stream
        assert apart(*found) < 1e-5


@CORE
def test_a_scale_of_one_is_plain_unolora(family):
    inputs, plain = batch(family), adapted(family, "none")
    star = adapted(family, "task+sample")
    with torch.no_grad():
        star.uno_hypernetwork["default"].scale_weight.zero_()
        star.uno_hypernetwork["default"].scale_bias.zero_()
        for name, layer in star.layers("default").items():
            for part in ("uno_A", "uno_B"):
                getattr(layer, part)["default"].copy_(getattr(plain.layers("default")[name], part)["default"])
    assert torch.equal(output(star, **inputs, tasks=MIXED), output(plain, **inputs))


# Row by row


@CORE
@GIVEN
@quick(max_examples=8, deadline=None)
@given(order=st.permutations(range(3)), tasks=st.lists(st.sampled_from(TASKS), min_size=3, max_size=3))
def test_permuting_a_batch_permutes_its_outputs(family, conditioning, order, tasks):
    model, inputs = adapted(family, conditioning), batch(family)
    straight = output(model, **inputs, tasks=tasks)
    permuted = output(model, **{k: v[list(order)] for k, v in inputs.items()}, tasks=[tasks[i] for i in order])
    assert apart(permuted, straight[list(order)]) < 1e-4


@CORE
@GIVEN
def test_gradients_of_a_mixed_batch_are_the_mean_of_its_rows(family, conditioning):
    inputs = batch(family)
    if family == "gpt2":  # one target token a row, so that each row weighs the same
        inputs["labels"][:, :-1] = -100

    def grads(*parts):
        with training(adapted(family, conditioning)) as model:
            for part, tasks in parts:
                (model(**part, tasks=tasks).loss / len(parts)).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    together = grads((inputs, MIXED))
    alone = grads(*((rows(inputs, i), task) for i, task in enumerate(MIXED)))
    assert together.keys() == alone.keys()
    assert any(grad.abs().max() > 1e-3 for grad in together.values())
    for name, grad in together.items():
        assert apart(grad, alone[name]) < 1e-4 * max(1, grad.abs().max()), name


def test_every_way_to_name_tasks_is_the_same():
    model, inputs = adapted("bert"), batch("bert")
    numbers = [TASKS.index(task) for task in MIXED]
    expected = output(model, **inputs, tasks=MIXED)
    for tasks in (
        tuple(MIXED),
        numbers,
        torch.tensor(numbers),
        torch.tensor(numbers, dtype=torch.int32),
        iter_free(numbers),
    ):
        assert torch.equal(output(model, **inputs, tasks=tasks), expected), tasks
    one = output(model, **inputs, tasks="rank")
    assert apart(one, expected) > 1e-3
    assert torch.equal(one, output(model, **inputs, tasks=["rank"] * 3))


def iter_free(numbers):
    """Rows as numpy gives them."""
    import numpy as np

    return np.array(numbers)


# The sample encoding


def padded(inputs: dict[str, torch.Tensor], by: int, *, left: bool) -> dict[str, torch.Tensor]:
    """The same rows, each padded further with a token that must not count."""
    out = {}
    for name, value in inputs.items():
        filler = {"input_ids": 5, "attention_mask": 0, "labels": -100}[name]
        more = torch.full((len(value), by), filler)
        out[name] = torch.cat([more, value] if left else [value, more], dim=1)
    return out


@pytest.mark.parametrize("by", [1, 4, 19])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "deberta-v2"])
def test_padding_an_encoders_batch_changes_nothing(family, by):
    model, inputs = adapted(family), batch(family)
    labels = {"labels": inputs.pop("labels")}
    further = padded(inputs, by, left=False)
    if family == "roberta":  # which tells positions from the tokens themselves
        further["input_ids"][further["attention_mask"] == 0] = 0
    assert apart(scales_of(model, MIXED, **further), scales_of(model, MIXED, **inputs)) < 1e-5
    assert apart(output(model, **further, **labels, tasks=MIXED), output(model, **inputs, **labels, tasks=MIXED)) < 1e-5


@pytest.mark.parametrize("by", [1, 4, 19])
def test_padding_an_encoder_decoders_batch_changes_nothing(by):
    model, inputs = adapted("t5"), batch("t5")
    labels = {"labels": inputs.pop("labels")}
    found = output(model, **padded(inputs, by, left=False), **labels, tasks=MIXED)
    expected = output(model, **inputs, **labels, tasks=MIXED)
    assert expected.std() > 0.1
    assert apart(found, expected) < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("by", [1, 4, 19])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("with_labels", [False, True])
def test_padding_a_decoders_batch_on_the_left_changes_nothing(family, by, with_labels):
    model, inputs = adapted(family), batch(family)
    if not with_labels:
        del inputs["labels"]
    further = padded(inputs, by, left=True)

    def run(part):
        positions = (part["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return output(model, **part, tasks=MIXED, position_ids=positions)

    assert apart(scales_of(model, MIXED, **further), scales_of(model, MIXED, **inputs)) < 1e-5
    counts = inputs["attention_mask"].bool()
    found, expected = run(further)[:, by:], run(inputs)
    assert apart(found[counts], expected[counts]) < 1e-4


def test_padding_would_change_the_scale_without_the_mask():
    model, inputs = adapted("bert"), batch("bert")
    del inputs["labels"]
    further = padded(inputs, 4, left=False)
    assert apart(scales_of(model, MIXED, input_ids=further["input_ids"]), scales_of(model, MIXED, **inputs)) > 0.01


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_embeddings_stand_for_their_tokens(family):
    model, inputs = adapted(family), batch(family)
    labels = {name: inputs.pop(name) for name in ("labels",)}
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
    expected = output(model, **inputs, **labels, tasks=MIXED)
    assert apart(output(model, **given, **labels, tasks=MIXED), expected) < 1e-5
    given["inputs_embeds"] = embeddings.masked_fill(inputs["attention_mask"].unsqueeze(-1) == 0, 9.0)
    assert apart(scales_of(model, MIXED, **given, **labels), scales_of(model, MIXED, **inputs, **labels)) < 1e-5


def test_images_are_the_mean_of_their_patches():
    model, inputs = adapted("vit"), batch("vit")
    patches = model.get_input_embeddings()(inputs["pixel_values"]).detach()
    assert patches.shape[1] == 9
    expected = model.uno_hypernetwork["default"](torch.tensor([1, 0, 2]), patches.mean(dim=1))
    found = scales_of(model, MIXED, **inputs)
    torch.testing.assert_close(found, expected.detach())
    flat = torch.zeros_like(inputs["pixel_values"])
    assert apart(scales_of(model, MIXED, pixel_values=flat), found) > 0.05
    assert torch.equal(scales_of(model, MIXED, **inputs, attention_mask=torch.ones(3, 2)), found)  # none of an image's


def test_larger_images_are_encoded_as_the_backbone_embeds_them():
    model, large = adapted("vit"), torch.randn(3, 3, 16, 16)
    patches = model.get_input_embeddings().projection(large).flatten(2).transpose(1, 2).detach()
    assert patches.shape[1] == 16
    found = scales_of(model, MIXED, pixel_values=large, interpolate_pos_encoding=True)
    expected = model.uno_hypernetwork["default"](torch.tensor([1, 0, 2]), patches.mean(dim=1))
    torch.testing.assert_close(found, expected.detach())
    output(model, pixel_values=large, interpolate_pos_encoding=True, tasks=MIXED)


@pytest.mark.parametrize("as_embeddings", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_the_answer_does_not_leak_into_the_scale(family, as_embeddings):
    model, inputs = adapted(family), batch(family)
    other = copy.deepcopy(inputs)
    answer = inputs["labels"] != -100
    for name in ("input_ids", "labels"):
        other[name][answer] = (inputs[name][answer] + 7) % (VOCAB - 3) + 2
    if as_embeddings:
        for part in (inputs, other):
            part["inputs_embeds"] = model.get_input_embeddings()(part.pop("input_ids")).detach()
    before, after = (output(model, **part, tasks=MIXED) for part in (inputs, other))
    start = int(answer.any(0).nonzero()[0])
    assert apart(before[:, start:], after[:, start:]) > 0.01  # the answers differ
    counts = inputs["attention_mask"][:, :start].bool()
    assert torch.equal(before[:, :start][counts], after[:, :start][counts])
    assert torch.equal(scales_of(model, MIXED, **inputs), scales_of(model, MIXED, **other))


def test_training_and_answering_see_the_same_scale():
    model, inputs = adapted("llama"), batch("llama")
    prompt = {name: inputs[name][:, :5] for name in ("input_ids", "attention_mask")}
    assert apart(scales_of(model, MIXED, **prompt), scales_of(model, MIXED, **inputs)) < 1e-6


def test_labels_of_tokens_and_of_encoders_are_no_answers():
    for family, head in (("gpt2", "TOKEN_CLS"), ("bert", "TOKEN_CLS"), ("t5", "SEQ_2_SEQ_LM")):
        model, inputs = adapted(family, task_type=head), batch(family, head)
        without = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad():
            assert torch.equal(scales_of(model, MIXED, **inputs), scales_of(model, MIXED, **without)), family


def test_sample_mask_says_which_tokens_count():
    model, inputs = adapted("bert"), batch("bert")
    chosen = torch.zeros(3, 7, dtype=torch.bool)
    chosen[:, 1:3] = True
    tokens = model.get_input_embeddings()(inputs["input_ids"])[:, 1:3].mean(1)
    expected = model.uno_hypernetwork["default"](torch.tensor([1, 0, 2]), tokens).detach()
    torch.testing.assert_close(scales_of(model, MIXED, **inputs, sample_mask=chosen), expected)
    masked = output(model, **inputs, tasks=MIXED, sample_mask=chosen)
    assert apart(masked, output(model, **inputs, tasks=MIXED)) > 1e-3
    assert torch.equal(masked, output(model, **inputs, tasks=MIXED, sample_mask=chosen.long()))


def test_sample_mask_goes_before_labels_of_a_causal_model():
    model, inputs = adapted("gpt2"), batch("gpt2")
    everything = scales_of(model, MIXED, **inputs, sample_mask=inputs["attention_mask"])
    assert apart(everything, scales_of(model, MIXED, **inputs)) > 0.01
    del inputs["labels"]
    assert torch.equal(everything, scales_of(model, MIXED, **inputs))


# Merging


@CORE
@pytest.mark.parametrize("task", TASKS)
def test_merged_is_unmerged_for_each_task(family, task):
    model, inputs = adapted(family, "task"), batch(family)
    expected = output(model, **inputs, tasks=task)
    others = [output(model, **inputs, tasks=other) for other in TASKS if other != task]
    model.merge_adapter(tasks=task)
    found = output(model, **inputs, tasks=task)
    tolerance = 1e-5 * max(1, expected.abs().max())
    assert apart(found, expected) < tolerance
    assert all(apart(found, other) > 100 * tolerance for other in others)
    model.unmerge_adapter()
    assert (
        apart(output(model, **inputs, tasks=MIXED), output(adapted(family, "task"), **inputs, tasks=MIXED)) < tolerance
    )


# Precision


@CORE
@GIVEN
def test_float64(family, conditioning):
    model = get_peft_model(backbone(family).double(), settings(conditioning, task_type=first_head(family))).eval()
    wake(model)
    assert {value.dtype for value in adapter_weights(model).values() if value.is_floating_point()} == {torch.float64}
    inputs = batch(family)
    together = output(model, **inputs, tasks=MIXED)
    assert together.dtype == torch.float64
    for i, task in enumerate(MIXED):
        assert apart(together[i : i + 1], output(model, **rows(inputs, i), tasks=task)) < 1e-11
    late = adapted(family, conditioning).double()
    assert output(late, **inputs, tasks=MIXED).dtype == torch.float64


@CORE
@GIVEN
def test_bfloat16_backbone(family, conditioning):
    model = get_peft_model(backbone(family).bfloat16(), settings(conditioning, task_type=first_head(family))).eval()
    inputs = batch(family)
    assert torch.equal(output(model, **inputs, tasks=MIXED), output(backbone(family).bfloat16(), **inputs))
    wake(model)
    assert {value.dtype for value in adapter_weights(model).values() if value.is_floating_point()} == {torch.float32}
    found, expected = output(model, **inputs, tasks=MIXED), output(adapted(family, conditioning), **inputs, tasks=MIXED)
    assert found.dtype == torch.bfloat16
    assert apart(found, expected) < 0.2 * expected.abs().max()
    model(**inputs, tasks=MIXED).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_bfloat16_adapter():
    model = get_peft_model(backbone("bert").bfloat16(), settings(task_type="SEQ_CLS"), autocast_adapter_dtype=False)
    wake(model).eval()
    assert model.layers("default").popitem()[1].uno_A["default"].dtype == torch.bfloat16
    assert output(model, **batch("bert"), tasks=MIXED).dtype == torch.bfloat16


@CORE
@GIVEN
def test_autocast(family, conditioning):
    model, inputs = adapted(family, conditioning), batch(family)
    expected = output(model, **inputs, tasks=MIXED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = output(model, **inputs, tasks=MIXED)
        inside = scales_of(model, MIXED, **inputs) if conditioning != "none" else None
    assert 0 < apart(found, expected) < 0.2 * expected.abs().max()
    if inside is not None:
        assert torch.equal(inside, scales_of(model, MIXED, **inputs))  # the hypernetwork stays in single precision
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs, tasks=MIXED).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)


# A hypothesis over batch sizes


@quick(max_examples=12, deadline=None)
@given(
    tasks=st.lists(st.sampled_from(TASKS), min_size=1, max_size=6),
    lengths=st.lists(st.integers(1, 8), min_size=6, max_size=6),
)
def test_any_batch_is_row_by_row(tasks, lengths):
    model, B = adapted("bert"), len(tasks)
    torch.manual_seed(len(tasks))
    mask = (torch.arange(8) < torch.tensor(lengths[:B]).unsqueeze(1)).long()
    inputs = {"input_ids": torch.randint(2, VOCAB, (B, 8)) * mask, "attention_mask": mask}
    together = output(model, **inputs, tasks=tasks)
    for i, task in enumerate(tasks):
        alone = {name: value[i : i + 1, : lengths[i]] for name, value in inputs.items()}
        assert apart(together[i : i + 1], output(model, **alone, tasks=task)) < 1e-4
