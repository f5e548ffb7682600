"""What can be trained: each method is one function (backbone, tasks, settings) -> `Method`, all trained alike.

The trainer, the data and the evaluation can't tell the methods apart, so that a comparison is fair by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from unolora.methods.method import Method
    from unolora.settings import Settings

Build = Callable[["nn.Module", Sequence[str], "Settings"], "Method"]


def unolora(backbone: nn.Module, tasks: Sequence[str], settings: Settings) -> Method:
    """UnoLoRA, or UnoLoRA* where the scale depends on the task or the sample."""
    from dataclasses import asdict

    from peft import get_peft_model

    from unolora.config import UnoLoraConfig
    from unolora.methods.baselines import UnoLora

    return UnoLora(get_peft_model(backbone, UnoLoraConfig(tasks=list(tasks), **asdict(settings.adapter))))


def lora_shared(backbone: nn.Module, tasks: Sequence[str], settings: Settings) -> Method:
    """PEFT's LoRA, one for all tasks."""
    from peft import get_peft_model

    from unolora.methods.baselines import lora_config
    from unolora.methods.method import Method

    return Method(get_peft_model(backbone, lora_config(backbone, settings.adapter)))


def lora_per_task(backbone: nn.Module, tasks: Sequence[str], settings: Settings) -> Method:
    """PEFT's LoRA, one for each task; every row of a batch trains its own task's."""
    from unolora.methods.baselines import LoraPerTask, lora_config

    return LoraPerTask(backbone, tasks, lora_config(backbone, settings.adapter))


def full(backbone: nn.Module, tasks: Sequence[str], settings: Settings) -> Method:
    """Full fine-tuning of the backbone on all tasks."""
    from unolora.methods.method import Method

    return Method(backbone.requires_grad_(True))


def heads_only(backbone: nn.Module, tasks: Sequence[str], settings: Settings) -> Method:
    """The frozen backbone, so that only the heads are trained."""
    from unolora.methods.method import Method

    return Method(backbone.requires_grad_(False))


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
