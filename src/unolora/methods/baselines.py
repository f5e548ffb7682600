"""The rivals that PEFT already has, in the shape of a method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from peft import IA3Config, LoraConfig, MultitaskPromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_TARGETS
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from unolora.config import UnoLoraConfig
from unolora.errors import InputError, unknown
from unolora.layer import scaling
from unolora.methods.method import Method
from unolora.words import positions

if TYPE_CHECKING:
    from unolora.settings import Adapter, Settings


def targets(backbone: nn.Module, adapter: Adapter) -> list[str] | str:
    """Return the projections to adapt: those of the settings, or else those that UnoLoRA adapts."""
    from unolora.model import named_targets

    config: Any = backbone.config
    return named_targets(adapter.target_modules, config.to_dict())


def lora_config(backbone: nn.Module, adapter: Adapter) -> LoraConfig:
    """PEFT's settings with the same rank, alpha, dropout and targets."""
    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        use_rslora=adapter.use_rslora,
        lora_dropout=adapter.dropout,
        target_modules=targets(backbone, adapter),
        fan_in_fan_out=transposed(backbone),
        bias="none",
    )


def transposed(backbone: nn.Module) -> bool:
    """Whether the projections store W^T, as GPT-2's do; PEFT wants to be told."""
    return any(isinstance(module, Conv1D) for module in backbone.modules())


def on_meta(backbone: nn.Module) -> nn.Module:
    """Return a copy of the backbone with shapes only, to try an adapter on."""
    tensors = chain(backbone.parameters(), backbone.buffers())
    empty = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors}
    parameters = {id(parameter): nn.Parameter(empty[id(parameter)], False) for parameter in backbone.parameters()}
    return deepcopy(backbone, {**empty, **parameters})


def projections(backbone: nn.Module, adapter: Adapter) -> dict[str, tuple[int, int]]:
    """Return what a LoRA with these settings adapts: names in the order of the network, and their widths in and out."""
    with torch.device("meta"):
        adapted = get_peft_model(on_meta(backbone), lora_config(backbone, adapter)).base_model.model
    layers = {name: module for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    return {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}


def matched_lora_config(backbone: nn.Module, tasks: Sequence[str], adapter: Adapter) -> LoraConfig:
    """PEFT's settings with the smallest rank that has at least the parameters of UnoLoRA*, and the same scaling."""
    config = UnoLoraConfig(tasks=list(tasks), **{**asdict(adapter), "conditioning": "task+sample"})
    with torch.device("meta"):
        star = get_peft_model(on_meta(backbone), config)
    count = sum(parameter.numel() for parameter in star.parameters() if parameter.requires_grad)
    of_a_rank = sum(d_in + d_out for d_in, d_out in projections(backbone, adapter).values())
    matched = lora_config(backbone, adapter)
    matched.r = -(-count // of_a_rank)  # rounded up
    matched.lora_alpha = scaling(adapter.alpha, adapter.r, adapter.use_rslora) * (
        matched.r**0.5 if adapter.use_rslora else matched.r
    )
    return matched


def ia3_config(backbone: nn.Module) -> IA3Config:
    """PEFT's settings of (IA)^3: keys, values and the inside of the feed-forward part, as it knows them by family.

    Raises:
        InputError: It does not know the family.
    """
    config: Any = backbone.config
    if config.model_type not in IA3_TARGETS:
        raise unknown("family of backbones for (IA)^3", config.model_type, sorted(IA3_TARGETS))
    return IA3Config(fan_in_fan_out=transposed(backbone))


class UnoLora(Method):
    """UnoLoRA's tuner as a method.

    Args:
        backbone: A `PeftModel` with a `UnoLoraConfig`.
    """

    @contextmanager
    def condition(self, tasks: Tensor, inputs: dict[str, Any]) -> Iterator[Any]:
        """Set the scales of these rows; the hypernetwork runs once."""
        tuner: Any = self.backbone.base_model
        with tuner.condition(tasks, **inputs):
            yield self.backbone


class LoraPerTask(Method):
    """One LoRA for each task. A mixed batch is run task by task, since PEFT mixes adapters at inference only.

    Args:
        backbone: The frozen backbone.
        tasks: Names, which become the adapters' names (with a prefix, so that none meets a module's name).
        config: Settings of each LoRA.
    """

    mixes = False

    def __init__(self, backbone: nn.Module, tasks: Sequence[str], config: LoraConfig) -> None:
        names = [f"task_{task}" for task in tasks]
        adapted = get_peft_model(backbone, deepcopy(config), adapter_name=names[0])
        for name in names[1:]:
            adapted.add_adapter(name, deepcopy(config))
        adapted.base_model.set_requires_grad(names)
        super().__init__(adapted)
        self.names = names

    @contextmanager
    def condition(self, tasks: Tensor, inputs: dict[str, Any]) -> Iterator[Any]:
        """Switch to the LoRA of the batch's task."""
        tuner: Any = self.backbone.base_model
        tuner.set_adapter(self.names[int(tasks[0])])
        try:
            yield self.backbone
        finally:
            tuner.set_requires_grad(self.names)  # selecting an adapter freezes the others; all of them are trained


class FullPerTask(Method):
    """A backbone for each task. A mixed batch is run task by task.

    Args:
        backbone: The first task's; the others get copies.
        tasks: Names.
    """

    mixes = False

    def __init__(self, backbone: nn.Module, tasks: Sequence[str]) -> None:
        super().__init__(backbone.requires_grad_(True))
        self.others = nn.ModuleList(deepcopy(backbone) for _ in tasks[1:])

    @contextmanager
    def condition(self, tasks: Tensor, inputs: dict[str, Any]) -> Iterator[Any]:
        """Give the backbone of the batch's task."""
        row = int(tasks[0])
        yield self.others[row - 1] if row else self.backbone


class MultitaskPromptTuning(Method):
    """Multitask prompt tuning (Wang et al. 2023, https://arxiv.org/abs/2303.02861), with PEFT's prompts.

        P_t = P * (u_t v_t^T)

    where P [n, D] is shared by all tasks, u_t [n] and v_t [D] are the task's own, and n tokens go in front of the
    input. As everything is trained at once here, there is no distillation from prompts of single tasks.

    Args:
        backbone: The frozen backbone.
        tasks: Names.
        settings: Of the run.

    Raises:
        InputError: The prompt leaves no room for the input.
    """

    def __init__(self, backbone: nn.Module, tasks: Sequence[str], settings: Settings) -> None:
        super().__init__(backbone.requires_grad_(False))
        n, limit = settings.rivals.prompt_tokens, positions(backbone)
        if limit is not None and n + settings.data.max_length > limit:
            raise InputError(
                f"`rivals.prompt_tokens` {n} and `data.max_length` {settings.data.max_length} must fit the {limit} "
                f"tokens that {settings.backbone!r} takes; lower one of them"
            )
        embeddings: Any = backbone.get_input_embeddings()  # type: ignore[operator]
        config = MultitaskPromptTuningConfig(
            num_virtual_tokens=n,
            token_dim=embeddings.weight.shape[1],
            num_transformer_submodules=1,
            num_tasks=len(tasks),
        )
        self.prompts = MultitaskPromptEmbedding(config, embeddings).to(embeddings.weight.device)

    def embed(self, tasks: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        """Put the tasks' prompts in front: `inputs_embeds` [B, n + T, D] for `input_ids`, and a mask as long."""
        n = self.prompts.num_virtual_tokens
        found = dict(inputs)
        backbone: Any = self.backbone
        tokens = backbone.get_input_embeddings()(found.pop("input_ids"))  #                    [B, T, D]
        places = torch.arange(n, device=tasks.device).expand(len(tasks), -1)
        prompts = self.prompts(places, tasks).to(tokens.dtype)  #                              [B, n, D]
        found["inputs_embeds"] = torch.cat([prompts, tokens], dim=1)  #                        [B, n + T, D]
        for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
            if name in found:
                found[name] = nn.functional.pad(found[name], (n, 0), value=value)  #           [B, n + T]
        return found
