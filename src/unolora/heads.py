"""Per-task heads on an encoder, for mixed tasks in one batch.

Each task owns one linear map on the pooled states. The logits of every row for every task are laid side by side, and
each row keeps the columns of its task. The maps stay products of their own: in one common product, a task that comes or
goes would change the last bits of the others.

Axes: B batch, T tokens, D width, K tasks, C outputs of the widest head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from unolora.hypernetwork import encode_sample
from unolora.methods.method import Method
from unolora.tasks import Task


class Moments(NamedTuple):
    """What is known of a regression's training targets."""

    mean: float = 0.0
    std: float = 1.0
    low: float = 0.0
    high: float = 1.0

    @classmethod
    def of(cls, targets: np.ndarray[Any, Any]) -> Moments:
        """Measure training targets [N]; a constant gets the standard deviation 1."""
        return cls(float(targets.mean()), float(targets.std()) or 1.0, float(targets.min()), float(targets.max()))


class TaskHeads(nn.Module):
    """A linear head for each task.

    Args:
        width: D, of the pooled states.
        tasks: In the order of their rows; a classification has as many outputs as labels, a regression one.
        moments: Of each regression. Its head predicts in units of the mean and the standard deviation, so that a task's
            scale does not decide its weight in the loss.
    """

    columns: Tensor  # [K, C] of each task its columns in the laid-out logits, -1 where it has fewer
    regression: Tensor  # [K]
    mean: Tensor  # [K]
    std: Tensor  # [K]

    def __init__(self, width: int, tasks: Sequence[Task], moments: Mapping[str, Moments]) -> None:
        super().__init__()
        outputs = [len(task.labels) if task.kind == "classification" else 1 for task in tasks]
        # With a prefix, since a module's own names (`values`, `type`) can't be keys, but can be tasks.
        self.linear = nn.ModuleDict(
            {f"task_{task.name}": nn.Linear(width, n) for task, n in zip(tasks, outputs, strict=True)}
        )
        columns = torch.full((len(tasks), max(outputs)), -1)
        for k, n in enumerate(outputs):
            columns[k, :n] = torch.arange(n) + sum(outputs[:k])
        pairs = torch.tensor([moments.get(task.name, Moments())[:2] for task in tasks])
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("regression", torch.tensor([t.kind == "regression" for t in tasks]), persistent=False)
        self.register_buffer("mean", pairs[:, 0].clone())
        self.register_buffer("std", pairs[:, 1].clone())

    def forward(self, pooled: Tensor, tasks: Tensor) -> Tensor:
        """Map pooled states [B, D] to logits [B, C] of each row's task; columns that it lacks are -inf."""
        laid_out = torch.cat([head(pooled) for head in self.linear.values()], dim=1).float()  # [B, sum C]
        columns = self.columns[tasks]  #                                                         [B, C]
        return laid_out.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -torch.inf)

    def losses(self, logits: Tensor, tasks: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each row [B]: cross-entropy, or the squared error in standard deviations."""
        regression = self.regression[tasks]  # [B]
        classes = torch.where(regression, 0.0, labels).long()
        entropy = F.cross_entropy(logits, classes, reduction="none")
        error = logits[:, 0] - (labels - self.mean[tasks]) / self.std[tasks]
        return torch.where(regression, error.square(), entropy)

    def passes(self, row: int) -> int:
        """How many rows of the backbone's output one row of a task takes: one."""
        return 1

    def predict(self, logits: Tensor, tasks: Tensor) -> Tensor:
        """Turn logits [B, C] into label ids, or numbers in the task's own units [B]."""
        numbers = logits[:, 0] * self.std[tasks] + self.mean[tasks]
        return torch.where(self.regression[tasks], numbers, logits.argmax(dim=1).to(numbers.dtype))


class MultiTaskModel(nn.Module):
    """An adapted encoder with a head for each task; what the trainer sees, whatever the method.

    Args:
        method: Called with the tokenizer's inputs and `tasks`; returns the last hidden states [B, T, D].
        heads: The heads.
    """

    def __init__(self, method: Method, heads: TaskHeads) -> None:
        super().__init__()
        self.method = method
        self.heads = heads

    def forward(
        self, attention_mask: Tensor, tasks: Tensor, labels: Tensor | None = None, **inputs: Any
    ) -> dict[str, Tensor]:
        """Run a batch of any mix of tasks.

        Args:
            attention_mask: [B, T].
            tasks: Rows of the tasks [B].
            labels: Label ids or numbers [B].
            **inputs: `input_ids` [B, T] and what else the tokenizer gives.

        Returns:
            `logits` [B, C] and `answers` [B], label ids or numbers; with labels instead `losses` [B] and their mean,
            `loss`.
        """
        states = self.method(tasks, **inputs, attention_mask=attention_mask)  # [B, T, D]
        pooled = encode_sample(states, attention_mask)  # the mean over the tokens that count              [B, D]
        logits = self.heads(pooled, tasks)
        if labels is None:
            return {"logits": logits, "answers": self.heads.predict(logits, tasks)}
        losses = self.heads.losses(logits, tasks, labels)
        return {"loss": losses.mean(), "losses": losses}
