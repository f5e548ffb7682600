r"""A run folder in, one HTML file out, which opens anywhere without a network.

    RUN/results.json, metrics.jsonl     what was reached, and on the way  \
    RUN/baselines/*/ (the same two)     the rivals, trained alike          >  RUN/report.html
    RUN/config.yaml, environment.json   what is needed to repeat it       /

Three steps, in the order of this file: read (and refuse what is not a run), arrange into tables and figures, write.
A figure is plain data for plotly.js; its numbers stand in a table below it, so nothing is lost without sight, without
JavaScript or without plotly. The page itself (markup, style, script) lies in `assets/`.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from unolora.atomic import write_text
from unolora.errors import InputError

Number = int | float
Metrics = dict[str, dict[str, dict[str, Number | None]]]  # task -> split -> metric -> value
Rows = list[list[Any]]

AVERAGE = "mean_of_first_metrics"
SPLITS = ("train", "validation", "test")
PARAMETERS = ("total", "trainable", "adapter", "heads", "trainable_percent", "per_task_percent")
TIME = ("train_seconds", "evaluation_seconds", "examples_per_second")
LOWER_IS_BETTER = frozenset({"mse", "rmse"})
FLOOR, RUN = 0, 1  # series numbers: the colour, dash and marker of a method in every figure; rivals follow
DASHES = ("dot", "solid", "dash", "dashdot", "longdash", "longdashdot", "dash", "dashdot")
MARKERS = ("circle", "circle", "square", "diamond", "triangle-up", "cross", "x", "star")
NOTHING, MINUS = "\u2013", "\u2212"
MOST_POINTS, MOST_POINTS_IN_FIGURE = 200, 10_000  # of a curve; beyond, the page grows and its tables tire
NO_FIGURES = (
    "The figures need plotly, which was not installed when this report was written: pip install 'unolora[report]'"
)


# ---------------------------------------------------------------- read


@dataclass(frozen=True)
class _Task:
    name: str
    kind: str
    metric: str  # the one that is the task's score
    labels: tuple[str, ...]
    rows: dict[str, Number | None]
    planned: Number | None  # share of the batches, 0..1
    seen: Number | None  # examples


@dataclass(frozen=True)
class _Method:
    """A column of the score tables and a series of the figures."""

    label: str
    series: int
    metrics: Metrics
    averages: dict[str, dict[str, Number | None]]  # name -> split -> value

    def score(self, task: _Task, split: str, metric: str | None = None) -> Number | None:
        return self.metrics.get(task.name, {}).get(split, {}).get(metric or task.metric)

    def average(self, split: str, name: str = AVERAGE) -> Number | None:
        return self.averages.get(name, {}).get(split)


@dataclass(frozen=True)
class _Run(_Method):
    name: str
    backbone: str
    seed: Number | None
    steps: Number | None
    best_step: Number | None
    tasks: list[_Task]
    floor: _Method  # majority class, or the mean of the training targets
    parameters: dict[str, Number | None]
    time: dict[str, Number | None]
    # step -> "average" and every task -> score; step -> training loss
    validation: dict[int, dict[str, Number | None]] = field(default_factory=dict)
    loss: dict[int, Number | None] = field(default_factory=dict)


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        message = f"{path}: expected {what}, but {reason}; give the folder of a finished `unolora train` run"
        raise InputError(message) from error


def _mapping(text: str, where: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: expected JSON, got {error}; train the run again") from error
    if not isinstance(document, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(document).__name__}; train the run again")
    return document


def _number(value: Any) -> Number | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} in the place of a number")
    return value if math.isfinite(value) else None


def _numbers(mapping: Mapping[str, Any]) -> dict[str, Number | None]:
    return {str(key): _number(value) for key, value in mapping.items()}


def _splits(mapping: Mapping[str, Any]) -> dict[str, dict[str, Number | None]]:
    return {str(key): _numbers(value) for key, value in mapping.items()}


def _mean(values: Iterable[Number | None]) -> float | None:
    known = list(values)
    present = [value for value in known if value is not None]
    return sum(present) / len(present) if present and len(present) == len(known) else None


def _floor(tasks: Sequence[_Task], entries: Sequence[Mapping[str, Any]]) -> _Method:
    label = " / ".join(dict.fromkeys(str(entry["baseline"]["name"]) for entry in entries))
    metrics = {str(entry["name"]): _splits(entry["baseline"]["metrics"]) for entry in entries}
    method = _Method(label, FLOOR, metrics, {})
    means = {split: _mean(method.score(task, split) for task in tasks) for split in ("validation", "test")}
    return _Method(label, FLOOR, metrics, {AVERAGE: means})


def _results(document: Mapping[str, Any], series: int) -> _Run:
    entries = document["tasks"]
    tasks = [
        _Task(
            name=str(entry["name"]),
            kind=str(entry["kind"]),
            metric=str(entry["score_metric"]),
            labels=tuple(str(label) for label in entry["labels"]),
            rows=_numbers(entry["rows"]),
            planned=_number(entry["sampling"]["planned"]),
            seen=_number(entry["sampling"]["seen"]),
        )
        for entry in entries
    ]
    if not tasks:
        raise ValueError("no tasks")
    return _Run(
        label=str(document["label"]),
        series=series,
        metrics={str(entry["name"]): _splits(entry["metrics"]) for entry in entries},
        averages={AVERAGE: {}, **_splits(document["averages"])},
        name=str(document["name"]),
        backbone=str(document["backbone"]),
        seed=_number(document["seed"]),
        steps=_number(document["steps"]),
        best_step=_number(document["best_step"]),
        tasks=tasks,
        floor=_floor(tasks, entries),
        parameters={key: _number(document["parameters"][key]) for key in PARAMETERS},
        time={key: _number(document["time"][key]) for key in TIME},
    )


def _log(run: _Run, line: Mapping[str, Any]) -> None:
    """Add a line of metrics.jsonl; after a resumed run the later line of a step holds."""
    if line["kind"] == "train":
        run.loss[int(line["step"])] = _number(line["loss"])
    elif line["kind"] == "evaluation" and line["split"] == "validation":
        run.validation[int(line["step"])] = {"average": _number(line["average"]), **_numbers(line["scores"])}


def _read(folder: Path, series: int) -> _Run:
    path = folder / "results.json"
    try:
        where = str(path)
        run = _results(_mapping(_text(path, "the results of a run"), where), series)
        path = folder / "metrics.jsonl"
        for number, text in enumerate(_text(path, "the log of a run").splitlines(), start=1):
            where = f"{path}, line {number}"
            if text.strip():
                _log(run, _mapping(text, where))
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        wrong = f"no key {error}" if isinstance(error, KeyError) else str(error)
        message = f"{where}: expected the layout that `unolora train` writes, got {wrong}; train the run again"
        raise InputError(message) from error
    return run


def _same_tasks(run: _Run, rival: _Run, path: Path) -> None:
    """Refuse a rival with other tasks: its average would be one of something else."""
    expected, got = ({(task.name, task.metric) for task in r.tasks} for r in (run, rival))
    if expected != got:
        odd = ", ".join(f"{name} ({metric})" for name, metric in sorted(expected ^ got))
        raise InputError(
            f"{path}: expected the tasks and metrics of the run, but only one of the two has {odd}; train it again"
        )


# ---------------------------------------------------------------- arrange


@dataclass(frozen=True)
class _Column:
    title: str
    show: str = "text"  # how `_show` writes its values
    series: int | None = None


@dataclass(frozen=True)
class _Table:
    caption: str
    columns: list[_Column]
    rows: Rows  # the first value of a row is its header
    best: frozenset[tuple[int, int]] = frozenset()  # (row, column) of the winners
    total: bool = False  # the last row sums up


@dataclass(frozen=True)
class _Series:
    label: str
    number: int  # FLOOR, RUN, rivals: its colour, dash and marker
    points: dict[Any, Any]  # step or task -> value


@dataclass(frozen=True)
class _Panel:
    """One set of axes; what is drawn and what stands in the table below come from the same points."""

    heading: str
    series: list[_Series]
    bars: bool = False  # bars over tasks, or lines over steps
    show: str = "score"
    kept: Number | None = None  # the step whose weights were kept

    def table(self) -> _Table:
        """Return the numbers of the panel."""
        keys = list(dict.fromkeys(key for series in self.series for key in series.points))
        columns = [_Column(series.label, self.show, series.number) for series in self.series]
        first = _Column("Task") if self.bars else _Column("Step", "count")
        rows: Rows = [[key, *(s.points.get(key) for s in self.series)] for key in (keys if self.bars else sorted(keys))]
        return _Table(f"Numbers of the figure{': ' * bool(self.heading)}{self.heading}", [first, *columns], rows)

    def plot(self) -> dict[str, Any]:
        """Return the panel for plotly.js; `report.js` adds colours, fonts and margins."""
        if self.bars:
            return self._bars()
        layout: dict[str, Any] = {"height": 220, "hovermode": "x unified"}
        if self.kept is not None:
            line = {"type": "line", "x0": self.kept, "x1": self.kept, "yref": "paper", "y0": 0, "y1": 1}
            note = {"x": self.kept, "yref": "paper", "y": 1, "yanchor": "bottom", "text": "kept", "showarrow": False}
            layout |= {"shapes": [line], "annotations": [note]}
        return {"data": [_line(series) for series in self.series], "layout": layout}

    def _bars(self) -> dict[str, Any]:
        """Draw them lying down: that stays readable with thirty tasks and on a phone."""
        height = 50 + len(self.series[0].points) * (14 * len(self.series) + 14)
        x = {"rangemode": "tozero", **({"tickformat": ".0%"} if self.show == "share" else {})}
        y = {"autorange": "reversed", "type": "category", "showgrid": False}
        layout = {"height": height, "bargap": 0.22, "xaxis": x, "yaxis": y, "margin": {"r": 48}}
        return {"data": [_bar(series, self.show) for series in self.series], "layout": layout}


@dataclass(frozen=True)
class _Figure:
    title: str
    alt: str
    panels: list[_Panel]


def _bar(series: _Series, show: str) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "meta": series.number,
        "name": html.escape(series.label),  # plotly.js reads a little HTML in names
        "y": list(series.points),
        "x": list(series.points.values()),
        "text": ["" if value is None else _show(value, show) for value in series.points.values()],
        "textposition": "outside",
        "cliponaxis": False,
        "hovertemplate": "%{y}: %{text}<extra>%{fullData.name}</extra>",
    }


def _line(series: _Series) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(series.points) <= 30 and series.number != FLOOR else "lines",
        "meta": series.number,
        "name": html.escape(series.label),
        "x": list(series.points),
        "y": list(series.points.values()),
        "line": {"dash": DASHES[series.number % len(DASHES)], "width": 2.5 if series.number == RUN else 1.75},
        "marker": {"symbol": MARKERS[series.number % len(MARKERS)], "size": 6},
        "hovertemplate": "%{y:.3f}",
    }


def _duration(seconds: Number) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


SHOW: dict[str, Callable[[Number], str]] = {
    "score": lambda value: f"{value:.3f}",
    "gain": lambda value: f"{value:+.3f}" if abs(value) >= 0.0005 else "0.000",
    "count": lambda value: f"{value:,.0f}",
    "percent": lambda value: f"{value:.3g} %",
    "share": lambda value: f"{100 * value:.1f} %",
    "times": lambda value: f"{value:.2f}",
    "rate": lambda value: f"{value:,.1f}",
    "duration": _duration,
}


def _show(value: Any, how: str) -> str:
    if value is None:
        return NOTHING
    return str(value) if how == "text" else SHOW[how](value).replace("-", MINUS)


def _gain(value: Number | None, other: Number | None, lower: bool) -> float | None:
    """How much better `value` is, so that more is better whichever way the metric points."""
    if value is None or other is None:
        return None
    return other - value if lower else value - other


def _winner(values: Iterable[Number | None], lower: bool) -> Number | None:
    known = [value for value in values if value is not None]
    return (min if lower else max)(known, default=None)


def _columns(methods: Sequence[_Method]) -> list[_Column]:
    return [_Column(method.label, "score", method.series) for method in methods]


def _score_rows(run: _Run, methods: Sequence[_Method], split: str) -> tuple[list[tuple[str, bool]], Rows]:
    """Return the ("metric", lower is better) and the scores of each task, then of their average."""
    how = [(task.metric, task.metric in LOWER_IS_BETTER) for task in run.tasks]
    rows: Rows = [[method.score(task, split) for method in methods] for task in run.tasks]
    how.append(("mean", all(lower for _, lower in how)))
    return how, [*rows, [method.average(split) for method in methods]]


def _scores(run: _Run, rivals: Sequence[_Run], split: str) -> _Table:
    methods = [run.floor, *rivals, run]
    columns = [_Column("Task"), _Column("Metric"), _Column("Rows", "count"), *_columns(methods)]
    columns += [_Column("Gain over floor", "gain")] + [_Column("Gain over best other", "gain")] * bool(rivals)
    names = [*(task.name for task in run.tasks), "average"]
    sizes = [*(task.rows.get(split) for task in run.tasks), sum(task.rows.get(split) or 0 for task in run.tasks)]
    rows: Rows = []
    best = set()
    for index, ((metric, lower), scores) in enumerate(zip(*_score_rows(run, methods, split), strict=True)):
        top = _winner(scores, lower)
        best |= {(index, 3 + column) for column, score in enumerate(scores) if score is not None and score == top}
        gains = [_gain(scores[-1], scores[0], lower), _gain(scores[-1], _winner(scores[:-1], lower), lower)]
        rows.append([names[index], metric, sizes[index], *scores, *gains[: 1 + bool(rivals)]])
    return _Table(f"Scores on the {split} split", columns, rows, frozenset(best), total=True)


def _other_metrics(run: _Run, rivals: Sequence[_Run], split: str) -> _Table | None:
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
    columns = [_Column("Task"), _Column("Metric"), *_columns(methods)]
    return _Table(f"Other metrics on the {split} split", columns, rows) if rows else None


def _score_figure(run: _Run, rivals: Sequence[_Run], split: str) -> _Figure:
    methods = [run.floor, *rivals, run]
    scores = [{"average": m.average(split), **{task.name: m.score(task, split) for task in run.tasks}} for m in methods]
    series = [_Series(m.label, m.series, points) for m, points in zip(methods, scores, strict=True)]
    averages = ", ".join(f"{m.label} {_show(m.average(split), 'score')}" for m in methods)
    alt = f"Bar chart of the {split} scores of {_tasks(run)} by method. On average: {averages}."
    return _Figure(f"{split.capitalize()} score by task and method", alt, [_Panel("", series, bars=True)])


def _thin(points: Mapping[int, Any], curves: int) -> dict[int, Any]:
    """Return one of the `curves` of a figure in the order of its steps, with points left out where there are many."""
    steps = sorted(points)
    most = min(MOST_POINTS, max(20, MOST_POINTS_IN_FIGURE // curves))
    stride = math.ceil(len(steps) / most) or 1
    return {step: points[step] for step in [*steps[::stride], *steps[-1:]]}


def _curve_panel(run: _Run, runs: Sequence[_Run], name: str, floor: Number | None) -> _Panel:
    count = len(runs) * (len(run.tasks) + 1)
    kept = {r.series: _thin(r.validation, count) for r in runs}
    curves = [_Series(r.label, r.series, {s: v.get(name) for s, v in kept[r.series].items()}) for r in runs]
    steps = {step for curve in curves for step in curve.points}
    level = _Series(run.floor.label, FLOOR, dict.fromkeys(sorted(steps), floor))
    return _Panel(name, [level, *curves], kept=run.best_step if name == "average" else None)


def _curve_figures(run: _Run, rivals: Sequence[_Run]) -> list[_Figure]:
    figures = []
    runs = [r for r in [*rivals, run] if r.validation]
    if runs:
        floors = {task.name: run.floor.score(task, "validation") for task in run.tasks}
        floors = {"average": run.floor.average("validation"), **floors}
        panels = [_curve_panel(run, runs, name, floor) for name, floor in floors.items()]
        alt = f"Line charts of the validation score over the steps, for the average and each of {_tasks(run)}."
        figures.append(_Figure("Validation score by step", alt, panels))
    curves = [_Series(r.label, r.series, _thin(r.loss, 1 + len(rivals))) for r in [*rivals, run] if r.loss]
    if curves:
        ends = ", ".join(f"{c.label} {_show(list(c.points.values())[-1], 'score')}" for c in curves)
        alt = f"Line chart of the training loss over the steps. At the end: {ends}."
        figures.append(_Figure("Training loss by step", alt, [_Panel("", curves)]))
    return figures


def _seen_shares(run: _Run) -> dict[str, Number | None]:
    total = sum(task.seen or 0 for task in run.tasks)
    return {task.name: None if task.seen is None or not total else task.seen / total for task in run.tasks}


def _sampling_figure(run: _Run) -> _Figure:
    planned = _Series("planned", FLOOR, {task.name: task.planned for task in run.tasks})
    seen = _Series("seen", RUN, dict(_seen_shares(run)))
    alt = f"Bar chart of the planned and the seen share of {_tasks(run)} in the batches."
    return _Figure("Share of each task in the batches", alt, [_Panel("", [planned, seen], bars=True, show="share")])


def _sampling_table(run: _Run) -> _Table:
    rows: Rows = []
    for task, share in zip(run.tasks, _seen_shares(run).values(), strict=True):
        size = task.rows.get("train")
        passes = task.seen / size if task.seen is not None and size else None
        rows.append([task.name, size, task.planned, share, task.seen, passes])
    heads = {"Training rows": "count", "Planned share": "share", "Seen share": "share", "Seen examples": "count"}
    columns = [_Column("Task"), *(_Column(title, show) for title, show in heads.items()), _Column("Passes", "times")]
    return _Table("Batches: what was planned and what was seen", columns, rows)


def _task_table(run: _Run) -> _Table:
    columns = [_Column("Task"), _Column("Kind"), _Column("Labels")]
    columns += [_Column(f"{split} rows".capitalize(), "count") for split in SPLITS]
    rows: Rows = []
    for task in run.tasks:
        labels = ", ".join(task.labels[:8]) + (f", … ({len(task.labels)} in all)" if len(task.labels) > 8 else "")
        rows.append([task.name, task.kind, labels or None, *(task.rows.get(split) for split in SPLITS)])
    return _Table("Tasks", columns, rows)


def _cost_tables(run: _Run, rivals: Sequence[_Run]) -> list[_Table]:
    runs = [*rivals, run]
    sizes: Rows = []
    times: Rows = []
    for r in runs:
        total, trainable, adapter, heads, *percents = (r.parameters[key] for key in PARAMETERS)
        backbone = None if total is None else total - (adapter or 0) - (heads or 0)
        sizes.append([r.label, backbone, adapter, heads, trainable, *percents])
        times.append([r.label, r.steps, r.best_step, *(r.time[key] for key in TIME)])
    counts = [_Column(name, "count") for name in ("Backbone", "Adapter", "Heads", "Trainable")]
    percent = [_Column("Trainable share", "percent"), _Column("Share per task", "percent")]
    clock = [_Column("Steps", "count"), _Column("Best step", "count"), _Column("Training", "duration")]
    clock += [_Column("Evaluation", "duration"), _Column("Examples per second", "rate")]
    return [
        _Table("Parameters", [_Column("Method"), *counts, *percent], sizes),
        _Table("Time", [_Column("Method"), *clock], times),
    ]


def _tasks(run: _Run) -> str:
    return "1 task" if len(run.tasks) == 1 else f"{len(run.tasks)} tasks"


def _summary(run: _Run, rivals: Sequence[_Run]) -> str:
    scored = {method.label: _show(method.average("test"), "score") for method in [run.floor, *rivals]}
    share, seconds = run.parameters["trainable_percent"], run.time["train_seconds"]
    where = "on the test split" if len(run.tasks) == 1 else "on average over the test splits"
    text = (
        f"{run.label} trained {_show(share, 'percent')} of the parameters of {run.backbone} on {_tasks(run)} for "
        f"{_show(run.steps, 'count')} steps ({_show(seconds, 'duration')}) and reaches "
        f"{_show(run.average('test'), 'score')} {where}. For comparison: "
        f"{'; '.join(f'{label} {score}' for label, score in scored.items())}."
    )
    how, rows = _score_rows(run, [*rivals, run], "test")
    behind = [
        task.name
        for task, (_, lower), row in zip(run.tasks, how, rows, strict=False)  # the last row is the average
        if (_gain(row[-1], _winner(row, lower), lower) or 0) < 0
    ]
    if rivals:
        text += f" It is the best of the trained methods on {len(run.tasks) - len(behind)} of {_tasks(run)}."
    return text


def _cards(run: _Run, rivals: Sequence[_Run]) -> list[tuple[str, str, str]]:
    """Return (name, value, remark) of the key figures."""
    average, lower = run.average("test"), all(task.metric in LOWER_IS_BETTER for task in run.tasks)
    ranked: Sequence[_Method] = [rival for rival in rivals if rival.average("test") is not None] or [run.floor]
    other = (min if lower else max)(ranked, key=lambda method: method.average("test") or 0)
    gain = _show(_gain(average, other.average("test"), lower), "gain")
    per_task = f"{_show(run.parameters['per_task_percent'], 'percent')} per task"
    speed = f"{_show(run.time['examples_per_second'], 'rate')} examples/s"
    return [
        ("Test score", _show(average, "score"), f"average of {_tasks(run)}"),
        ("Gain", gain, f"over {other.label}"),
        ("Trainable", _show(run.parameters["trainable_percent"], "percent"), per_task),
        ("Adapter", _show(run.parameters["adapter"], "count"), "parameters"),
        ("Training time", _show(run.time["train_seconds"], "duration"), speed),
        ("Best step", _show(run.best_step, "count"), f"of {_show(run.steps, 'count')}"),
    ]


# ---------------------------------------------------------------- write


def _plotly() -> str | None:
    """Return plotly.js, gzip in base64 (a third of its size; `report.js` unpacks it), or None without plotly."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return None
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), compresslevel=6, mtime=0)).decode()


def _page(run: _Run, rivals: Sequence[_Run], config: str, environment: Mapping[str, Any]) -> str:
    loader = jinja2.PackageLoader("unolora", "assets")
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.undefined = jinja2.StrictUndefined
    pages.filters["show"] = _show
    assets = {name: loader.get_source(pages, f"report.{name}")[0] for name in ("css", "js")}
    return pages.get_template("report.html.jinja").render(
        assets=assets,
        plotly=_plotly(),
        no_figures=NO_FIGURES,
        run=run,
        summary=_summary(run, rivals),
        cards=_cards(run, rivals),
        splits={s: (_scores(run, rivals, s), _other_metrics(run, rivals, s)) for s in ("test", "validation")},
        score_figure=_score_figure(run, rivals, "test"),
        curve_figures=_curve_figures(run, rivals),
        task_table=_task_table(run),
        sampling_figure=_sampling_figure(run),
        sampling_table=_sampling_table(run),
        cost_tables=_cost_tables(run, rivals),
        config=config,
        date=environment.get("date"),
        environment=_Table("Environment", [_Column("What"), _Column("Which")], [list(e) for e in environment.items()]),
    )


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    The page holds everything it shows and asks nothing of a network. Without plotly it has the same tables, and in the
    place of the figures a line on how to get them.

    Args:
        run: The folder that `unolora train` wrote: `results.json`, `metrics.jsonl`, `config.yaml`, `environment.json`,
            and under `baselines/<method>/` the `results.json` and `metrics.jsonl` of the methods to compare with.

    Raises:
        InputError: A file is missing, or does not hold what a run writes there.
    """
    run = Path(run)
    this = _read(run, RUN)
    folders = sorted(path.parent for path in run.glob("baselines/*/results.json"))
    rivals = [_read(folder, RUN + 1 + index) for index, folder in enumerate(folders)]
    for folder, rival in zip(folders, rivals, strict=True):
        _same_tasks(this, rival, folder / "results.json")
    config = _text(run / "config.yaml", "the configuration of a run")
    path = run / "environment.json"
    environment = _mapping(_text(path, "the environment of a run"), str(path))
    report = run / "report.html"
    write_text(report, _page(this, rivals, config, environment))
    return report
