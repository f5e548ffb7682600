"""One scale for all samples of a task, where the model's own differs between them: their mean, or one distilled.

    mean        s = 1/N sum_n s(task, x_n)
    distilled   from there, s is trained so that the model with it answers the same inputs as the model without:
                KL(p_model || p_static) of a classification, squared distance of a regression's numbers

Neither looks at labels: some inputs of the task are enough.

Axes: B batch, N calibration rows, C answers, P positions, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from unolora.data import Collator, Encoded
from unolora.heads import MultiTaskModel
from unolora.layer import current_scales, scaled_by
from unolora.methods.method import Method
from unolora.runs import Model, Run
from unolora.text import TextModel

ADAPTER = "default"
EPOCHS, LEAST_STEPS, BATCH_SIZE, LEARNING_RATE = 3, 60, 32, 0.02
"""Of the distillation. On a scale near 1, Adam's steps are about as large as the learning rate."""


@torch.no_grad()
def mean_scale(run: Run, row: int, rows: Encoded, batch_size: int = 64) -> Tensor:
    """Average the scale of a task over rows, [P, R]."""
    found = []
    for start in range(0, len(rows), batch_size):
        inputs, tasks = _batch(run, row, rows, range(start, min(start + batch_size, len(rows))))
        with run.model.method.condition(tasks, inputs):
            scales = current_scales()
            assert scales is not None
            found.append(scales[ADAPTER].double())  # [B, P, R]
    return torch.cat(found).mean(dim=0)


def distilled_scale(run: Run, row: int, rows: Encoded, start: Tensor) -> tuple[Tensor, float, float]:
    """Train a static scale on what the run's model answers to rows. The model is left as it was.

    Args:
        run: A run whose scale depends on the sample.
        row: The task's row.
        rows: Inputs [N]; their targets are not looked at.
        start: The scale to start from [P, R].

    Returns:
        The scale [P, R] with the least distance to the model's answers over all rows, the start among the candidates;
        the distance at the start, and its own.
    """
    trained = [p for p in run.model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        return _distilled(run, row, rows, start)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _distilled(run: Run, row: int, rows: Encoded, start: Tensor) -> tuple[Tensor, float, float]:
    static = _Static(run.model.method.backbone, start.float())
    student: Model
    if isinstance(run.model, TextModel):
        student = TextModel(static, run.model.heads).eval()
    else:
        student = MultiTaskModel(static, run.model.heads).eval()
    parts = [range(place, min(place + BATCH_SIZE, len(rows))) for place in range(0, len(rows), BATCH_SIZE)]
    with torch.no_grad():
        taught = torch.cat([_answers(run, run.model, row, rows, part) for part in parts])  # [N, C]

    def distance() -> float:
        with torch.no_grad():
            given = torch.cat([_answers(run, student, row, rows, part) for part in parts])
            return float(_distances(given, taught).mean())

    before = least = distance()
    best = static.scale.detach().clone()
    steps = max(EPOCHS * len(parts), LEAST_STEPS)
    optimiser = torch.optim.Adam([static.scale], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = np.random.Generator(np.random.Philox(0))
    order: list[int] = []
    for step in range(1, steps + 1):
        order = order or generator.permutation(len(rows)).tolist()
        places, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        optimiser.zero_grad()
        _distances(_answers(run, student, row, rows, places), taught[places]).mean().backward()
        optimiser.step()
        schedule.step()
        if step % len(parts) == 0 or step == steps:
            now = distance()
            if now < least:
                least, best = now, static.scale.detach().clone()
    return best.to(start), before, least


class _Static(Method):
    """UnoLoRA with one trainable scale [P, R] in place of the hypernetwork's."""

    def __init__(self, backbone: nn.Module, scale: Tensor) -> None:
        super().__init__(backbone)
        self.scale = nn.Parameter(scale.clone())

    @contextmanager
    def condition(self, tasks: Tensor, inputs: dict[str, Any]) -> Iterator[Any]:
        backbone: Any = self.backbone
        with scaled_by({ADAPTER: self.scale.expand(len(tasks), -1, -1)}, backbone.base_model):
            yield backbone


def _batch(run: Run, row: int, rows: Encoded, places: Any) -> tuple[dict[str, Tensor], Tensor]:
    batch = Collator(run.tokenizer)([(row, rows, i) for i in places])
    device = next(run.model.parameters()).device
    inputs = {k: v.to(device) for k, v in batch.items() if k not in ("labels", "answers", "tasks")}
    return inputs, batch["tasks"].to(device)


def _answers(run: Run, model: Model, row: int, rows: Encoded, places: Any) -> Tensor:
    """Return the logits of a task's answers [B, C]."""
    inputs, tasks = _batch(run, row, rows, places)
    width = len(run.tasks[row].labels) or None
    logits: Tensor = model(**inputs, tasks=tasks)["logits"]
    if width is None:
        width = 1 if isinstance(model, MultiTaskModel) else model.heads.tree(row).size
    return logits[:, :width]


def _distances(given: Tensor, wanted: Tensor) -> Tensor:
    """How far answers [B, C] are from those wanted [B]."""
    if given.shape[1] == 1:
        return (given - wanted).square().squeeze(1)
    return F.kl_div(given.log_softmax(1), wanted.log_softmax(1), reduction="none", log_target=True).sum(1)
