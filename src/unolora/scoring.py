"""Predictions and scores of a multi-task model on encoded splits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unolora import metrics
from unolora.data import Collator, Encoded, encode
from unolora.errors import InputError
from unolora.heads import MultiTaskModel
from unolora.runs import Run
from unolora.tasks import Task
from unolora.tasks.rows import Rows, load


@torch.no_grad()
def logits(
    model: MultiTaskModel, rows: Sequence[tuple[int, Encoded, int]], collate: Collator, batch_size: int = 64
) -> Tensor:
    """Run rows of any tasks, longest first so that little is padded, and return their logits [N, C] in the order given.

    Args:
        model: In any mode; it is evaluated without dropout and left as it was.
        rows: Of each its task's row, its split, and its place there.
        collate: Pads a batch.
        batch_size: Rows of a forward; it does not change the result beyond rounding.

    Raises:
        InputError: The outputs are not finite, as after a training that diverged.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][1].inputs["input_ids"][rows[i][2]]))
    was_training = model.training
    model.eval()
    parts = []
    for start in range(0, len(order), batch_size):
        batch = collate([rows[i] for i in order[start : start + batch_size]])
        batch.pop("labels")
        parts.append(model(**{name: value.to(device) for name, value in batch.items()})["logits"].cpu())
    model.train(was_training)
    back = torch.tensor(order).argsort()
    found = torch.cat(parts)[back]
    if not found[:, 0].isfinite().all():  # the others are -inf where a task has fewer labels
        raise InputError("the model's outputs are not finite: training diverged; try a lower `training.learning_rate`")
    return found


def predictions(
    model: MultiTaskModel, splits: Mapping[int, Encoded], collate: Collator, batch_size: int = 64
) -> dict[int, np.ndarray[Any, Any]]:
    """Predict whole splits, all tasks together.

    Returns:
        For each task row label ids or numbers [N].
    """
    rows = [(task, split, i) for task, split in splits.items() for i in range(len(split))]
    device = next(model.parameters()).device
    tasks = torch.tensor([task for task, _, _ in rows], device=device)
    values = model.heads.predict(logits(model, rows, collate, batch_size).to(device), tasks).cpu().numpy()
    ends = np.cumsum([len(split) for split in splits.values()])
    return {task: values[end - len(split) : end] for (task, split), end in zip(splits.items(), ends, strict=True)}


def evaluate(
    model: MultiTaskModel, tasks: Sequence[Task], splits: Mapping[int, Encoded], collate: Collator
) -> dict[str, dict[str, float]]:
    """Score whole splits.

    Returns:
        For each task its metrics, the first of which is its score.
    """
    found = predictions(model, splits, collate)
    return {tasks[row].name: metrics.score(tasks[row], split.targets, found[row]) for row, split in splits.items()}


def evaluate_run(run: Run, split: str) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Score a loaded run on a split of the data that its tasks name.

    Returns:
        For each task its metrics, and its number of rows.

    Raises:
        InputError: The data can't be read any more, or holds labels that the run does not know.
    """
    settings = run.settings.data
    root = None if settings.root is None else Path(settings.root)
    data = [load(task, root=root, limit=settings.limit) for task in run.tasks]  # with the labels of the training
    splits = {row: encode(d.splits[split], run.tokenizer, settings.max_length) for row, d in enumerate(data)}
    scores = evaluate(run.model, run.tasks, splits, Collator(run.tokenizer))
    return scores, {task.name: len(splits[row]) for row, task in enumerate(run.tasks)}


def predict_texts(
    run: Run, task: str, inputs: Sequence[tuple[str, ...]], *, batch_size: int = 64
) -> Iterator[dict[str, Any]]:
    """Predict texts with one task of a run.

    Args:
        run: From `load_run`.
        task: Its name.
        inputs: Of each row one text, or two for a task on pairs.
        batch_size: Rows of a forward.

    Yields:
        For each row `task` and `label` with `probabilities`, or `task` and `value`.

    Raises:
        InputError: The task is unknown, or a row has another number of texts than the task's template.
    """
    row = run.row(task)
    spec = run.tasks[row]
    for place, texts in enumerate(inputs):
        if len(texts) != len(spec.template):
            takes = "one text" if len(spec.template) == 1 else "two texts"
            raise InputError(f"input {place + 1}: task {task!r} takes {takes}, got {len(texts)}")
    if not inputs:
        return
    split = encode(Rows(list(inputs), np.zeros(len(inputs))), run.tokenizer, run.settings.data.max_length)
    rows = [(row, split, i) for i in range(len(split))]
    heads = run.model.heads
    found = logits(run.model, rows, Collator(run.tokenizer), batch_size).to(heads.mean.device)
    values = heads.predict(found, torch.full((len(split),), row, device=found.device)).tolist()
    for value, chances in zip(values, found[:, : max(1, len(spec.labels))].softmax(dim=1).tolist(), strict=True):
        if spec.kind == "regression":
            yield {"task": task, "value": value}
        else:
            label = spec.labels[int(value)]
            yield {"task": task, "label": label, "probabilities": dict(zip(spec.labels, chances, strict=True))}
