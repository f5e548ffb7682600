"""MTL-LoRA (Yang et al. 2024, https://arxiv.org/abs/2410.09437): one A, a turn of its ranks for each task, several B's.

    y = W x + (alpha / r) sum_i p_ti B_i Lambda_t A x        p_t = softmax(w_t / temperature)

A and the B_i are shared by all tasks; Lambda_t [r, r] starts as the identity, the B_i at zero. The w_t start apart, as
in the published code: from equal ones the B_i would stay equal for ever.

Rows of a batch pick their Lambda_t and p_t; what depends on a row has the width of the rank, and so costs little.

Axes: B batch, N rows of a layer (B, or B x beams), T tokens, D width, R rank, K tasks, M number of B's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from unolora.layer import scaling
from unolora.methods.baselines import projections
from unolora.methods.method import Method, adding

if TYPE_CHECKING:
    from unolora.settings import Settings


class MtlLora(Method):
    """MTL-LoRA on the projections that LoRA would adapt.

    Args:
        backbone: The frozen backbone.
        tasks: Names.
        settings: Of the run.
    """

    def __init__(self, backbone: nn.Module, tasks: Sequence[str], settings: Settings) -> None:
        super().__init__(backbone.requires_grad_(False))
        found = projections(backbone, settings.adapter)
        self.names = list(found)
        self.updates = nn.ModuleList(Update(*widths, len(tasks), settings) for widths in found.values())
        self.updates.to(next(backbone.parameters()).device)

    @contextmanager
    def condition(self, tasks: Tensor, inputs: dict[str, Any]) -> Iterator[Any]:
        """Add the updates of the batch's tasks to the projections."""
        modules = map(self.backbone.get_submodule, self.names)
        with adding(zip(modules, self.updates, strict=True), tasks):
            yield self.backbone


class Update(nn.Module):
    """What is added to one projection.

    Args:
        d_in, d_out: Its widths.
        num_tasks: K.
        settings: Of the run.
    """

    def __init__(self, d_in: int, d_out: int, num_tasks: int, settings: Settings) -> None:
        super().__init__()
        r, ups = settings.adapter.r, settings.rivals.mtl_lora_ups
        self.scaling = scaling(settings.adapter.alpha, r, settings.adapter.use_rslora)
        self.temperature = settings.rivals.mtl_lora_temperature
        self.dropout = nn.Dropout(settings.adapter.dropout)
        self.A = nn.Parameter(torch.empty(r, d_in))
        self.turns = nn.Parameter(torch.eye(r).repeat(num_tasks, 1, 1))  # Lambda_t [K, R, R]
        self.B = nn.Parameter(torch.zeros(ups, d_out, r))
        self.mixture = nn.Parameter(torch.empty(num_tasks, ups))  #         w_t      [K, M]
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.mixture, a=math.sqrt(5))

    def forward(self, x: Tensor, tasks: Tensor) -> Tensor:
        """Map x [N, T, D_in] of these tasks [N] to what is added [N, T, D_out]."""
        h = F.linear(self.dropout(x.to(self.A.dtype)), self.A)  #             [N, T, R]
        h = h @ self.turns[tasks].mT  #                                       [N, T, R]
        p = (self.mixture[tasks] / self.temperature).softmax(dim=1)  #        [N, M]
        h = (h.unsqueeze(2) * p[:, None, :, None]).flatten(2)  #              [N, T, M R]
        B = self.B.transpose(0, 1).flatten(1)  #                              [D_out, M R]
        return F.linear(h.to(B.dtype), B) * self.scaling
