"""The parts of a run's report that come from its numbers: scores, curves, sampling, cost, summary and key figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from unolora import metrics
from unolora.charts import (
    FLOOR,
    RUN,
    Column,
    Figure,
    Number,
    Panel,
    Rows,
    Series,
    Span,
    Table,
    bars,
    keys_of,
    lines,
    show,
)
from unolora.report.read import AVERAGE, PARAMETERS, TIME, Method, Run, mean

SPLITS = ("train", "validation", "test")
LOWER_IS_BETTER = frozenset({"mse", "rmse"})
MOST_POINTS, MOST_POINTS_IN_FIGURE = 200, 10_000  # of a curve; beyond, the page grows and its tables tire
DRAWS = 200
"""Of a bootstrap."""


def _gain(value: Number | None, other: Number | None, lower: bool) -> float | None:
    """How much better `value` is, so that more is better whichever way the metric points."""
    if value is None or other is None:
        return None
    return other - value if lower else value - other


def _winner(values: Iterable[Number | None], lower: bool) -> Number | None:
    known = [value for value in values if value is not None]
    return (min if lower else max)(known, default=None)


def _columns(methods: Sequence[Method]) -> list[Column]:
    return [Column(method.label, "score", method.series) for method in methods]


def _score_rows(run: Run, methods: Sequence[Method], split: str) -> tuple[list[tuple[str, bool]], Rows]:
    """Return the ("metric", lower is better) and the scores of each task, then of their average."""
    how = [(task.metric, task.metric in LOWER_IS_BETTER) for task in run.tasks]
    rows: Rows = [[method.score(task, split) for method in methods] for task in run.tasks]
    how.append(("mean", all(lower for _, lower in how)))
    return how, [*rows, [method.average(split) for method in methods]]


def spans(run: Run) -> dict[str, tuple[float, float]]:
    """Bootstrap the test rows of a run: task, and "average", -> the ends of its score's 95 % interval.

    It says what other test rows would change, not what another seed would.
    """
    draws = {}
    for task in run.tasks:
        found = run.predicted.get(task.name)
        if found is not None and len(found.targets) > 1:
            predictions = [math.nan if value is None else value for value in found.predictions]
            regression = task.kind == "regression"
            draws[task.name] = metrics.resampled(
                task.metric, found.targets, predictions, regression=regression, labels=len(task.labels), draws=DRAWS
            )
    if run.tasks and len(draws) == len(run.tasks):
        draws["average"] = np.mean(list(draws.values()), axis=0)
    return {name: (float(low), float(high)) for name, (low, high) in _quantiles(draws)}


def _quantiles(draws: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, np.quantile(each, (0.025, 0.975))) for name, each in draws.items()]


def _spanned(value: Number | None, ends: tuple[float, float] | None) -> Any:
    return value if value is None or ends is None else Span(value, min(value, ends[0]), max(value, ends[1]))


def scores(run: Run, rivals: Sequence[Run], split: str) -> Table:
    """Arrange the scores of a split: tasks by methods, what is best in bold, intervals where predictions were kept."""
    methods = [run.floor, *rivals, run]
    known = [{}, *(spans(each) if split == "test" else {} for each in (*rivals, run))]
    columns = [Column("Task"), Column("Metric"), Column("Rows", "count"), *_columns(methods)]
    columns += [Column("Gain over floor", "gain")] + [Column("Gain over best other", "gain")] * bool(rivals)
    names = [*(task.name for task in run.tasks), "average"]
    sizes = [*(task.rows.get(split) for task in run.tasks), sum(task.rows.get(split) or 0 for task in run.tasks)]
    rows: Rows = []
    best = set()
    for index, ((metric, lower), values) in enumerate(zip(*_score_rows(run, methods, split), strict=True)):
        top = _winner(values, lower)
        best |= {(index, 3 + column) for column, value in enumerate(values) if value is not None and value == top}
        gains = [_gain(values[-1], values[0], lower), _gain(values[-1], _winner(values[:-1], lower), lower)]
        cells = [_spanned(value, each.get(names[index])) for value, each in zip(values, known, strict=True)]
        rows.append([names[index], metric, sizes[index], *cells, *gains[: 1 + bool(rivals)]])
    return Table(f"Scores on the {split} split", columns, rows, frozenset(best), total=True)


def other_metrics(run: Run, rivals: Sequence[Run], split: str) -> Table | None:
    """Arrange what is measured beside the scores."""
    methods = [run.floor, *rivals, run]
    rows: Rows = [
        [task.name, metric, *(method.score(task, split, metric) for method in methods)]
        for task in run.tasks
        for metric in run.metrics[task.name].get(split, {})
        if metric != task.metric
    ]
    for name in run.averages:
        if name != AVERAGE:
            rows.append(["average", name.replace("_", " "), *(method.average(split, name) for method in methods)])
    columns = [Column("Task"), Column("Metric"), *_columns(methods)]
    return Table(f"Other metrics on the {split} split", columns, rows) if rows else None


def score_figure(table: Table, run: Run, rivals: Sequence[Run], split: str) -> Figure:
    """Draw the scores of a table that `scores` made."""
    methods = [run.floor, *rivals, run]
    rows = [table.rows[-1], *table.rows[:-1]]
    series = [Series(m.label, m.series, {row[0]: row[3 + column] for row in rows}) for column, m in enumerate(methods)]
    averages = ", ".join(f"{m.label} {show(m.average(split), 'score')}" for m in methods)
    alt = f"Bar chart of the {split} scores of {tasks_of(run)} by method. On average: {averages}."
    return Figure(f"{split.capitalize()} score by task and method", alt, [bars("", series)], keys_of(series))


def _thin(points: Mapping[int, Any], curves: int) -> dict[int, Any]:
    """Return one of the `curves` of a figure in the order of its steps, with points left out where there are many."""
    steps = sorted(points)
    most = min(MOST_POINTS, max(20, MOST_POINTS_IN_FIGURE // curves))
    stride = math.ceil(len(steps) / most) or 1
    return {step: points[step] for step in [*steps[::stride], *steps[-1:]]}


def _curve_panel(run: Run, runs: Sequence[Run], name: str, floor: Number | None) -> Panel:
    count = len(runs) * (len(run.tasks) + 1)
    kept = {r.series: _thin(r.validation, count) for r in runs}
    curves = [Series(r.label, r.series, {s: v.get(name) for s, v in kept[r.series].items()}) for r in runs]
    steps = {step for curve in curves for step in curve.points}
    level = Series(run.floor.label, FLOOR, dict.fromkeys(sorted(steps), floor))
    return lines(name, [level, *curves], kept=run.best_step if name == "average" else None)


def curve_figures(run: Run, rivals: Sequence[Run]) -> list[Figure]:
    """Draw validation scores, training loss and gradient conflict over the steps."""
    figures = []
    runs = [r for r in [*rivals, run] if r.validation]
    if runs:
        floors = {task.name: run.floor.score(task, "validation") for task in run.tasks}
        floors = {"average": run.floor.average("validation"), **floors}
        panels = [_curve_panel(run, runs, name, floor) for name, floor in floors.items()]
        alt = f"Line charts of the validation score over the steps, for the average and each of {tasks_of(run)}."
        figures.append(
            Figure("Validation score by step", alt, panels, [(m.label, m.series) for m in [run.floor, *runs]])
        )
    curves = [Series(r.label, r.series, _thin(r.loss, 1 + len(rivals))) for r in [*rivals, run] if r.loss]
    if curves:
        ends = ", ".join(f"{c.label} {show(list(c.points.values())[-1], 'score')}" for c in curves)
        alt = f"Line chart of the training loss over the steps. At the end: {ends}."
        figures.append(Figure("Training loss by step", alt, [lines("", curves)], keys_of(curves)))
    conflict = _conflict_figure(run)
    return [*figures, conflict] if conflict else figures


def _conflict_figure(run: Run) -> Figure | None:
    """Draw the mean cosine of each task's gradient with those of the others, over the steps where it was logged."""
    if not run.conflict:
        return None
    series: list[Series] = []
    for task in run.tasks:
        means = {step: mean(cosines.get(task.name, {}).values()) for step, cosines in run.conflict.items()}
        series.append(Series(task.name, len(series) + 1, _thin(means, len(run.tasks))))
    alt = "Line chart of the mean cosine between each task's gradient and those of the other tasks, over the steps."
    title = "Gradient conflict by step: below zero, a task pulls against the others"
    return Figure(title, alt, [lines("", series)], keys_of(series))


def _seen_shares(run: Run) -> dict[str, Number | None]:
    total = sum(task.seen or 0 for task in run.tasks)
    return {task.name: None if task.seen is None or not total else task.seen / total for task in run.tasks}


def sampling_figure(run: Run) -> Figure:
    """Draw the planned and the seen share of each task."""
    planned = Series("planned", FLOOR, {task.name: task.planned for task in run.tasks})
    seen = Series("seen", RUN, dict(_seen_shares(run)))
    alt = f"Bar chart of the planned and the seen share of {tasks_of(run)} in the batches."
    both = [planned, seen]
    return Figure("Share of each task in the batches", alt, [bars("", both, how="share")], keys_of(both))


def sampling_table(run: Run) -> Table:
    """Arrange what was planned of each task, and what the batches held."""
    rows: Rows = []
    for task, share in zip(run.tasks, _seen_shares(run).values(), strict=True):
        size = task.rows.get("train")
        passes = task.seen / size if task.seen is not None and size else None
        rows.append([task.name, size, task.planned, share, task.seen, passes])
    heads = {"Training rows": "count", "Planned share": "share", "Seen share": "share", "Seen examples": "count"}
    columns = [Column("Task"), *(Column(title, show) for title, show in heads.items()), Column("Passes", "times")]
    return Table("Batches: what was planned and what was seen", columns, rows)


def task_table(run: Run) -> Table:
    """Arrange what the tasks are."""
    columns = [Column("Task"), Column("Kind"), Column("Labels")]
    columns += [Column(f"{split} rows".capitalize(), "count") for split in SPLITS]
    rows: Rows = []
    for task in run.tasks:
        labels = ", ".join(task.labels[:8]) + (f", … ({len(task.labels)} in all)" if len(task.labels) > 8 else "")
        rows.append([task.name, task.kind, labels or None, *(task.rows.get(split) for split in SPLITS)])
    return Table("Tasks", columns, rows)


def cost_tables(run: Run, rivals: Sequence[Run]) -> list[Table]:
    """Arrange parameters, time and memory."""
    runs = [*rivals, run]
    sizes: Rows = []
    times: Rows = []
    for r in runs:
        total, trainable, adapter, heads, *percents = (r.parameters[key] for key in PARAMETERS)
        backbone = None if total is None else total - (adapter or 0) - (heads or 0)
        sizes.append([r.label, backbone, adapter, heads, trainable, *percents])
        times.append([r.label, r.steps, r.best_step, *(r.time[key] for key in TIME), r.memory])
    counts = [Column(name, "count") for name in ("Backbone", "Adapter", "Heads", "Trainable")]
    percent = [Column("Trainable share", "percent"), Column("Share per task", "percent")]
    clock = [Column("Steps", "count"), Column("Best step", "count"), Column("Training", "duration")]
    clock += [Column("Evaluation", "duration"), Column("Examples per second", "rate")]
    clock += [Column("Memory", "bytes")]
    return [
        Table("Parameters", [Column("Method"), *counts, *percent], sizes),
        Table("Time and memory", [Column("Method"), *clock], times),
    ]


def tasks_of(run: Run) -> str:
    """Return "1 task", or how many."""
    return "1 task" if len(run.tasks) == 1 else f"{len(run.tasks)} tasks"


def summary(run: Run, rivals: Sequence[Run]) -> str:
    """Say in plain words what came out."""
    if run.average("test") is None and not any(run.score(task, "test") is not None for task in run.tasks):
        if run.best_step is None:
            return _so_far(run)
        reached = show(run.average("validation"), "score")
        return f"{run.label} left the test splits alone; it reaches {reached} on average over the validation splits."
    scored = {method.label: show(method.average("test"), "score") for method in [run.floor, *rivals]}
    share, seconds = run.parameters["trainable_percent"], run.time["train_seconds"]
    where = "on the test split" if len(run.tasks) == 1 else "on average over the test splits"
    text = (
        f"{run.label} trained {show(share, 'percent')} of the parameters of {run.backbone} on {tasks_of(run)} for "
        f"{show(run.steps, 'count')} steps ({show(seconds, 'duration')}) and reaches "
        f"{show(run.average('test'), 'score')} {where}. For comparison: "
        f"{'; '.join(f'{label} {score}' for label, score in scored.items())}."
    )
    how, rows = _score_rows(run, [*rivals, run], "test")
    behind = [
        task.name
        for task, (_, lower), row in zip(run.tasks, how, rows, strict=False)  # the last row is the average
        if (_gain(row[-1], _winner(row, lower), lower) or 0) < 0
    ]
    if rivals:
        text += f" It is the best of the trained methods on {len(run.tasks) - len(behind)} of {tasks_of(run)}."
    return text


def _so_far(run: Run) -> str:
    step = max(run.validation, default=None)
    if step is None:
        return f"{run.label} has no scores yet; its log goes to step {max(run.loss, default=0):,}."
    value = show(run.validation[step].get("average"), "score")
    return f"{run.label} is not finished: at step {step:,} it reaches {value} on average over the validation splits."


def cards(run: Run, rivals: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Return (name, value, remark) of the key figures."""
    average, lower = run.average("test"), all(task.metric in LOWER_IS_BETTER for task in run.tasks)
    ranked: Sequence[Method] = [rival for rival in rivals if rival.average("test") is not None] or [run.floor]
    other = (min if lower else max)(ranked, key=lambda method: method.average("test") or 0)
    gain = show(_gain(average, other.average("test"), lower), "gain")
    per_task = f"{show(run.parameters['per_task_percent'], 'percent')} per task"
    speed = f"{show(run.time['examples_per_second'], 'rate')} examples/s"
    return [
        ("Test score", show(average, "score"), f"average of {tasks_of(run)}"),
        ("Gain", gain, f"over {other.label}"),
        ("Trainable", show(run.parameters["trainable_percent"], "percent"), per_task),
        ("Adapter", show(run.parameters["adapter"], "count"), "parameters"),
        ("Training time", show(run.time["train_seconds"], "duration"), speed),
        ("Best step", show(run.best_step, "count"), f"of {show(run.steps, 'count')}"),
    ]
