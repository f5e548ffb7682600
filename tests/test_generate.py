"""Generation: every way to ask for more than one sequence, mixed tasks, masks, caches."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from transformers import GenerationConfig

from conftest import (
    CONDITIONINGS,
    MIXED,
    TASKS,
    adapted,
    apart,
    backbone,
    batch,
    output,
    prompts,
    rows,
    scales_of,
    settings,
    wake,
)
from unolora import InputError
from unolora.layer import current_scales

FAMILIES = ["t5", "gpt2", "llama"]
FAMILY = pytest.mark.parametrize("family", FAMILIES)
GIVEN = pytest.mark.parametrize("conditioning", CONDITIONINGS)
LENGTH = {"max_new_tokens": 6, "min_new_tokens": 6}  # so that rows can be laid side by side
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams by configuration": {"generation_config": {"num_beams": 3}},
    "beams returned": {"num_beams": 4, "num_return_sequences": 2},
    "beams returned by configuration": {"generation_config": {"num_beams": 4, "num_return_sequences": 3}},
    "without cache": {"use_cache": False},
    "beams without cache": {"use_cache": False, "num_beams": 2},
}
SAMPLED = {
    "sampled": {"do_sample": True},
    "sampled and returned": {"do_sample": True, "num_return_sequences": 3},
    "returned by configuration": {"generation_config": {"do_sample": True, "num_return_sequences": 2}},
    "sampled beams": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
}


def generate(model, inputs, way=None, **more) -> torch.Tensor:
    """New tokens only, [rows, 6]."""
    way = dict(way or {})
    if "generation_config" in way:
        own = model.generation_config.to_diff_dict() if hasattr(model, "generation_config") else {}
        way["generation_config"] = GenerationConfig(**{**own, **LENGTH, **way["generation_config"]})
    else:
        way |= LENGTH
    found = model.generate(**inputs, **way, **more)
    return found[:, -6:]


def returned(way: dict) -> int:
    return way.get("num_return_sequences", way.get("generation_config", {}).get("num_return_sequences", 1))


@GIVEN
@FAMILY
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_mixed_batch_is_row_by_row(family, conditioning, way):
    model, inputs = adapted(family, conditioning), prompts(family)
    together = generate(model, inputs, way, tasks=MIXED)
    n = returned(way)
    assert together.shape == (3 * n, 6)
    if conditioning != "none":
        assert not torch.equal(together, generate(model, inputs, way, tasks="sort"))
    assert not torch.equal(together, generate(backbone(family), inputs, way))
    for i, task in enumerate(MIXED):
        assert torch.equal(together[i * n : (i + 1) * n], generate(model, rows(inputs, i), way, tasks=[task])), task
    assert current_scales() is None


@GIVEN
@FAMILY
@pytest.mark.parametrize("way", SAMPLED.values(), ids=SAMPLED)
def test_sampling(family, conditioning, way):
    model, inputs = adapted(family, conditioning), prompts(family)

    def draw(**more):
        torch.manual_seed(7)
        return generate(model, inputs, way, **more)

    together = draw(tasks=MIXED)
    assert together.shape == (3 * returned(way), 6)
    assert torch.equal(together, draw(tasks=[TASKS.index(task) for task in MIXED]))
    if conditioning != "none":
        assert not torch.equal(together, draw(tasks="sort"))


@FAMILY
def test_scale_of_beams_is_their_samples(family):
    """Scores, not only tokens: a beam that had another sample's scale would show."""
    model, inputs = adapted(family), prompts(family)
    options = {
        "num_beams": 3,
        "num_return_sequences": 3,
        "return_dict_in_generate": True,
        "output_scores": True,
        **LENGTH,
    }
    together = model.generate(**inputs, **options, tasks=MIXED)
    assert together.sequences_scores.std() > 1e-3
    for i, task in enumerate(MIXED):
        alone = model.generate(**rows(inputs, i), **options, tasks=task)
        assert apart(together.sequences_scores[3 * i : 3 * i + 3], alone.sequences_scores) < 1e-4


@quick(max_examples=10, deadline=None)
@given(beams=st.integers(1, 5), data=st.data(), tasks=st.lists(st.sampled_from(TASKS), min_size=1, max_size=3))
def test_any_number_of_beams(beams, data, tasks):
    model, n = adapted("t5"), data.draw(st.integers(1, beams))
    inputs = {name: value[: len(tasks)] for name, value in prompts("t5").items()}
    way = {"num_beams": beams, "num_return_sequences": n}
    together = generate(model, inputs, way, tasks=tasks)
    for i, task in enumerate(tasks):
        assert torch.equal(together[i * n : (i + 1) * n], generate(model, rows(inputs, i), way, tasks=task))


@FAMILY
@pytest.mark.parametrize("task_type", ["first", None])
def test_every_class_that_generates(family, task_type):
    kind = {"t5": "SEQ_2_SEQ_LM"}.get(family, "CAUSAL_LM") if task_type == "first" else None
    model = wake(get_peft_model(backbone(family), settings(task_type=kind))).eval()
    assert (type(model) is PeftModel) == (kind is None)
    inputs = prompts(family)
    assert torch.equal(generate(model, inputs, tasks=MIXED), generate(adapted(family), inputs, tasks=MIXED))
    with pytest.raises(InputError, match="`tasks` is missing"):
        generate(model, inputs)
    with pytest.raises(TypeError, match="unexpected argument 'taks'; did you mean 'tasks'"):
        generate(model, inputs, taks=MIXED)
    with pytest.raises((InputError, TypeError), match=r"did you mean 'tasks'|`tasks` is missing"):
        generate(model, inputs, task_ids=torch.tensor([0, 1, 2]))
    with pytest.raises(InputError, match="got 2 for a batch of 3"):
        generate(model, inputs, {"num_beams": 2}, tasks=["sort", "rank"])
    with pytest.raises(InputError, match="unknown task 'srot'; did you mean 'sort'"):
        generate(model, inputs, tasks=["srot"] * 3)
    assert current_scales() is None


@FAMILY
def test_inputs_can_go_by_position(family):
    model = wake(get_peft_model(backbone(family), settings())).eval()  # PEFT's own classes take keywords only
    inputs = prompts(family)
    expected = generate(model, inputs, tasks=MIXED)
    found = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], tasks=MIXED, **LENGTH)
    assert torch.equal(found[:, -6:], expected)
    found = model.generate(inputs=inputs["input_ids"], attention_mask=inputs["attention_mask"], tasks=MIXED, **LENGTH)
    assert torch.equal(found[:, -6:], expected)


@FAMILY
@pytest.mark.parametrize("by", [1, 9])
def test_padding_changes_no_token(family, by):
    model, inputs = adapted(family), prompts(family)
    left = family != "t5"

    def pad(value, filler):
        more = torch.full((3, by), filler)
        return torch.cat([more, value] if left else [value, more], dim=1)

    further = {"input_ids": pad(inputs["input_ids"], 5), "attention_mask": pad(inputs["attention_mask"], 0)}
    assert torch.equal(generate(model, further, tasks=MIXED), generate(model, inputs, tasks=MIXED))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_without_a_mask_padding_is_left_out_as_generate_does(family):
    model, inputs = adapted(family), prompts(family)
    assert (inputs["input_ids"] == 0).any()
    expected = generate(model, inputs, tasks=MIXED)
    assert torch.equal(generate(model, {"input_ids": inputs["input_ids"]}, tasks=MIXED), expected)


def test_without_a_mask_an_encoder_attends_to_padding_and_the_scale_does_not_count_it():
    model, inputs = adapted("t5"), prompts("t5")
    alone = {"input_ids": inputs["input_ids"]}
    assert not torch.equal(generate(backbone("t5"), alone), generate(backbone("t5"), inputs))  # as the backbone is
    with model.condition(MIXED, **inputs):
        expected = generate(model, alone)
    assert torch.equal(generate(model, alone, tasks=MIXED), expected)


def test_padding_that_is_the_end_token_counts_as_generate_counts_it():
    model, ids = adapted("gpt2"), prompts("gpt2")["input_ids"]
    found = []
    for more in ({"attention_mask": torch.ones_like(ids)}, {}):
        found.append(generate(model, {"input_ids": ids, **more}, tasks=MIXED, pad_token_id=0, eos_token_id=0))
    assert torch.equal(*found)


@FAMILY
def test_disabled_adapter_generates_as_the_backbone(family):
    model, inputs = adapted(family), prompts(family)
    expected = generate(backbone(family), inputs)
    assert not torch.equal(generate(model, inputs, tasks=MIXED), expected)
    with model.disable_adapter():
        assert torch.equal(generate(model, inputs), expected)
        assert torch.equal(generate(model, inputs, tasks=MIXED), expected)


@FAMILY
def test_merged_model_generates_the_same(family):
    model, inputs = adapted(family, "task"), prompts(family)
    expected = generate(model, inputs, {"num_beams": 2}, tasks="rank")
    assert not torch.equal(generate(model, inputs, {"num_beams": 2}, tasks="sort"), expected)
    assert torch.equal(generate(model.merge_and_unload(tasks="rank"), inputs, {"num_beams": 2}), expected)


@FAMILY
def test_sample_mask_reaches_generation(family):
    model, inputs = adapted(family), prompts(family)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[:, 3] = True
    found = generate(model, inputs, tasks=MIXED, sample_mask=mask)
    with model.condition(MIXED, **inputs, sample_mask=mask):
        assert torch.equal(generate(model, inputs), found)
    with model.condition(MIXED, **inputs):
        scores = model(**inputs, **({"decoder_input_ids": inputs["input_ids"][:, :1]} if family == "t5" else {})).logits
    with model.condition(MIXED, **inputs, sample_mask=mask):
        other = model(**inputs, **({"decoder_input_ids": inputs["input_ids"][:, :1]} if family == "t5" else {})).logits
    assert apart(scores.detach(), other.detach()) > 1e-3


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}])
def test_embeddings_as_a_prompt(way):
    model, inputs = adapted("llama"), prompts("llama")
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
    found = model.generate(**given, **way, **LENGTH, tasks=MIXED)
    assert torch.equal(found[:, -6:], generate(model, inputs, way, tasks=MIXED))


# Given encoder outputs


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_given_encoder_outputs(way):
    model, inputs = adapted("t5"), prompts("t5")
    expected = generate(model, inputs, way, tasks=MIXED)
    with torch.no_grad(), model.condition(MIXED, **inputs):
        encoded = model.get_encoder()(**inputs)
        again = {"encoder_outputs": encoded, "attention_mask": inputs["attention_mask"]}
        assert torch.equal(generate(model, again, way), expected)
    with pytest.raises(InputError, match="needs `input_ids` or `inputs_embeds`; where `encoder_outputs` are given"):
        generate(model, again, way, tasks=MIXED)
    with pytest.raises(InputError, match="`tasks` is missing"):
        generate(model, again, way)
    assert current_scales() is None


def test_given_encoder_outputs_in_a_forward():
    model, inputs, labels = adapted("t5"), prompts("t5"), batch("t5")["labels"]
    expected = output(model, **inputs, labels=labels, tasks=MIXED)
    with torch.no_grad(), model.condition(MIXED, **inputs):
        encoded = model.get_encoder()(**inputs)
    given = {"encoder_outputs": encoded, "attention_mask": inputs["attention_mask"], "labels": labels}
    assert torch.equal(output(model, **given, input_ids=inputs["input_ids"], tasks=MIXED), expected)
    with model.condition(MIXED, **inputs):
        assert torch.equal(output(model, **given), expected)
    with pytest.raises(InputError, match="where `encoder_outputs` are given, pass the `input_ids`"):
        model(**given, tasks=MIXED)


@pytest.mark.parametrize("tasks", [MIXED, "rank", torch.tensor([1, 0, 2])])
def test_given_encoder_outputs_need_nothing_else_without_the_sample(tasks):
    model, inputs = adapted("t5", "task"), prompts("t5")
    expected = generate(model, inputs, tasks=tasks)
    with torch.no_grad(), model.condition(tasks, **inputs):
        encoded = model.get_encoder()(**inputs)
    again = {"encoder_outputs": encoded, "attention_mask": inputs["attention_mask"]}
    assert torch.equal(generate(model, again, tasks=tasks), expected)


# Decoding step by step


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_cached_decoding_step_by_step(family):
    model, inputs = adapted(family), prompts(family)
    expected = generate(model, inputs, tasks=MIXED)
    mask, ids, cache, found = inputs["attention_mask"], inputs["input_ids"], None, []
    with torch.no_grad(), model.condition(MIXED, **inputs):
        for _ in range(6):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            step = model(input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True)
            logits = step.logits[:, -1].clone()
            logits[:, 63] = -torch.inf  # the end token, which min_new_tokens forbids
            ids, cache = logits.argmax(-1, keepdim=True), step.cache
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
            found.append(ids)
    assert torch.equal(torch.cat(found, dim=1), expected)
    assert current_scales() is None

    for more in ({"attention_mask": mask}, {}):
        with pytest.raises(InputError, match=r"when decoding step by step, wrap the loop in `with model\.condition"):
            model(input_ids=ids, cache=cache, use_cache=True, tasks=MIXED, **more)


def test_cached_decoding_of_an_encoder_decoder_step_by_step():
    model, inputs = adapted("t5"), prompts("t5")
    expected = generate(model, inputs, tasks=MIXED)
    ids, cache, found = torch.zeros(3, 1, dtype=torch.long), None, []
    with torch.no_grad(), model.condition(MIXED, **inputs):
        encoded = model.get_encoder()(**inputs)
        for _ in range(6):
            step = model(
                encoder_outputs=encoded, attention_mask=inputs["attention_mask"], decoder_input_ids=ids,
                cache=cache, use_cache=True,
            )  # fmt: skip
            logits = step.logits[:, -1].clone()
            logits[:, 1] = -torch.inf
            ids, cache = logits.argmax(-1, keepdim=True), step.cache
            found.append(ids)
    assert torch.equal(torch.cat(found, dim=1), expected)
    with pytest.raises(InputError, match="where `encoder_outputs` are given"):
        model(encoder_outputs=encoded, decoder_input_ids=ids, cache=cache, tasks=MIXED)


def test_step_by_step_with_the_whole_input_beside_needs_no_condition():
    """An encoder-decoder's input says it all, cache or not."""
    model, inputs = adapted("t5"), prompts("t5")
    start, following = torch.zeros(3, 1, dtype=torch.long), torch.full((3, 1), 5)
    with torch.no_grad():
        whole = model(**inputs, decoder_input_ids=torch.cat([start, following], 1), tasks=MIXED).logits[:, 1:]
        first = model(**inputs, decoder_input_ids=start, tasks=MIXED, use_cache=True)
        second = model(**inputs, decoder_input_ids=following, cache=first.cache, tasks=MIXED)
    assert apart(second.logits, whole) < 1e-4 * whole.abs().max()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation_continues_from_a_given_cache(family):
    model, inputs = adapted(family), prompts(family)
    expected = generate(model, inputs, tasks=MIXED)
    with torch.no_grad(), model.condition(MIXED, **inputs):
        start = {name: value[:, :4] for name, value in inputs.items()}
        positions = (start["attention_mask"].cumsum(1) - 1).clamp(min=0)
        cache = model(**start, position_ids=positions, use_cache=True).cache
    assert torch.equal(generate(model, inputs, tasks=MIXED, cache=cache), expected)


def test_condition_holds_for_everything_inside():
    model, inputs = adapted("t5"), prompts("t5")
    expected = generate(model, inputs, tasks=MIXED)
    with model.condition(MIXED, **inputs):
        assert torch.equal(generate(model, inputs), expected)
        assert not torch.equal(generate(model, inputs, tasks="sort"), expected)  # what a call says goes before
        assert torch.equal(generate(model, inputs), expected)
    with pytest.raises(InputError, match="`tasks` is missing"):
        generate(model, inputs)


def test_condition_serves_the_adapters_that_it_was_made_for():
    model, inputs = adapted("t5"), prompts("t5")
    model.add_adapter("second", settings("task", tasks=["x", "y"], task_type="SEQ_2_SEQ_LM"))
    with model.condition(MIXED, **inputs):
        model.set_adapter("second")
        with pytest.raises(InputError, match=r"`tasks` is missing.*known: x, y"):
            generate(model, inputs)
        generate(model, inputs, tasks="y")
        model.set_adapter("default")
        generate(model, inputs)


def test_condition_needs_tasks_and_something_to_average():
    model = adapted("t5")
    with pytest.raises(InputError, match="`tasks` is missing"), model.condition():
        pass
    with pytest.raises(InputError, match="needs `input_ids` or `inputs_embeds`"), model.condition(MIXED):
        pass
    with pytest.raises(InputError, match="got 3 for a batch of 2"):
        scales_of(model, MIXED, input_ids=torch.ones(2, 4, dtype=torch.long))


@pytest.mark.parametrize("shape", [(3, 6), (2, 7), (7,), (3, 1, 7, 7)])
def test_masks_of_another_shape_are_refused(shape):
    model, inputs = adapted("bert"), batch("bert")
    with pytest.raises(
        InputError, match=r"the mask of the sample encoding is \[.*the tokens are \[3, 7\].*`sample_mask`"
    ):
        model(**inputs, tasks=MIXED, sample_mask=torch.ones(shape))
    assert current_scales() is None
