"""Tiny random language models, T5 and Llama, with a byte-level tokenizer; their tasks are those of `tiny`, as text."""

import functools
from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import tiny

FAMILIES = ("t5", "llama")


def tokenizer(family: str):
    """Byte-level BPE, so that any label word is a few tokens of its own; T5's ends an input with the end token."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    pieces.train_from_iterator([" ".join(tiny.WORDS)] * 3, trainer)
    if family == "t5":
        pieces.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>", eos_token="</s>")


@functools.cache
def backbone(family: str) -> Path:
    """Folder of a tiny language model without dropout."""
    words = tokenizer(family)
    if family == "t5":
        config = tf.T5Config(
            vocab_size=len(words), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        kind = tf.T5ForConditionalGeneration
    else:
        config = tf.LlamaConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )  # fmt: skip
        kind = tf.LlamaForCausalLM
    path = tiny.folder() / f"tiny-{family}"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(path)
    words.save_pretrained(path)
    return path


def tasks(*names: str) -> list[dict]:
    """The tasks of `tiny`; `heat` is rounded to 5 degrees."""
    found = tiny.tasks(*names)
    return [{**task, "text_step": 5.0} if task["kind"] == "regression" else task for task in found]


def settings(output, family: str, **changes):
    """A run of a few seconds."""
    given = {
        "backbone": str(backbone(family)),
        "tasks": tasks(),
        "data": {"max_length": 64},
        "adapter": {"dropout": 0.0},
        **changes,
    }
    return tiny.settings(output, **given)
