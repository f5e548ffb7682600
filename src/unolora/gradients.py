"""Whether tasks pull the weights that they share in the same direction: the cosines of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def shared(model: nn.Module) -> list[nn.Parameter]:
    """Return what the tasks of a model train together: all trainable parameters but the heads."""
    return [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("heads.")]


def of_tasks(losses: Tensor, tasks: Tensor, parameters: Sequence[nn.Parameter]) -> dict[int, Tensor]:
    """Compute the gradient of each task's summed loss; the graph and `.grad` stay as they were.

    Args:
        losses: Of each row [B], with their graph.
        tasks: Task of each row [B].
        parameters: What to derive by; a parameter that a task does not use has gradient 0.

    Returns:
        Task -> flat gradient [N], in float32.
    """
    found = {}
    for task in tasks.unique().tolist():
        loss = losses[tasks.to(losses.device) == task].sum()
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(grads, parameters, strict=True)
        found[int(task)] = torch.cat([(torch.zeros_like(p) if g is None else g).flatten().float() for g, p in pairs])
    return found


def cosines(gradients: Sequence[Tensor]) -> list[list[float]]:
    """Return the cosine between every two gradients [K, K]; 0 where one of them is zero."""
    rows = torch.nn.functional.normalize(torch.stack(list(gradients)), dim=1)
    found: Any = (rows @ rows.T).clamp(-1, 1).tolist()
    return list(found)
