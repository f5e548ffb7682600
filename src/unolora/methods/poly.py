"""Poly and C-Poly: each task mixes LoRAs that all tasks share, its skills.

    Poly    y = W x + B_t A_t x / r,    A_t = sum_i p_ti A_i,  B_t = sum_i p_ti B_i
            p_t = z_t / sum_i z_ti,     z_ti ~ Gumbel-sigmoid of a logit in training, its sigmoid after
            (Ponti et al. 2023, https://arxiv.org/abs/2202.13914)
    C-Poly  the same, and a LoRA that is the task's own: y + B'_t A'_t x / r
            (Wang et al. 2024, https://arxiv.org/abs/2312.03248; one own skill a task, whose weight is in its B)

The skills are PEFT's layers. Its model gives them the tasks of the batch as they are, which fails where a layer sees
each row several times (beams); here each layer gets the task of each of its rows.

Axes: B batch, N rows of a layer (B, or B x beams), T tokens, D width, R rank, K tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import PolyConfig, inject_adapter_in_model
from peft.tuners.poly import PolyLayer
from torch import Tensor, nn

from unolora.errors import InputError
from unolora.methods.baselines import targets, transposed
from unolora.methods.method import Method, adding, tasks_of_rows

if TYPE_CHECKING:
    from unolora.settings import Settings


def poly_config(backbone: nn.Module, tasks: Sequence[str], settings: Settings) -> PolyConfig:
    """PEFT's settings with the same rank and targets.

    Raises:
        InputError: The backbone's projections are of a kind that PEFT's Poly does not take.
    """
    if transposed(backbone):
        raise InputError(
            f"Poly adapts `nn.Linear` only, and {settings.backbone!r} has other projections; choose another backbone "
            "or method"
        )
    return PolyConfig(
        r=settings.adapter.r,
        target_modules=targets(backbone, settings.adapter),
        n_tasks=len(tasks),
        n_skills=settings.rivals.poly_skills,
    )


class Poly(Method):
    """PEFT's Poly as a method.

    Args:
        backbone: Frozen, with Poly's layers in it.
    """

    def layers(self) -> list[Any]:
        """Return Poly's layers in the order of the network."""
        return [module for module in self.backbone.modules() if isinstance(module, PolyLayer)]

    @contextmanager
    def condition(self, tasks: Tensor, inputs: dict[str, Any]) -> Iterator[Any]:
        """Tell each layer the tasks of its rows."""

        def told(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            return args, {**kwargs, "task_ids": tasks_of_rows(args[0], tasks)}

        with ExitStack() as hooks:
            for layer in self.layers():
                hooks.callback(layer.register_forward_pre_hook(told, with_kwargs=True).remove)
            yield self.backbone


class CPoly(Poly):
    """Poly, and beside it a LoRA for each task.

    Args:
        backbone: The frozen backbone.
        tasks: Names.
        settings: Of the run.
    """

    def __init__(self, backbone: nn.Module, tasks: Sequence[str], settings: Settings) -> None:
        config = poly_config(backbone, tasks, settings)
        super().__init__(inject_adapter_in_model(config, backbone.requires_grad_(False)))
        r = settings.adapter.r
        self.own = nn.ModuleList(OwnSkills(layer, len(tasks), r) for layer in self.layers())

    @contextmanager
    def condition(self, tasks: Tensor, inputs: dict[str, Any]) -> Iterator[Any]:
        """Tell each layer the tasks of its rows, and add their own LoRAs."""
        with super().condition(tasks, inputs) as backbone, adding(zip(self.layers(), self.own, strict=True), tasks):
            yield backbone


class OwnSkills(nn.Module):
    """A LoRA for each task on one projection.

    Args:
        layer: Poly's layer on it.
        num_tasks: K.
        r: R.
    """

    def __init__(self, layer: Any, num_tasks: int, r: int) -> None:
        super().__init__()
        device = layer.base_layer.weight.device
        self.A = nn.Parameter(torch.empty(num_tasks, r, layer.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(num_tasks, layer.out_features, r, device=device))
        bound = 1 / math.sqrt(layer.in_features)  # that of `nn.Linear`, as for the shared skills
        nn.init.uniform_(self.A, -bound, bound)

    def forward(self, x: Tensor, tasks: Tensor) -> Tensor:
        """Map x [N, T, D_in] of these tasks [N] to what is added [N, T, D_out]."""
        A, B = self.A[tasks], self.B[tasks]  #                     [N, R, D_in], [N, D_out, R]
        return x.to(A.dtype) @ A.mT @ B.mT / A.shape[1]
