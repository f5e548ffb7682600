"""The paper's parameter counts, on T5-base's exact shapes without their memory."""

import pytest
import torch
from peft import get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

from conftest import TASKS, adapted, backbone, settings
from unolora import UnoLoraConfig
from unolora.methods import METHODS
from unolora.settings import Settings

NAMES = [f"task{i}" for i in range(10)]
PROJECTIONS = 72  # q and v of 12 encoder self-attentions, 12 decoder self-attentions and 12 cross-attentions


@pytest.fixture(scope="module")
def t5_base():
    """Build T5-base without memory; wrapped once for each test."""

    def build():
        config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0)
        with torch.device("meta"):
            return T5ForConditionalGeneration(config)

    return build


def trainable(model, config) -> int:
    with torch.device("meta"):
        wrapped = get_peft_model(model, config)
    counted = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert counted == wrapped.get_nb_trainable_parameters()[0]
    assert all(p.is_meta for p in wrapped.parameters())
    return counted


def test_plain_unolora_on_t5_base(t5_base):
    assert trainable(t5_base(), UnoLoraConfig(conditioning="none")) == 884_736 == PROJECTIONS * 8 * (768 + 768)


def test_the_papers_unolora_star_on_t5_base(t5_base):
    assert trainable(t5_base(), UnoLoraConfig.paper(NAMES)) == 904_176


def test_a_position_for_each_projection_costs_24_rows(t5_base):
    # The paper's code has 48 rows of 8 for 72 projections; 72 - 48 = 24 rows more make one for each.
    counted = trainable(t5_base(), UnoLoraConfig.paper(NAMES, num_positions=None))
    assert counted == 904_368 == 904_176 + (PROJECTIONS - 48) * 8


def test_the_default_is_the_papers_size_with_own_positions(t5_base):
    assert trainable(t5_base(), UnoLoraConfig(tasks=NAMES)) == 904_368


def test_a_further_task_costs_one_row_of_the_embedding(t5_base):
    assert trainable(t5_base(), UnoLoraConfig.paper([*NAMES, "one_more"])) == 904_176 + 8


def test_the_papers_share_of_t5_base(t5_base):
    model = t5_base()
    total = sum(p.numel() for p in model.parameters())
    assert total == 222_903_552
    assert round(100 * trainable(model, UnoLoraConfig.paper(NAMES)) / total / 8, 2) == 0.05  # % per task, for 8 tasks


def test_72_projections_in_the_order_of_the_network(t5_base):
    with torch.device("meta"):
        layers = get_peft_model(t5_base(), UnoLoraConfig.paper(NAMES)).layers("default")
    assert len(layers) == PROJECTIONS
    assert [layer.position["default"] for layer in layers.values()] == list(range(PROJECTIONS))
    assert all(name.endswith((".q", ".v")) for name in layers)
    assert sum("EncDecAttention" in name for name in layers) == 24


def test_only_the_adapter_is_trained():
    model = adapted("t5")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all(".uno_" in name for name in names)
    assert names == {name for name, _ in model.named_parameters() if ".uno_" in name}


def test_counts_are_printed(capsys):
    model = get_peft_model(backbone("t5"), settings(task_type="SEQ_2_SEQ_LM"))
    counted, total = model.get_nb_trainable_parameters()
    d, r, P, D = 8, 8, 12, 32
    hypernetwork = (
        (len(TASKS) + P) * d
        + (D * 16 + 16 + 16 * 16 + 16 + 16 * d + d)
        + (3 * d * 16 + 16 + 2 * (16 * 16 + 16) + 16 * d + d)
        + P * (d * r + r)
    )
    assert counted == P * r * (D + D) + hypernetwork
    model.print_trainable_parameters()
    assert f"trainable params: {counted:,} || all params: {total:,}" in capsys.readouterr().out


# --- rivals, against their papers' formulas ------------------------------------------------------------------------

D, FF, L, R, K = 768, 3072, 12, 8, 8  # of T5-base, and the paper's eight tasks
EIGHT = NAMES[:K]
SPAN = PROJECTIONS * R * (D + D)  # of one LoRA
BASE = 222_903_552
NORMS = (2 * L + 1 + 3 * L + 1) * D


def hyperformer(E=64, H=24):
    """The published network of one stack."""
    embeddings = (L + 2) * E
    combine = (3 * E + 1) * 2 * E + (2 * E + 1) * E + 2 * E
    return embeddings + combine + (E + 1) * (H * D + H + D * H + D + 2 * D)


COUNTS = {
    "c-poly": PROJECTIONS * (4 + K) * R * (D + D) + PROJECTIONS * K * 4,  # 4 skills of all, 1 of each task; the logits
    "full": BASE,
    "full-per-task": K * BASE,
    "heads-only": 0,
    "hyperformer": K * 64 + 2 * hyperformer() + NORMS,
    "ia3": L * (2 * D + FF) + L * (4 * D + FF),  # l_k, l_v, l_ff; a decoder's block has two attentions
    "lora-matched": 9 * PROJECTIONS * (D + D),  # rank 9 is the first with UnoLoRA*'s 904,352
    "lora-per-task": K * SPAN,
    "lora-shared": SPAN,
    "mtl-lora": PROJECTIONS * (R * D + 3 * D * R + K * (R * R + 3)),
    "poly": PROJECTIONS * (4 * R * (D + D) + K * 4),
    "prompt-tuning": 100 * D + K * (100 + D),
    "unolora": 904_368 - 2 * 8,  # two tasks fewer than above
}


@pytest.fixture(scope="module")
def rivals(t5_base):
    """Build a method on T5-base without memory, with the settings' defaults."""

    def build(method):
        with torch.device("meta"):
            return METHODS[method](t5_base().requires_grad_(False), EIGHT, Settings(tasks=EIGHT))

    return build


@pytest.mark.parametrize("method", METHODS)
def test_rivals_on_t5_base(method, rivals):
    model = rivals(method)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == COUNTS[method]


def test_the_published_share_of_hyperformer():
    """0.290 % per task is what is added; the norms, which are trained too, make it 0.292 %."""
    added = COUNTS["hyperformer"] - NORMS
    assert added == 5_163_440
    assert f"{100 * added / BASE / K:.3f}" == "0.290"
    assert f"{100 * (added + NORMS) / BASE / K:.3f}" == "0.292"


def test_the_published_sizes_of_prompt_tuning():
    """77.6K for one task and 10.5K for each of eight, as the papers round."""
    assert 100 * D + (100 + D) == 77_668
    assert COUNTS["prompt-tuning"] / K == 10_468
