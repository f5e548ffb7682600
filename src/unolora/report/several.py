"""Runs beside each other: what `unolora compare` computes, drawn, with curves over steps and their bands over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unolora import compare
from unolora.analysis import WITH_PAIRS, analyze, numbers
from unolora.analysis.figures import span
from unolora.atomic import write_text
from unolora.charts import RUN, Column, Figure, Number, Point, Rows, Series, Table, lines, marks, points
from unolora.errors import InputError
from unolora.report import learned
from unolora.report.page import Code, More, Page, Section, listed, render
from unolora.report.read import AVERAGE, Run, read, text

REFERENCE = "UnoLoRA"
USUAL_NAME = "comparison"
MOST_STEPS = 60
"""Of a curve with a band."""


class _Row:
    """The runs of one method: a row of `compare.rows`, and what their folders hold beside."""

    def __init__(self, number: int, row: Mapping[str, Any], runs: list[Run]) -> None:
        self.number, self.row, self.runs = number, row, runs
        self.label = str(row["label"])

    def score(self, task: str) -> Any:
        metric = self.row["first"]["tasks"].get(task, {}).get("score_metric")
        return _span(self.row["scores"].get(f"{task} {metric}"))


def write_comparison(folders: Sequence[Path], path: Path, against: str | None = None) -> Path:
    """Write a page that compares runs, averaged over their seeds, and return its path.

    Args:
        folders: Run folders (their baselines count too), or folders of such.
        path: The file to write.
        against: Label of the method that the others are compared to; by default plain UnoLoRA, or else the first.

    Raises:
        InputError: No folder holds a finished run, two runs are the same method, settings and seed, or there is no
            method `against`.
    """
    runs, notes = _finished(folders)
    usual = next((row["label"] for row in compare.rows(runs) if row["label"] == REFERENCE), None)
    found = sorted(compare.rows(runs, against=against or usual), key=lambda row: -row["average"].mean)
    notes += [f"The runs differ in {name}, so their scores don't compare." for name in compare.differences(runs)]
    rows = [_Row(number, row, _read(row["folders"], number, notes)) for number, row in enumerate(found, start=RUN)]
    tasks = list(dict.fromkeys(name for row in found for name in row["first"]["tasks"]))
    seeds = sorted({seed for row in found for seed in row["seeds"]})
    if len(seeds) < 2:
        notes.append("There is one seed only, so that there are no intervals and no bands.")
    page = Page(
        kicker="unolora comparison",
        title=path.resolve().parent.name if path.stem == USUAL_NAME else path.stem,
        subtitle=f"{len(rows)} methods",
        meta=listed([", ".join(sorted({run["backbone"] for run in runs})), f"{len(runs)} runs", _seeds(seeds)]),
        lead=_lead(rows, tasks, seeds),
        cards=[],
        sections=[
            Section("scores", "Scores", _scores(rows, tasks)),
            Section("curves", "Learning curves", _curves(rows, tasks)),
            Section("learned", "What was learned", _learned(rows, notes)),
            Section("cost", "Parameters and time", [_cost(rows)]),
            Section("repeat", "Repeat these runs", _repeat(rows)),
        ],
        notes=list(dict.fromkeys(notes)),
    )
    write_text(path, render(page))
    return path


def _finished(folders: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the runs, each once; a folder that can't be compared becomes a note."""
    found: dict[Path, dict[str, Any]] = {}
    notes: list[str] = []
    for folder in folders:
        try:
            runs, left_out = compare.read([folder])
        except InputError as error:
            notes.append(f"Left out: {error}")
            continue
        notes += left_out
        found |= {run["folder"].resolve(): run for run in runs}
    if not found:
        raise InputError(notes[0].removeprefix("Left out: ") if notes else "nothing to compare: give run folders")
    return list(found.values()), notes


def _read(folders: Sequence[Path], number: int, notes: list[str]) -> list[Run]:
    runs = [read(folder, number) for folder in folders]
    for run in runs:
        notes.extend(f"{run.name}: {note}" for note in run.notes)
    return runs


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"


def _span(interval: compare.Interval | None) -> Any:
    return None if interval is None else span(interval.mean, interval.half)


def _lead(rows: Sequence[_Row], tasks: Sequence[str], seeds: Sequence[int]) -> str:
    best = max(rows, key=lambda row: float(row.row["average"].mean))
    average = best.row["average"]
    half = "" if average.half is None else f" \u00b1 {average.half:.3f}"
    head = f"{len(rows)} methods on {len(tasks)} tasks, {_seeds(seeds)}. " if len(rows) > 1 else ""
    words = f"{head}{best.label} reaches the highest average, {average.mean:.3f}{half}."
    apart = [row.label for row in rows if _excludes_zero(row.row["difference"])]
    if len(rows) > 1 and len(seeds) > 1:
        reference = rows[0].row["reference"]
        which = ", ".join(apart) or "none"
        words += (
            f" Of the differences to {reference}, paired by seed, these have a 95 % interval without zero: {which}."
        )
    return words


def _excludes_zero(difference: compare.Interval | None) -> bool:
    return difference is not None and difference.half is not None and abs(difference.mean) > difference.half


# ---------------------------------------------------------------- scores


def _scores(rows: Sequence[_Row], tasks: Sequence[str]) -> list[Any]:
    about = (
        "Test scores, means over seeds; beneath them, and as whiskers, the 95 % interval (Student's t). Each task is "
        "scored by the first of its metrics."
    )
    overall: Rows = [
        [
            row.label,
            _span(row.row["average"]),
            _span(row.row["difference"]),
            row.row["trained_percent"],
            row.row["per_task_percent"],
            len(row.row["seeds"]),
        ]
        for row in rows
    ]
    columns = [
        Column("Method"),
        Column("Average", "score"),
        Column(f"Difference to {rows[0].row['reference']}", "gain"),
    ]
    columns += [Column("Trained, with heads", "percent"), Column("Trained a task, without heads", "percent")]
    each = [Column("Method"), *(Column(task, "score") for task in tasks)]
    return listed(
        [
            about,
            Table("Average over tasks", [*columns, Column("Seeds", "count")], overall),
            _marks("Average by method", rows, {"": [_span(row.row["average"]) for row in rows]}),
            Table("Scores by task", each, [[row.label, *(row.score(task) for task in tasks)] for row in rows]),
            _marks("Score by task and method", rows, {task: [row.score(task) for row in rows] for task in tasks}),
            _against_parameters(rows),
        ]
    )


def _marks(title: str, rows: Sequence[_Row], values: Mapping[str, Sequence[Any]]) -> Figure:
    panels = []
    for heading, each in values.items():
        series = [Series(row.label, row.number, {row.label: value}) for row, value in zip(rows, each, strict=True)]
        panel = marks(heading, series)
        body: Rows = [[row.label, value] for row, value in zip(rows, each, strict=True)]
        panels.append(
            replace(panel, table=Table(panel.table.caption, [Column("Method"), Column("Score", "score")], body))
        )
    alt = f"Marks with intervals over seeds for {len(rows)} methods."
    return Figure(title, alt, panels, [(row.label, row.number) for row in rows], columns=2)


def _against_parameters(rows: Sequence[_Row]) -> Figure:
    given = []
    for row in rows:
        trained = _mean([run.parameters["trainable"] for run in row.runs])
        given.append(Point(row.label, row.number, trained, _span(row.row["average"]), row.label))
    alt = "Scatter plot of the average test score against the number of trained parameters."
    panel = points("", given, x="trained parameters, with heads", y="average test score", log=True)
    return Figure("Score against trained parameters", alt, [panel], [(row.label, row.number) for row in rows])


def _mean(values: Sequence[Number | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# ---------------------------------------------------------------- curves


def _curves(rows: Sequence[_Row], tasks: Sequence[str]) -> list[Any]:
    keys = [(row.label, row.number) for row in rows]
    panels = []
    for name in ["average", *tasks]:
        series = [
            _curve(row, [{s: v.get(name) for s, v in run.validation.items()} for run in row.runs]) for row in rows
        ]
        if any(len(each.points) > 1 for each in series):
            panels.append(lines(name, series))
    losses = [_curve(row, [run.loss for run in row.runs]) for row in rows]
    about = "Means over seeds; the bands are 95 % intervals (Student's t). A key above a figure hides its method."
    alt = "Line charts of the validation score over the steps, with bands over seeds."
    loss = Figure("Training loss by step", "Line chart of the training loss, with bands.", [lines("", losses)], keys)
    return listed(
        [
            about,
            Figure("Validation score by step", alt, panels, keys) if panels else "No run was validated more than once.",
            loss if any(each.points for each in losses) else None,
        ]
    )


def _scores_of(run: Run, name: str) -> dict[int, Number | None]:
    return {step: scores.get(name) for step, scores in run.validation.items()}


def _curve(row: _Row, curves: Sequence[Mapping[int, Number | None]]) -> Series:
    """Average curves at the steps that all of them have."""
    common = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    steps = sorted(common)
    kept = [*steps[:: max(1, len(steps) // MOST_STEPS)], *steps[-1:]]
    found: dict[int, Any] = {}
    for step in kept:
        values = [curve[step] for curve in curves]
        known = [float(value) for value in values if value is not None]
        found[step] = span(*numbers.interval(known)) if len(known) == len(values) else None
    return Series(row.label, row.number, found)


# ---------------------------------------------------------------- the rest


def _learned(rows: Sequence[_Row], notes: list[str]) -> list[Any]:
    """Analyse what has its weights at hand."""
    with_pairs = [run.folder for row in rows for run in row.runs if row.row["first"]["method"] in WITH_PAIRS]
    here = [folder for folder in with_pairs if (folder / "adapter").is_dir()]
    if not here:
        return ["No run here has the weights of an A and a B beside its results, so there is nothing to analyse."]
    try:
        found = analyze(here, rows=0)
    except InputError as error:
        notes.append(f"The analysis is left out: {error}")
        return ["These runs can't be analysed together."]
    notes.extend(found.notes)
    about = "From the weights alone; scales, gradients, starts and ablations come with `unolora analyze RUN...`."
    return [about, *learned.items(found, {row.label: row.number for row in rows})]


def _cost(rows: Sequence[_Row]) -> Table:
    columns = [Column("Method"), Column("Steps", "count"), Column("Trained parameters", "count")]
    columns += [Column("Adapter file", "bytes"), Column("Training", "duration"), Column("Examples per second", "rate")]
    body: Rows = [
        [
            row.label,
            row.row["steps"],
            _mean([run.parameters["trainable"] for run in row.runs]),
            row.row["file_bytes"],
            row.row["train_seconds"],
            _mean([run.time["examples_per_second"] for run in row.runs]),
            _mean([run.memory for run in row.runs]),
        ]
        for row in rows
    ]
    return Table("Parameters, time and memory, means over seeds", [*columns, Column("Memory", "bytes")], body)


def _repeat(rows: Sequence[_Row]) -> list[Any]:
    columns = [Column("Run"), Column("Method"), Column("Seed", "count"), Column("Test average", "score")]
    body: Rows = [[run.name, row.label, run.seed, run.average("test", AVERAGE)] for row in rows for run in row.runs]
    about = "Each run goes again with its own configuration: `unolora train config.yaml --output runs/again`."
    return [about, Table("Runs", columns, body), *(More(row.label, [_config(row)]) for row in rows)]


def _config(row: _Row) -> Any:
    for run in row.runs:
        for folder in (run.folder, run.folder.parent.parent):
            if (folder / "config.yaml").is_file():
                try:
                    return Code(f"config.yaml of {run.name}", text(folder / "config.yaml", "a configuration"))
                except InputError:
                    continue
    return "Its configuration is missing."
