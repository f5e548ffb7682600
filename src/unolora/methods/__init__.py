"""What can be trained: each method is one function (backbone, tasks, adapter) -> encoder, all trained alike.

An encoder is called with the tokenizer's inputs and `tasks` [B]. The trainer, the data and the evaluation can't tell
the methods apart, so that a comparison is fair by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from unolora.settings import Adapter

Build = Callable[["nn.Module", Sequence[str], "Adapter"], "nn.Module"]


def unolora(backbone: nn.Module, tasks: Sequence[str], adapter: Adapter) -> nn.Module:
    """UnoLoRA, or UnoLoRA* where the scale depends on the task or the sample."""
    from dataclasses import asdict

    from peft import get_peft_model

    from unolora.config import UnoLoraConfig

    return get_peft_model(backbone, UnoLoraConfig(tasks=list(tasks), **asdict(adapter)))


def lora_shared(backbone: nn.Module, tasks: Sequence[str], adapter: Adapter) -> nn.Module:
    """PEFT's LoRA, one for all tasks."""
    from peft import get_peft_model

    from unolora.methods.baselines import TaskBlind, lora_config

    return TaskBlind(get_peft_model(backbone, lora_config(backbone, adapter)))


def lora_per_task(backbone: nn.Module, tasks: Sequence[str], adapter: Adapter) -> nn.Module:
    """PEFT's LoRA, one for each task; every row of a batch trains its own task's."""
    from unolora.methods.baselines import LoraPerTask, lora_config

    return LoraPerTask(backbone, tasks, lora_config(backbone, adapter))


def full(backbone: nn.Module, tasks: Sequence[str], adapter: Adapter) -> nn.Module:
    """Full fine-tuning of the backbone on all tasks."""
    from unolora.methods.baselines import TaskBlind

    return TaskBlind(backbone.requires_grad_(True))


def heads_only(backbone: nn.Module, tasks: Sequence[str], adapter: Adapter) -> nn.Module:
    """The frozen backbone, so that only the heads are trained."""
    from unolora.methods.baselines import TaskBlind

    return TaskBlind(backbone.requires_grad_(False))


METHODS: dict[str, Build] = {
    "full": full,
    "heads-only": heads_only,
    "lora-per-task": lora_per_task,
    "lora-shared": lora_shared,
    "unolora": unolora,
}


def label(method: str, adapter: Any) -> str:
    """Name a method as a table would."""
    if method == "unolora":
        return "UnoLoRA" if adapter.conditioning == "none" else f"UnoLoRA* ({adapter.conditioning})"
    return {
        "full": "full fine-tuning",
        "heads-only": "frozen backbone, heads only",
        "lora-per-task": "LoRA per task",
        "lora-shared": "shared LoRA",
    }[method]
