"""Predictions and scores of a multi-task model on encoded splits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unolora import metrics, processes
from unolora.data import Collator, Encoded
from unolora.errors import InputError
from unolora.runs import NO_GENERATION, Model, Run, check_data, digests, encode_rows, read_data
from unolora.tasks import Task
from unolora.tasks.rows import Rows, StreamedRows
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
    return {row: values for row, (_, values) in _whole(model, splits, collate, scoring).items()}


def _whole(
    model: Model, splits: Mapping[int, Encoded], collate: Collator, scoring: str
) -> dict[int, tuple[Tensor, np.ndarray[Any, Any]]]:
    """Run whole splits, all tasks together: task row -> logits [N, C] and answers [N]."""
    rows = [(task, split, i) for task, split in splits.items() for i in range(len(split))]
    found = _shared(lambda own: _side_by_side(outputs(model, own, collate, scoring=scoring)), rows, model)
    logits, values = torch.from_numpy(found[:, 1:]), found[:, 0]
    ends = np.cumsum([len(split) for split in splits.values()])
    places = {task: slice(end - len(split), end) for (task, split), end in zip(splits.items(), ends, strict=True)}
    return {task: (logits[at], values[at]) for task, at in places.items()}


def _side_by_side(found: tuple[Tensor, Tensor]) -> Values:
    logits, answers = found
    return torch.cat([answers.unsqueeze(1).double(), logits.double()], 1).numpy()  # [N, 1 + C]


def answers(
    model: Model, tasks: Sequence[Task], splits: Mapping[int, Encoded], collate: Collator, scoring: str = "labels"
) -> dict[int, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Predict whole splits, all tasks together, and say how sure the model is.

    Returns:
        For each task row what `predictions` gives [N], and the probability of the predicted label [N], NaN of a number
        and of what was generated.
    """
    found = _whole(model, splits, collate, scoring)
    return {row: (values, _confidence(tasks[row], logits)) for row, (logits, values) in found.items()}


def _confidence(task: Task, logits: Tensor) -> np.ndarray[Any, Any]:
    if not task.labels or not logits.shape[1]:
        return np.full(len(logits), np.nan)
    found: np.ndarray[Any, Any] = logits[:, : len(task.labels)].softmax(dim=1).max(dim=1).values.numpy()
    return found


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
    values = np.empty((len(rows), *parts[0][0].shape[1:]), parts[0][0].dtype)
    for rank, (part, _) in enumerate(parts):
        if len(part):
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


def read_split(run: Run, row: int, split: str) -> Encoded:
    """Read a split of the data that a task of a run names, cut and limited as in training.

    Raises:
        InputError: The data can't be read any more, or holds labels that the run does not know.
    """
    data = read_data(run.settings, run.tasks[row])
    check_data(run.folder, digests([data]), split)
    rows = data.splits[split]
    if isinstance(rows, StreamedRows):
        raise InputError(f"the {split} rows of task {data.task.name!r} are streamed, which are not scored as a whole")
    return encode_rows(run.model, row, rows, run.tokenizer, run.settings.data.max_length)


def evaluate_run(run: Run, split: str) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Score a loaded run on a split of the data that its tasks name.

    Returns:
        For each task its metrics, and its number of rows.

    Raises:
        InputError: The data can't be read any more, or holds labels that the run does not know.
    """
    splits = {row: read_split(run, row, split) for row in range(len(run.tasks))}
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
    if not inputs:
        run.row(task)
        return
    rows = text_rows(run, [(task, texts) for texts in inputs])
    yield from predict_rows(run, rows, batch_size=batch_size)


def predict_rows(run: Run, rows: Sequence[Row], *, batch_size: int = 64) -> list[dict[str, Any]]:
    """Predict rows of any tasks together; of each what `predict_texts` yields.

    Args:
        run: From `load_run`.
        rows: From `text_rows`.
        batch_size: Rows of a forward.
    """
    logits, values = outputs(run.model, rows, Collator(run.tokenizer), batch_size)
    return [answer(run.tasks[row[0]], *found) for row, *found in zip(rows, values.tolist(), logits, strict=True)]


def text_rows(run: Run, inputs: Sequence[tuple[str, tuple[str, ...]]]) -> list[Row]:
    """Tokenize texts of any tasks.

    Args:
        run: From `load_run`.
        inputs: Of each row the name of its task, and one text, or two for a task on pairs.

    Raises:
        InputError: A task is unknown, a row has another number of texts than its task's template, or a text is not
            valid Unicode.
    """
    places: dict[int, list[int]] = {}
    for place, (task, texts) in enumerate(inputs):
        row = run.row(task)
        wanted = len(run.tasks[row].template)
        if len(texts) != wanted:
            takes = "one text" if wanted == 1 else "two texts"
            raise InputError(f"input {place + 1}: task {task!r} takes {takes}, got {len(texts)}")
        places.setdefault(row, []).append(place)
    found: dict[int, Row] = {}
    for row, own in places.items():
        given = Rows([inputs[place][1] for place in own], np.zeros(len(own)))
        split = encode_rows(run.model, row, given, run.tokenizer, run.settings.data.max_length)
        found |= {place: (row, split, i) for i, place in enumerate(own)}
    return [found[place] for place in range(len(inputs))]


def answer(task: Task, value: float, logits: Tensor) -> dict[str, Any]:
    """Spell a prediction: `task` and `label` with `probabilities`, or `task` and `value`.

    Args:
        task: The task.
        value: Label id or number.
        logits: Of which the task's labels come first [C].
    """
    if task.kind == "regression":
        return {"task": task.name, "value": value}
    chances = logits[: len(task.labels)].softmax(0).tolist()
    return {
        "task": task.name,
        "label": task.labels[int(value)],
        "probabilities": dict(zip(task.labels, chances, strict=True)),
    }
