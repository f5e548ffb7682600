"""The logits of a few tokens are those that the model gives, whatever model it is."""

import copy

import pytest
import torch
import transformers as tf
from torch import nn

from unolora.vocabulary import OutputLayer, logits_of

TOKENS = torch.tensor([3, 7, 50])
GROUPS = (TOKENS[:2], TOKENS[2:])
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
SMALL = {"vocab_size": 99, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
HOSTS = {
    "llama": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, **SMALL)
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=1, n_head=4, **SMALL)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(  # squashes its logits
        tf.Gemma2Config(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
            head_dim=8, **SMALL,
        )
    ),
    "phi": lambda: tf.PhiForCausalLM(  # its output layer has a bias
        tf.PhiConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, **SMALL)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(  # scales what goes into its output layer
        tf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0, **SMALL)
    ),
    "bart": lambda: tf.BartForConditionalGeneration(  # adds a vector to the logits of all tokens
        tf.BartConfig(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, decoder_start_token_id=0, forced_eos_token_id=None, **SMALL,
        )
    ),
}  # fmt: skip
NARROW = [name for name in HOSTS if name != "bart"]


def host(name):
    """A tiny random model with large logits, and what it reads."""
    torch.manual_seed(0)
    model = HOSTS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
        if name == "bart":
            model.final_logits_bias.copy_(torch.arange(99.0))
        if name == "phi":
            model.lm_head.bias.copy_(torch.arange(99.0))
    more = {"decoder_input_ids": torch.tensor([[0, 4], [0, 4]])} if model.config.is_encoder_decoder else {}
    return model, lambda: model(input_ids=IDS, **more).logits


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_they_are_those_of_the_whole_vocabulary(name):
    model, read = host(name)
    whole = read()
    assert whole.shape[-1] == 99
    for _ in range(2):  # the first batch is read both ways
        torch.testing.assert_close(logits_of(model, GROUPS, read), whole[..., TOKENS], atol=1e-4, rtol=1e-5)
    assert torch.equal(read(), whole), "outside, the model is as it was"


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_nothing_else_is_computed(name):
    """Counted: the columns of the output layer's product, from the second batch on."""
    model, read = host(name)
    widths = []
    model.get_output_embeddings().register_forward_hook(lambda layer, args, out: widths.append(out.shape[-1]))
    logits_of(model, GROUPS, read)
    widths.clear()
    logits_of(model, GROUPS, read)
    assert widths == [3 if name in NARROW else 99]


@torch.no_grad()
def test_a_group_is_the_same_bit_for_bit_whatever_is_beside_it():
    model = tf.LlamaForCausalLM(
        tf.LlamaConfig(
            hidden_size=384, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            **{**SMALL, "vocab_size": 999},
        )
    ).eval()  # fmt: skip
    ids = torch.randint(3, 999, (5, 7))
    few, many = torch.arange(40, 43), torch.arange(100, 163)

    def read():
        return model(input_ids=ids).logits

    alone = logits_of(model, [few], read)
    assert torch.equal(logits_of(model, [many, few, many + 70], read)[..., 63:66], alone)
    assert model.lm_head.narrows, "all were computed, so nothing is shown"


@torch.no_grad()
def test_a_model_that_looks_at_its_logits_by_token_computes_all():
    """As one that never writes some tokens, and would mask other ones if it got fewer."""
    model, read = host("llama")

    def masked():
        logits = read().clone()
        logits[..., 2] = -1e9
        return logits

    for _ in range(2):
        torch.testing.assert_close(logits_of(model, GROUPS, masked), masked()[..., TOKENS])
    assert model.lm_head.narrows is False


@torch.no_grad()
def test_a_training_model_and_another_layer_compute_all():
    model, read = host("llama")
    model.train()
    assert torch.equal(logits_of(model, GROUPS, read), read()[..., TOKENS])
    assert model.lm_head.narrows is None, "tried where dropout may be at work"
    model, read = host("llama")
    model.lm_head = type("Other", (nn.Linear,), {})(32, 99, bias=False)
    assert torch.equal(logits_of(model, GROUPS, read), read()[..., TOKENS])


@torch.no_grad()
def test_weights_keep_their_names_and_copies_are_apart():
    model, read = host("llama")
    names = list(model.state_dict())
    logits_of(model, GROUPS, read)
    assert isinstance(model.lm_head, OutputLayer), "not narrowed, so nothing is shown"
    assert list(model.state_dict()) == names
    other = copy.deepcopy(model)
    other.lm_head.weight.zero_()
    assert logits_of(other, GROUPS, lambda: other(input_ids=IDS).logits).eq(0).all()
    assert logits_of(model, GROUPS, read).ne(0).any()


@torch.no_grad()
def test_an_error_leaves_all_tokens_wanted():
    model, read = host("llama")
    whole = read()
    logits_of(model, GROUPS, read)

    def fails():
        raise KeyError("x")

    with pytest.raises(KeyError):
        logits_of(model, GROUPS, fails)
    assert torch.equal(read(), whole)
