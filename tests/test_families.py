"""Each family of backbones with its default projections: forward, backward, mixed batch, save, load, merge."""

import copy

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import nn

from conftest import (
    CONDITIONINGS,
    FAMILIES,
    MIXED,
    TASKS,
    WIDTH,
    adapted,
    apart,
    backbone,
    batch,
    first_head,
    output,
    rows,
    settings,
    wake,
)
from unolora import InputError

HEADS = [(family, head) for family, (_, heads) in FAMILIES.items() for head in heads]
TARGETS = {  # endings of the adapted projections, and how many of them in 2 layers
    "t5": ({"q", "v"}, 12),
    "bert": ({"dense"}, 2),
    "roberta": ({"query", "value"}, 4),
    "distilbert": ({"q_lin", "v_lin"}, 4),
    "deberta": ({"in_proj"}, 2),
    "deberta-v2": ({"query_proj", "value_proj"}, 4),
    "deberta-v3": ({"value_proj"}, 2),
    "gpt2": ({"c_attn"}, 2),
    "llama": ({"q_proj", "v_proj"}, 4),
    "qwen2": ({"q_proj", "v_proj"}, 4),
    "qwen3": ({"q_proj", "v_proj"}, 4),
    "mistral": ({"q_proj", "v_proj"}, 4),
    "vit": (None, 4),  # renamed within transformers 5
}
GIVEN = pytest.mark.parametrize("conditioning", CONDITIONINGS)


@pytest.mark.parametrize("family", FAMILIES)
def test_default_projections(family):
    names = list(adapted(family).layers("default"))
    endings, number = TARGETS[family]
    assert len(names) == number
    if endings is not None:
        assert {name.rpartition(".")[2] for name in names} == endings


@GIVEN
@pytest.mark.parametrize(("family", "head"), HEADS)
def test_fresh_adapter_is_the_backbone_bit_for_bit(family, head, conditioning):
    inputs, model = batch(family, head), backbone(family, head)
    expected = output(copy.deepcopy(model), **inputs)
    kind = None if family == "vit" else head
    fresh = get_peft_model(model, settings(conditioning, task_type=kind)).eval()
    assert torch.equal(output(fresh, **inputs, tasks=MIXED), expected)
    assert apart(output(wake(fresh), **inputs, tasks=MIXED), expected) > 1e-3


@GIVEN
@pytest.mark.parametrize(("family", "head"), HEADS)
def test_mixed_batch_is_row_by_row(family, head, conditioning):
    model, inputs = adapted(family, conditioning, head), batch(family, head)
    together = output(model, **inputs, tasks=MIXED)
    if conditioning != "none":
        assert apart(together, output(model, **inputs, tasks="sort")) > 1e-3
    for i, task in enumerate(MIXED):
        assert apart(together[i : i + 1], output(model, **rows(inputs, i), tasks=task)) < 1e-4


@GIVEN
@pytest.mark.parametrize("family", FAMILIES)
def test_backward_reaches_the_adapter_and_nothing_else(family, conditioning):
    model = adapted(family, conditioning)
    model(**batch(family), tasks=MIXED).loss.backward()
    for name, parameter in model.named_parameters():
        if ".uno_" in name or ".modules_to_save." in name:  # PEFT trains classification heads too
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


@GIVEN
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_is_the_same_bit_for_bit(family, conditioning, tmp_path):
    model, inputs = adapted(family, conditioning), batch(family)
    expected = output(model, **inputs, tasks=MIXED)
    assert apart(expected, output(backbone(family), **inputs)) > 1e-3
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    loaded = PeftModel.from_pretrained(backbone(family), tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(output(loaded, **inputs, tasks=MIXED), expected)


@pytest.mark.parametrize("conditioning", ["none", "task"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_unmerged(family, conditioning):
    model, inputs = adapted(family, conditioning), batch(family)
    expected = output(model, **inputs, tasks="rank")
    assert apart(expected, output(backbone(family), **inputs)) > 1e-3
    merged = model.merge_and_unload(tasks="rank")
    assert type(merged) is type(backbone(family))
    assert apart(output(merged, **inputs), expected) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_one_batch_differ_only_by_their_task(family):
    model, inputs = (
        adapted(family, "task"),
        {k: v[:1].repeat(3, *[1] * (v.dim() - 1)) for k, v in batch(family).items()},
    )
    found = output(model, **inputs, tasks=["sort", "sort", "rank"])
    assert apart(found[0], found[1]) < 1e-5
    assert apart(found[0], found[2]) > 1e-3


# Projections that have no row for each sample


@pytest.mark.parametrize(
    ("family", "targets"), [("deberta-v3", ["query_proj"]), ("deberta-v2", ["pos_key_proj"]), ("deberta", ["pos_proj"])]
)
@pytest.mark.parametrize("conditioning", ["task", "task+sample"])
def test_projections_that_all_samples_share_are_refused(family, targets, conditioning):
    model = adapted(family, conditioning, target_modules=targets)
    with pytest.raises(InputError, match=r"rows for a batch of 3 samples.*target_modules"):
        model(**batch(family), tasks=MIXED)


def test_projections_that_all_samples_share_serve_plain_unolora():
    inputs, model = batch("deberta-v3"), adapted("deberta-v3", "none", target_modules=["query_proj", "value_proj"])
    together = output(model, **inputs)
    assert apart(together, output(backbone("deberta-v3"), **inputs)) > 1e-3
    assert apart(together[1:2], output(model, **rows(inputs, 1))) < 1e-4


# Other projections than the default ones


@GIVEN
@pytest.mark.parametrize("family", ["t5", "bert", "gpt2", "llama", "vit"])
def test_all_linear(family, conditioning, tmp_path):
    model, inputs = adapted(family, conditioning, target_modules="all-linear"), batch(family)
    assert len(model.layers("default")) > len(adapted(family).layers("default"))
    assert not any("lm_head" in name or "classifier" in name for name in model.layers("default") if family != "vit")
    together = output(model, **inputs, tasks=MIXED)
    for i, task in enumerate(MIXED):
        assert apart(together[i : i + 1], output(model, **rows(inputs, i), tasks=task)) < 1e-3
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(backbone(family), tmp_path), **inputs, tasks=MIXED), together)


def test_a_second_all_linear_adapter_finds_the_same_projections():
    model = adapted("bert", target_modules="all-linear")
    model.add_adapter("second", settings(target_modules="all-linear", task_type="SEQ_CLS"))
    assert list(model.layers("second")) == list(model.layers("default"))


def test_targets_by_regular_expression_layer_and_exclusion():
    def names(**more):
        return list(adapted("bert", **more).layers("default"))

    assert names(target_modules=r".*layer\.1.*\.(key|value)") == [
        f"bert.encoder.layer.1.attention.self.{name}" for name in ("key", "value")
    ]
    assert names(layers_to_transform=[1]) == ["bert.encoder.layer.1.output.dense"]
    both = names(target_modules="query-value", layers_to_transform=[1])
    assert both == [f"bert.encoder.layer.1.attention.self.{name}" for name in ("query", "value")]
    assert all(".layer.0." in name for name in names(exclude_modules=r".*layer\.1\..*"))


@pytest.mark.parametrize("family", [family for family, (endings, _) in TARGETS.items() if endings])
def test_query_and_value_by_one_name(family):
    endings = {"query", "value"} if family == "bert" else TARGETS[family][0]
    names = adapted(family, target_modules="query-value").layers("default")
    assert {name.rpartition(".")[2] for name in names} == endings
    saved = adapted(family, target_modules="query-value").peft_config["default"].target_modules
    assert saved != "query-value", "a checkpoint names what it adapts"


def test_the_default_of_bert_leaves_attention_s_output_alone():
    names = list(adapted("bert").layers("default"))
    assert names == [f"bert.encoder.layer.{block}.output.dense" for block in (0, 1)]
    others = [name for name, _ in backbone("bert").named_modules() if name.endswith(".output.dense")]
    assert len(others) == 4, "attention has outputs of the same ending"


def test_a_family_without_defaults_asks_for_projections():
    config = tf.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=32)
    with pytest.raises(InputError, match=r"no default projections for the model type 'xlnet'.*`target_modules`"):
        get_peft_model(tf.XLNetModel(config), settings())


def test_targets_that_are_not_there():
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(backbone("bert"), settings(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("family", "target"), [("bert", "word_embeddings"), ("bert", "LayerNorm"), ("vit", "projection")]
)
def test_targets_that_are_no_projections_leave_the_backbone_alone(family, target):
    model, inputs = backbone(family), batch(family)
    names, expected = list(model.state_dict()), output(model, **inputs)
    wanted = [target, *(TARGETS[family][0] or ())]
    with pytest.raises(InputError, match=rf"`target_modules` matches '.*{target}', a .*only nn.Linear and .*Conv1D"):
        get_peft_model(model, settings(target_modules=wanted))
    assert list(model.state_dict()) == names
    assert torch.equal(output(model, **inputs), expected)
    assert "forward" not in vars(model)


# Backbones that are not transformers'


class Plain(nn.Module):
    """Neither a configuration nor embeddings of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor, bias: float = 0.0) -> torch.Tensor:
        return self.second(self.first(x).tanh()) + bias


class Embedded(Plain):
    """A backbone that says what its embeddings are, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(64, WIDTH)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(self.words(input_ids))


def plain(conditioning: str, kind: type[nn.Module] = Plain, **more) -> PeftModel:
    torch.manual_seed(3)
    return wake(get_peft_model(kind(), settings(conditioning, target_modules=["first", "second"], **more))).eval()


@pytest.mark.parametrize("shape", [(3, WIDTH), (3, 5, WIDTH)])
@GIVEN
def test_plain_module(conditioning, shape, tmp_path):
    model, x = plain(conditioning, sample_dim=WIDTH), torch.randn(shape)
    together = output(model, x=x, tasks=MIXED)
    assert torch.equal(together, output(model, x=x, tasks=torch.tensor([TASKS.index(task) for task in MIXED])))
    with model.disable_adapter():
        assert apart(together, output(model, x=x)) > 0.1
    for i, task in enumerate(MIXED):
        with torch.no_grad():
            assert apart(together[i : i + 1], model(x[i : i + 1], tasks=task)) < 1e-4
    torch.testing.assert_close(output(model, x=x, bias=2.0, tasks=MIXED), together + 2.0)
    model.save_pretrained(tmp_path)
    torch.manual_seed(3)
    assert torch.equal(output(PeftModel.from_pretrained(Plain(), tmp_path), x=x, tasks=MIXED), together)


def test_plain_module_averages_its_input():
    model, x = plain("task+sample", sample_dim=WIDTH), torch.randn(1, 5, WIDTH)
    shuffled = x[:, [3, 1, 0, 2, 4]]
    found, expected = output(model, x=shuffled, tasks="sort"), output(model, x=x, tasks="sort")[:, [3, 1, 0, 2, 4]]
    assert apart(found, expected) < 1e-5 * expected.abs().max()
    assert apart(output(model, x=x[:, :1], tasks="sort"), output(model, x=x, tasks="sort")[:, :1]) > 1e-3


def test_plain_module_with_the_sample_must_say_its_width():
    with pytest.raises(InputError, match="does not say how wide its input embeddings are; give `sample_dim`"):
        plain("task+sample")


def test_plain_module_with_the_wrong_width():
    model = plain("task+sample", sample_dim=WIDTH - 1)
    with pytest.raises(InputError, match=r"needs an input \[B, T, 31\] or \[B, 31\]"):
        model(torch.randn(3, WIDTH), tasks=MIXED)


def test_module_with_embeddings_alone():
    model = plain("task+sample", Embedded)
    assert model.uno_hypernetwork["default"].bottleneck[0].in_features == WIDTH
    ids, mask = torch.randint(0, 64, (3, 5)), torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] * 5])
    together = output(model, input_ids=ids, attention_mask=mask, tasks=MIXED)
    assert apart(together[1:2, :3], output(model, input_ids=ids[1:2, :3], tasks="sort")) < 1e-4


def test_attentions_own_projection_is_refused():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x)[0]

    for targets in (["out_proj"], "all-linear"):
        with pytest.raises(InputError, match=r"'attention.out_proj', whose weight nn.MultiheadAttention reads"):
            get_peft_model(Attention(), settings("none", target_modules=targets))


def test_sample_dim_is_checked_against_the_backbone():
    assert adapted("bert", sample_dim=WIDTH).uno_hypernetwork["default"].bottleneck[0].in_features == WIDTH
    with pytest.raises(InputError, match=f"`sample_dim` is 33, but the backbone's embeddings are {WIDTH} wide"):
        adapted("bert", sample_dim=33)


def test_audio_has_no_token_embeddings():
    config = tf.WhisperConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=10,
        pad_token_id=0,
        decoder_start_token_id=1,
        bos_token_id=1,
        eos_token_id=2,
    )
    inputs = {"input_features": torch.randn(3, 8, 20), "decoder_input_ids": torch.ones(3, 2, dtype=torch.long)}
    wanted = {"target_modules": ["q_proj", "v_proj"]}
    model = get_peft_model(tf.WhisperForConditionalGeneration(config), settings("task+sample", **wanted)).eval()
    with pytest.raises(InputError, match=r"`input_features` are no tokens.*conditioning='task'"):
        model(**inputs, tasks=MIXED)
    model = wake(get_peft_model(tf.WhisperForConditionalGeneration(config), settings("task", **wanted))).eval()
    together = output(model, **inputs, tasks=MIXED)
    assert apart(together, output(model, **inputs, tasks="sort")) > 1e-4
    for i, task in enumerate(MIXED):
        assert apart(together[i : i + 1], output(model, **rows(inputs, i), tasks=task)) < 1e-5


def test_every_head_of_the_brief_is_here():
    kinds = {first_head(family) for family in FAMILIES} | {head for _, head in HEADS}
    assert kinds == {"SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "FEATURE_EXTRACTION", None}
