"""Predictions and scores of a multi-task model on encoded splits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unolora import metrics, processes
from unolora.data import Collator, Encoded
from unolora.errors import InputError
from unolora.runs import NO_GENERATION, Model, Run, check_data, digests, encode_rows
from unolora.tasks import Task
from unolora.tasks.rows import Rows, StreamedRows, load
from unolora.text import TextModel

Row = tuple[int, Encoded, int]
"""A task's row, a split of it, and a place there."""

Values = np.ndarray[Any, Any]


@torch.no_grad()
def outputs(
    model: Model, rows: Sequence[Row], collate: Collator, batch_size: int = 64, scoring: str = "labels"
) -> tuple[Tensor, Tensor]:
    """Run rows of any tasks, longest first so that little is padded.

    Args:
        model: In any mode; it is evaluated without dropout and left as it was.
        rows: The rows.
        collate: Pads a batch.
        batch_size: Rows of a forward; it does not change the result beyond rounding.
        scoring: "labels", or "generation" where answers are text.

    Returns:
        Logits [N, C] (of generation none, [N, 0]) and predicted label ids or numbers [N], in the order given.

    Raises:
        InputError: The outputs are not finite, as after a training that diverged, or heads are asked to generate.
    """
    device = next(model.parameters()).device
    passes = {task: model.heads.passes(task) for task in {task for task, _, _ in rows}}
    cost = [(passes[task], -len(split.inputs["input_ids"][i])) for task, split, i in rows]
    order = sorted(range(len(rows)), key=cost.__getitem__)
    was_training = model.training
    model.eval()
    logits, answers = [], []
    for start in range(0, len(order), batch_size):
        batch = collate([rows[i] for i in order[start : start + batch_size]])
        batch = {name: value.to(device) for name, value in batch.items() if name not in ("labels", "answers")}
        if scoring == "generation":
            if not isinstance(model, TextModel):
                raise InputError(NO_GENERATION)
            values, _ = model.generate(**batch)
            logits.append(torch.empty(len(values), 0))
            answers.append(values)
        else:
            out = model(**batch)
            logits.append(out["logits"].cpu())
            answers.append(out["answers"].cpu())
    model.train(was_training)
    back = torch.tensor(order).argsort()
    found = torch.cat(logits)[back]
    if not found[:, :1].isfinite().all():  # the others are -inf where a task has fewer labels
        raise InputError("the model's outputs are not finite: training diverged; try a lower `training.learning_rate`")
    return found, torch.cat(answers)[back]


def predictions(
    model: Model, splits: Mapping[int, Encoded], collate: Collator, scoring: str = "labels"
) -> dict[int, np.ndarray[Any, Any]]:
    """Predict whole splits, all tasks together.

    The ranks of a run share the rows, so that all of them must call it.

    Returns:
        For each task row label ids or numbers [N]; `metrics.UNPARSED` or NaN where what was generated is no answer.
    """
    rows = [(task, split, i) for task, split in splits.items() for i in range(len(split))]
    values = _shared(lambda own: outputs(model, own, collate, scoring=scoring)[1].numpy(), rows, model)
    ends = np.cumsum([len(split) for split in splits.values()])
    return {task: values[end - len(split) : end] for (task, split), end in zip(splits.items(), ends, strict=True)}


def _shared(predict: Callable[[Sequence[Row]], Values], rows: Sequence[Row], model: Model) -> Values:
    """Predict rows, each rank a part of them; where weights are in parts too, every rank has to run all rows."""
    n = processes.count()
    if n == 1 or processes.sharded(model):
        return predict(rows)
    own = rows[processes.rank() :: n]
    found, failure = np.empty(0), ""
    try:
        found = predict(own) if own else found
    except InputError as error:  # the others would wait for this rank
        failure = str(error)
    parts = processes.gathered([(found, failure)])
    for _, failure in parts:
        if failure:
            raise InputError(failure)
    values = np.empty(len(rows), parts[0][0].dtype)
    for rank, (part, _) in enumerate(parts):
        values[rank::n] = part
    return values


def scored(
    tasks: Sequence[Task], splits: Mapping[int, Encoded], found: Mapping[int, np.ndarray[Any, Any]]
) -> dict[str, dict[str, float]]:
    """Score predictions; of each task its metrics, the first of which is its score."""
    return {tasks[row].name: metrics.score(tasks[row], split.targets, found[row]) for row, split in splits.items()}


def unparsed(tasks: Sequence[Task], found: Mapping[int, np.ndarray[Any, Any]]) -> dict[str, int]:
    """Count the predictions of each task that are no answer."""
    wrong = {
        row: values == metrics.UNPARSED if tasks[row].labels else np.isnan(values) for row, values in found.items()
    }
    return {tasks[row].name: int(np.count_nonzero(where)) for row, where in wrong.items()}


def evaluate(
    model: Model,
    tasks: Sequence[Task],
    splits: Mapping[int, Encoded],
    collate: Collator,
    scoring: str = "labels",
) -> dict[str, dict[str, float]]:
    """Score whole splits.

    Returns:
        For each task its metrics, the first of which is its score.
    """
    return scored(tasks, splits, predictions(model, splits, collate, scoring))


def evaluate_run(run: Run, split: str) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Score a loaded run on a split of the data that its tasks name.

    Returns:
        For each task its metrics, and its number of rows.

    Raises:
        InputError: The data can't be read any more, or holds labels that the run does not know.
    """
    settings = run.settings.data
    root = None if settings.root is None else Path(settings.root)
    limit, fewer = settings.limit, settings.evaluation_limit
    data = [load(task, root=root, limit=limit, evaluation_limit=fewer) for task in run.tasks]  # labels as in training
    check_data(run.folder, digests(data), split)
    for d in data:
        if isinstance(d.splits[split], StreamedRows):
            raise InputError(f"the {split} rows of task {d.task.name!r} are streamed, which are not scored as a whole")
    splits = {
        row: encode_rows(run.model, row, d.splits[split], run.tokenizer, settings.max_length)
        for row, d in enumerate(data)
    }
    scores = evaluate(run.model, run.tasks, splits, Collator(run.tokenizer), run.settings.scoring)
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
        For each row `task` and `label` with `probabilities`, or `task` and `value`. Where answers are text, the label
        is what greedy generation writes; with words that part at several tokens it need not be the likeliest.

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
    given = Rows(list(inputs), np.zeros(len(inputs)))
    split = encode_rows(run.model, row, given, run.tokenizer, run.settings.data.max_length)
    rows = [(row, split, i) for i in range(len(split))]
    found, values = outputs(run.model, rows, Collator(run.tokenizer), batch_size)
    chances = found[:, : max(1, len(spec.labels))].softmax(dim=1)
    for value, chance in zip(values.tolist(), chances.tolist(), strict=True):
        if spec.kind == "regression":
            yield {"task": task, "value": value}
        else:
            label = spec.labels[int(value)]
            yield {"task": task, "label": label, "probabilities": dict(zip(spec.labels, chance, strict=True))}
