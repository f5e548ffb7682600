"""Tiny random backbones, batches for them, and adapters that do something."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import nn

from unolora import UnoLoraConfig
from unolora.layer import current_scales

torch.set_num_threads(1)
tf.logging.set_verbosity_error()

VOCAB, WIDTH = 64, 32
TASKS = ["sort", "rank", "name"]
MIXED = ["rank", "sort", "name"]  # one for each row of a batch of 3, in no order
CONDITIONINGS = ("none", "task", "task+sample")

_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.3,
}
_DECODER = {
    **_ENCODER,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 63,
    "bos_token_id": 1,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 48,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 63,
}
_RELATIVE = {"relative_attention": True, "max_relative_positions": 8, "position_biased_input": False}

# family -> (configuration class and settings, {task type: class})
FAMILIES = {
    "t5": (
        lambda: tf.T5Config(**_T5, num_labels=3),
        {
            "SEQ_2_SEQ_LM": tf.T5ForConditionalGeneration,
            "SEQ_CLS": tf.T5ForSequenceClassification,
            "TOKEN_CLS": tf.T5ForTokenClassification,
            "QUESTION_ANS": tf.T5ForQuestionAnswering,
            "FEATURE_EXTRACTION": tf.T5EncoderModel,
        },
    ),
    "bert": (
        lambda: tf.BertConfig(**_ENCODER, num_labels=3),
        {
            "SEQ_CLS": tf.BertForSequenceClassification,
            "TOKEN_CLS": tf.BertForTokenClassification,
            "QUESTION_ANS": tf.BertForQuestionAnswering,
            "FEATURE_EXTRACTION": tf.BertModel,
        },
    ),
    "roberta": (
        lambda: tf.RobertaConfig(**_ENCODER, num_labels=3, pad_token_id=0, max_position_embeddings=48),
        {"SEQ_CLS": tf.RobertaForSequenceClassification},
    ),
    "distilbert": (
        lambda: tf.DistilBertConfig(
            vocab_size=VOCAB, dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=48, num_labels=3, initializer_range=0.3
        ),
        {"SEQ_CLS": tf.DistilBertForSequenceClassification},
    ),
    "deberta": (
        lambda: tf.DebertaConfig(**_ENCODER, **_RELATIVE, num_labels=3, pos_att_type=["c2p", "p2c"]),
        {"SEQ_CLS": tf.DebertaForSequenceClassification},
    ),
    "deberta-v2": (
        lambda: tf.DebertaV2Config(**_ENCODER, **_RELATIVE, num_labels=3, pos_att_type=["p2c", "c2p"]),
        {"SEQ_CLS": tf.DebertaV2ForSequenceClassification},
    ),
    "deberta-v3": (  # the released models' settings: queries and keys of positions share the tokens' projections
        lambda: tf.DebertaV2Config(
            **_ENCODER, **_RELATIVE, num_labels=3, pos_att_type="p2c|c2p", share_att_key=True, position_buckets=8
        ),
        {"SEQ_CLS": tf.DebertaV2ForSequenceClassification},
    ),
    "gpt2": (
        lambda: tf.GPT2Config(**_GPT2, num_labels=3),
        {
            "CAUSAL_LM": tf.GPT2LMHeadModel,
            "SEQ_CLS": tf.GPT2ForSequenceClassification,
            "TOKEN_CLS": tf.GPT2ForTokenClassification,
        },
    ),
    "llama": (lambda: tf.LlamaConfig(**_DECODER), {"CAUSAL_LM": tf.LlamaForCausalLM}),
    "qwen2": (lambda: tf.Qwen2Config(**_DECODER), {"CAUSAL_LM": tf.Qwen2ForCausalLM}),
    "qwen3": (lambda: tf.Qwen3Config(**_DECODER), {"CAUSAL_LM": tf.Qwen3ForCausalLM}),
    "mistral": (lambda: tf.MistralConfig(**_DECODER, sliding_window=None), {"CAUSAL_LM": tf.MistralForCausalLM}),
    "vit": (
        lambda: tf.ViTConfig(
            **{k: v for k, v in _ENCODER.items() if k != "vocab_size"}, image_size=12, patch_size=4, num_labels=3
        ),
        {None: tf.ViTForImageClassification, "FEATURE_EXTRACTION": tf.ViTModel},
    ),
}


def backbone(family: str, task_type: str | None = "first", seed: int = 0, **settings) -> nn.Module:
    """A tiny random model, in eval mode; the same seed gives the same weights."""
    config, heads = FAMILIES[family]
    config = config()
    for name, value in settings.items():
        setattr(config, name, value)
    if task_type == "QUESTION_ANS":
        config.num_labels = 2
    torch.manual_seed(seed)
    return heads[first_head(family) if task_type == "first" else task_type](config).eval()


def first_head(family: str) -> str | None:
    return next(iter(FAMILIES[family][1]))


def batch(family: str, task_type: str | None = "first", seed: int = 1) -> dict[str, torch.Tensor]:
    """Three rows of different lengths, padded as the family pads, with labels."""
    generator = torch.Generator().manual_seed(seed)
    task_type = first_head(family) if task_type == "first" else task_type
    if family == "vit":
        inputs = {"pixel_values": torch.randn(3, 3, 12, 12, generator=generator)}
        return inputs if task_type == "FEATURE_EXTRACTION" else {**inputs, "labels": torch.tensor([0, 2, 1])}
    ids = torch.randint(2, VOCAB - 1, (3, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 5 + [0] * 2])
    if task_type == "CAUSAL_LM":
        mask = mask.flip(1)  # on the left
    if family == "t5":
        ids[torch.arange(3), mask.sum(1) - 1] = 1  # its classifier looks for the end of the sentence
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    if task_type == "SEQ_2_SEQ_LM":
        inputs["labels"] = torch.randint(2, VOCAB - 1, (3, 4), generator=generator)
    elif task_type == "CAUSAL_LM":
        inputs["labels"] = inputs["input_ids"].masked_fill(torch.arange(7) < 5, -100)
    elif task_type == "SEQ_CLS":
        inputs["labels"] = torch.tensor([0, 2, 1])
    elif task_type == "TOKEN_CLS":
        inputs["labels"] = torch.randint(0, 2, (3, 7), generator=generator)
    elif task_type == "QUESTION_ANS":
        inputs |= {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 2, 3])}
    return inputs


def prompts(family: str) -> dict[str, torch.Tensor]:
    """The inputs of `generate`."""
    inputs = batch(family)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def rows(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    return {name: value[row : row + 1] for name, value in inputs.items()}


def settings(conditioning: str = "task+sample", **more) -> UnoLoraConfig:
    return UnoLoraConfig(**{"tasks": list(TASKS), "conditioning": conditioning, **more})


def wake(model: nn.Module, seed: int = 2) -> nn.Module:
    """Give a fresh adapter weights with which every part of it is felt: B, the tasks, the positions, the sample.

    A parameter's numbers depend on its name alone, not on what else the model holds.
    """
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        for part, std in (
            ("uno_B", 0.2),
            ("uno_A", 0.15),
            ("_embedding.", 1.0),
            ("scale_", 0.7),
            ("bottleneck", 0.5),
            ("combine", 0.4),
        ):
            if part in name and ".uno_" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def adapted(family: str, conditioning: str = "task+sample", task_type: str | None = "first", **more) -> PeftModel:
    """A tiny backbone with an adapter that is awake, in eval mode."""
    task_type = first_head(family) if task_type == "first" else task_type
    kind = None if family == "vit" else task_type  # PEFT has no class for images
    model = get_peft_model(backbone(family, task_type), settings(conditioning, task_type=kind, **more))
    return wake(model).eval()


def output(model: nn.Module, **inputs) -> torch.Tensor:
    """The main output of a forward, without gradients."""
    with torch.no_grad():
        found = model(**inputs)
    if isinstance(found, torch.Tensor):
        return found
    for name in ("logits", "start_logits", "last_hidden_state"):
        if name in found:
            return found[name]
    raise AssertionError(list(found))


def scales_of(model: PeftModel, tasks, **inputs) -> torch.Tensor:
    """s [B, P, R] of the active adapter."""
    with model.condition(tasks, **inputs):
        (scales,) = current_scales().values()
    return scales.detach()


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference between two tensors of one shape."""
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()


def adapter_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the adapter's tensors."""
    return {name: value.clone() for name, value in model.state_dict().items() if ".uno_" in name}


def same_weights(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return all(torch.equal(now[name], value) for name, value in before.items())


@contextmanager
def training(model: nn.Module) -> Iterator[nn.Module]:
    """Training mode with dropout switched off, so that two forwards can be compared."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "dropout_prob", "attention_dropout", "dropout_rate", "attn_pdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    model.train()
    try:
        yield model
    finally:
        model.eval()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def run():
    """A trained run of three tasks on a tiny encoder."""
    import tiny
    from unolora.runs import load_run

    return load_run(tiny.trained())


@pytest.fixture(scope="module")
def site(run):
    """A server of it."""
    from live import live

    with live(run) as found:
        yield found
