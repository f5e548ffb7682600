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


def lora_matched(backbone: nn.Module, tasks: Sequence[str], settings: Settings) -> Method:
    """PEFT's LoRA, one for all tasks, of a rank that gives it the parameters of UnoLoRA*."""
    from peft import get_peft_model

    from unolora.methods.baselines import matched_lora_config
    from unolora.methods.method import Method

    return Method(get_peft_model(backbone, matched_lora_config(backbone, tasks, settings.adapter)))


def lora_per_task(backbone: nn.Module, tasks: Sequence[str], settings: Settings) -> Method:
    """PEFT's LoRA, one for each task; every row of a batch trains its own task's."""
    from unolora.methods.baselines import LoraPerTask, lora_config

    return LoraPerTask(backbone, tasks, lora_config(backbone, settings.adapter))


def full(backbone: nn.Module, tasks: Sequence[str], settings: Settings) -> Method:
    """Full fine-tuning of the backbone on all tasks."""
    from unolora.methods.method import Method

    return Method(backbone.requires_grad_(True))


def full_per_task(backbone: nn.Module, tasks: Sequence[str], settings: Settings) -> Method:
    """Full fine-tuning of a copy of the backbone for each task."""
    from unolora.methods.baselines import FullPerTask

    return FullPerTask(backbone, tasks)


def heads_only(backbone: nn.Module, tasks: Sequence[str], settings: Settings) -> Method:
    """The frozen backbone, so that only the heads are trained."""
    from unolora.methods.method import Method

    return Method(backbone.requires_grad_(False))


def hyperformer(backbone: nn.Module, tasks: Sequence[str], settings: Settings) -> Method:
    """HyperFormer++: adapters whose weights a network writes from task, layer and place."""
    from unolora.methods.hyperformer import HyperFormer

    return HyperFormer(backbone, tasks, settings.rivals)


def mtl_lora(backbone: nn.Module, tasks: Sequence[str], settings: Settings) -> Method:
    """MTL-LoRA: one A, a turn of its ranks for each task, several B's that a task mixes."""
    from unolora.methods.mtl_lora import MtlLora

    return MtlLora(backbone, tasks, settings)


def poly(backbone: nn.Module, tasks: Sequence[str], settings: Settings) -> Method:
    """PEFT's Poly: each task mixes LoRAs that all share."""
    from peft import get_peft_model

    from unolora.methods.poly import Poly, poly_config

    return Poly(get_peft_model(backbone, poly_config(backbone, tasks, settings)))


def c_poly(backbone: nn.Module, tasks: Sequence[str], settings: Settings) -> Method:
    """C-Poly: Poly, and beside it a LoRA for each task."""
    from unolora.methods.poly import CPoly

    return CPoly(backbone, tasks, settings)


def ia3(backbone: nn.Module, tasks: Sequence[str], settings: Settings) -> Method:
    """PEFT's (IA)^3, one for all tasks."""
    from peft import get_peft_model

    from unolora.methods.baselines import ia3_config
    from unolora.methods.method import Method

    return Method(get_peft_model(backbone, ia3_config(backbone)))


def prompt_tuning(backbone: nn.Module, tasks: Sequence[str], settings: Settings) -> Method:
    """Multitask prompt tuning: tokens in front of the input, a shared prompt times a task's own product."""
    from unolora.methods.baselines import MultitaskPromptTuning

    return MultitaskPromptTuning(backbone, tasks, settings)


METHODS: dict[str, Build] = {
    "c-poly": c_poly,
    "full": full,
    "full-per-task": full_per_task,
    "heads-only": heads_only,
    "hyperformer": hyperformer,
    "ia3": ia3,
    "lora-matched": lora_matched,
    "lora-per-task": lora_per_task,
    "lora-shared": lora_shared,
    "mtl-lora": mtl_lora,
    "poly": poly,
    "prompt-tuning": prompt_tuning,
    "unolora": unolora,
}


def label(method: str, adapter: Any) -> str:
    """Name a method as a table would."""
    if method == "unolora":
        return "UnoLoRA" if adapter.conditioning == "none" else f"UnoLoRA* ({adapter.conditioning})"
    return {
        "c-poly": "C-Poly",
        "full": "full fine-tuning",
        "full-per-task": "full fine-tuning per task",
        "heads-only": "frozen backbone, heads only",
        "hyperformer": "HyperFormer++",
        "ia3": "shared (IA)³",
        "lora-matched": "shared LoRA, parameters of UnoLoRA*",
        "lora-per-task": "LoRA per task",
        "lora-shared": "shared LoRA",
        "mtl-lora": "MTL-LoRA",
        "poly": "Poly",
        "prompt-tuning": "multitask prompt tuning",
    }[method]
