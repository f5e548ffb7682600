"""The rivals that PEFT already has, in the shape of a method."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

if TYPE_CHECKING:
    from unolora.settings import Adapter


def lora_config(backbone: nn.Module, adapter: Adapter) -> LoraConfig:
    """PEFT's settings with the same rank, alpha, dropout and targets."""
    from unolora.model import TARGET_MODULES

    targets = adapter.target_modules or TARGET_MODULES.get(getattr(backbone.config, "model_type", ""))
    return LoraConfig(
        r=adapter.r, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout, target_modules=targets, bias="none"
    )


class TaskBlind(nn.Module):
    """An encoder that does the same for every task."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, tasks: Tensor, **inputs: Any) -> Any:
        """Run the backbone; the tasks are left aside."""
        return self.backbone(**inputs)


class LoraPerTask(nn.Module):
    """One LoRA for each task. A mixed batch is run task by task, since PEFT mixes adapters at inference only.

    Args:
        backbone: The frozen backbone.
        tasks: Names, which become the adapters' names (with a prefix, so that none meets a module's name).
        config: Settings of each LoRA.
    """

    def __init__(self, backbone: nn.Module, tasks: Sequence[str], config: LoraConfig) -> None:
        super().__init__()
        from copy import deepcopy

        self.names = [f"task_{task}" for task in tasks]
        self.backbone = get_peft_model(backbone, deepcopy(config), adapter_name=self.names[0])
        for name in self.names[1:]:
            self.backbone.add_adapter(name, deepcopy(config))
        self.backbone.base_model.set_requires_grad(self.names)

    def forward(self, tasks: Tensor, **inputs: Tensor) -> Any:
        """Run each task's rows through its LoRA and put the states [B, T, D] back in order."""
        present = tasks.unique()
        parts, places = [], []
        for task in present.tolist():
            rows = (tasks == task).nonzero().squeeze(1)
            self.backbone.base_model.set_adapter(self.names[task])
            out = self.backbone(**{name: value[rows] for name, value in inputs.items()})
            parts.append(out.last_hidden_state)
            places.append(rows)
        # Selecting an adapter freezes the others; all of them are trained.
        self.backbone.base_model.set_requires_grad(self.names)
        order = torch.cat(places).argsort()
        return SimpleNamespace(last_hidden_state=torch.cat(parts)[order])
