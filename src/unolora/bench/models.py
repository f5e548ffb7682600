"""What is measured: backbones of known shapes with random weights, adapted by PEFT's LoRA and by UnoLoRA."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
TARGETS = {"minilm": ["query", "value"], "t5-base": ["q", "v"]}


def backbone(name: str, **changes: Any) -> Any:
    """Make "minilm" (an encoder) or "t5-base", frozen, with the same weights each time."""
    from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration
    from transformers.initialization import no_init_weights

    torch.manual_seed(0)
    if name == "minilm":
        model: Any = BertModel(BertConfig(**{**MINILM, **changes}), add_pooling_layer=False)
    else:
        shape = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "decoder_start_token_id": 0}
        with no_init_weights():  # it takes longer than what is measured
            model = T5ForConditionalGeneration(T5Config(**{**shape, **changes}))
        for parameter in model.parameters():
            parameter.data.normal_(std=0.02)
        model.tie_weights()
    return model.requires_grad_(False)


def twin(model: Any) -> Any:
    """Copy a model that shares its frozen weights with the original."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def lora(model: Any, name: str, r: int = 8, adapter: str = "default") -> Any:
    """Put PEFT's LoRA on a twin of the backbone."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.1, target_modules=TARGETS[name])
    return get_peft_model(twin(model), config, adapter_name=adapter)


def loras(model: Any, name: str, adapters: int, r: int = 8) -> Any:
    """Put several of PEFT's LoRAs on a twin of the backbone, "task0" and so on.

    All but the first are put into the layers that PEFT made for it: `add_adapter` goes through all modules, those of
    the earlier adapters among them, each time, which takes minutes for hundreds.
    """
    from peft.tuners.lora import LoraLayer

    model = lora(model, name, r, "task0")
    config = model.peft_config["task0"]
    model.peft_config |= {f"task{number}": copy.copy(config) for number in range(1, adapters)}
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        for number in range(1, adapters):
            layer.update_layer(f"task{number}", r, lora_alpha=2 * r, config=config)
    return model


def unolora(
    model: Any, name: str, tasks: int = 32, r: int = 8, conditioning: Any = "task+sample", targets: Any = None
) -> Any:
    """Put UnoLoRA on a twin of the backbone, by default on query and value."""
    from peft import get_peft_model

    from unolora.config import UnoLoraConfig
    from unolora.model import register

    register()
    config = UnoLoraConfig(
        tasks=[f"task{number}" for number in range(tasks)],
        r=r,
        alpha=2 * r,
        dropout=0.1,
        conditioning=conditioning,
        target_modules=targets or TARGETS[name],
    )
    return get_peft_model(twin(model), config)


def floor(model: Any) -> Any:
    """Let gradients flow through a twin of the backbone down to its embeddings, with nothing to train."""
    model = twin(model)

    def watch(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output.requires_grad_() if torch.is_grad_enabled() else output

    table = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is table:  # T5's encoder and decoder have one each
            module.register_forward_hook(watch)
    return model


def batch(name: str, rows: int = 32, tokens: int = 32, answer: int = 4) -> dict[str, Tensor]:
    """Make a batch without padding; for "t5-base" with answers of `answer` tokens."""
    torch.manual_seed(1)
    ids = torch.randint(1000, (rows, tokens))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "t5-base":
        inputs["labels"] = torch.randint(1000, (rows, answer))
    return inputs


def loss(output: Any) -> Tensor:
    """Return the loss, or for an encoder the mean square of its states."""
    found = getattr(output, "loss", None)
    return output.last_hidden_state.square().mean() if found is None else found


def trained(model: Any) -> list[Tensor]:
    """Return the parameters that training changes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
