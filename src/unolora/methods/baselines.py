"""The rivals that PEFT already has, in the shape of a method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from unolora.methods.method import Method

if TYPE_CHECKING:
    from unolora.settings import Adapter


def targets(backbone: nn.Module, adapter: Adapter) -> list[str] | str | None:
    """Return the projections to adapt: those of the settings, or else the query and value ones."""
    from unolora.model import TARGET_MODULES

    return adapter.target_modules or TARGET_MODULES.get(getattr(backbone.config, "model_type", ""))


def lora_config(backbone: nn.Module, adapter: Adapter) -> LoraConfig:
    """PEFT's settings with the same rank, alpha, dropout and targets."""
    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets(backbone, adapter),
        bias="none",
    )


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
