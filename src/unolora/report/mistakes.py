"""What a run predicts on the test split: confusion matrices, scatter plots, and its worst mistakes as text."""

from __future__ import annotations

import numpy as np

from unolora.charts import RUN, Figure, Number, Panel, Point, grid, points, show
from unolora.report.page import Quotes
from unolora.report.read import Predicted, Run, Task

MOST_LABELS = 20
"""Of a confusion matrix; of a task with more, those that are confused most."""
MOST_POINTS = 400
"""Of a scatter plot."""
NO_ANSWER = "no answer"


def figure(run: Run) -> Figure | None:
    """Draw a confusion matrix for each classification, and prediction against target for each regression."""
    found = [(task, run.predicted[task.name]) for task in run.tasks if task.name in run.predicted]
    panels = [_confusion(task, p) if task.labels else _scatter(run, task, p) for task, p in found]
    if not panels:
        return None
    alt = "Confusion matrices of the classifications, and scatter plots of the regressions, on the test split."
    return Figure("Predictions by task, test split", alt, panels, [])


def _confusion(task: Task, found: Predicted) -> Panel:
    targets = np.array(found.targets, dtype=int)
    answers = np.array([-1 if value is None else value for value in found.predictions], dtype=int)
    labels = list(range(len(task.labels)))
    heading = f"{task.name}: label (down) and prediction (across), rows"
    if len(labels) > MOST_LABELS:
        wrong = targets != answers
        order = np.argsort(-np.bincount(targets[wrong], minlength=len(labels)), kind="stable")
        labels = sorted(order[:MOST_LABELS].tolist())
        heading += f", the {MOST_LABELS} labels that are missed most"
    columns = labels + [-1] * bool((answers == -1).any())
    cells: list[list[float | None]] = [
        [float(np.count_nonzero((targets == row) & (answers == column))) for column in columns] for row in labels
    ]
    names = [task.labels[row] for row in labels]
    across = [task.labels[column] if column >= 0 else NO_ANSWER for column in columns]
    return grid(heading, names, across, cells, how="count", first="Label")


def _scatter(run: Run, task: Task, found: Predicted) -> Panel:
    stride = max(1, len(found.targets) // MOST_POINTS)
    rows = range(0, len(found.targets), stride)
    given = [Point(run.label, RUN, found.targets[row], found.predictions[row], f"row {row}") for row in rows]
    return points(task.name, given, x="target", y="prediction", same=True, height=300)


def worst(run: Run) -> list[Quotes]:
    """Return the worst mistakes of each task: the wrong labels given with the most confidence, the largest errors."""
    found = []
    for task in run.tasks:
        predicted = run.predicted.get(task.name)
        if predicted is not None and predicted.worst:
            rows = [(_about(task, predicted, row), texts) for row, texts in predicted.worst]
            found.append(Quotes(task.name, rows))
    return found


def _about(task: Task, found: Predicted, row: int) -> str:
    target, value, chance = found.targets[row], found.predictions[row], found.confidence[row]
    if not task.labels:
        return f"row {row}: {show(target, 'times')}, predicted {_or_none(value)}"
    label = NO_ANSWER if value is None or value < 0 else task.labels[int(value)]
    sure = "" if chance is None else f" ({show(100 * chance, 'percent')} sure)"
    return f"row {row}: {task.labels[int(target)]}, predicted {label}{sure}"


def _or_none(value: Number | None) -> str:
    return NO_ANSWER if value is None else show(value, "times")
