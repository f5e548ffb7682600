"""A run folder as a report needs it. What is missing or wrong becomes a note; the rest is read.

results.json       scores, sampling, cost          metrics.jsonl      losses, validation scores, gradients
predictions.json   of the test split               config.yaml, environment.json
analysis/          what `unolora analyze` found
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unolora.charts import FLOOR, Number
from unolora.errors import InputError

Metrics = dict[str, dict[str, dict[str, Number | None]]]  # task -> split -> metric -> value
AVERAGE = "mean_of_first_metrics"
PARAMETERS = ("total", "trainable", "adapter", "heads", "trainable_percent", "per_task_percent")
TIME = ("train_seconds", "evaluation_seconds", "examples_per_second")
COLUMNS = ("targets", "predictions", "confidence")
NO_RUN = "give folders that `unolora train` wrote"


@dataclass(frozen=True)
class Predicted:
    """Predictions of a task's test split: N rows, and the texts of the worst of them."""

    targets: list[float]  # label ids or numbers [N]
    predictions: list[float | None]  # -1 or None where what was written is no answer [N]
    confidence: list[float | None]  # probability of the predicted label [N]
    worst: list[tuple[int, tuple[str, ...]]]  # (row, texts), the worst first


@dataclass(frozen=True)
class Task:
    """A task of a run."""

    name: str
    kind: str = ""
    metric: str = ""  # the one that is the task's score
    labels: tuple[str, ...] = ()
    rows: Mapping[str, Number | None] = field(default_factory=dict)
    planned: Number | None = None  # share of the batches, 0..1
    seen: Number | None = None  # examples


@dataclass(frozen=True)
class Method:
    """A column of the score tables and a series of the figures."""

    label: str
    series: int
    metrics: Metrics
    averages: dict[str, dict[str, Number | None]]  # name -> split -> value

    def score(self, task: Task, split: str, metric: str | None = None) -> Number | None:
        """Return a metric of a task; its score by default."""
        return self.metrics.get(task.name, {}).get(split, {}).get(metric or task.metric)

    def average(self, split: str, name: str = AVERAGE) -> Number | None:
        """Return an average over tasks."""
        return self.averages.get(name, {}).get(split)


@dataclass(frozen=True)
class Run(Method):
    """A run, or a method that was trained beside it."""

    folder: Path
    name: str
    backbone: str | None
    seed: Number | None
    steps: Number | None
    best_step: Number | None
    tasks: list[Task]
    floor: Method  # majority class, or the mean of the training targets
    parameters: dict[str, Number | None]
    time: dict[str, Number | None]
    memory: Number | None
    predicted: dict[str, Predicted] = field(default_factory=dict)
    # step -> "average" and every task -> score; step -> training loss; step -> cosines between tasks' gradients
    validation: dict[int, dict[str, Number | None]] = field(default_factory=dict)
    loss: dict[int, Number | None] = field(default_factory=dict)
    conflict: dict[int, dict[str, dict[str, Number | None]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def text(path: Path, what: str) -> str:
    """Read a text file of a run.

    Raises:
        InputError: It can't be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"{path}: expected {what}, but {reason}; {NO_RUN}") from error


def mapping(given: str, where: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: It is none.
    """
    try:
        document = json.loads(given)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: expected JSON, got {error}; train the run again") from error
    if not isinstance(document, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(document).__name__}; train the run again")
    return document


def read(folder: Path, series: int) -> Run:
    """Read a run, finished or not.

    Args:
        folder: What `unolora train` wrote, or a baseline in it.
        series: Its number in figures.

    Raises:
        InputError: There are neither results nor a log that could be read.
    """
    notes: list[str] = []
    path = folder / "results.json"
    results = _try(lambda: mapping(text(path, "the results of a run"), str(path)), notes)
    log = _try(lambda: text(folder / "metrics.jsonl", "the log of a run"), notes)
    if results is None and not (log or "").strip():
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; {NO_RUN}")
        raise InputError("; ".join(note.split("; ")[0] for note in notes) + f"; {NO_RUN}")
    lines = _lines(log or "", folder / "metrics.jsonl", notes)
    if results is None:
        results = _unfinished(folder, lines)
        notes.append(f"{folder.name} is not finished: there are no test scores, and no weights to analyse.")
    look = _Look(str(folder / "results.json"), notes)
    run = _run(folder, look, results, series)
    for line, number in lines:
        try:
            _log(run, line)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            notes.append(f"metrics.jsonl, line {number}: left out, {_wrong(error)}.")
    run.predicted.update(_predicted(folder / "predictions.json", notes))
    return run


def _try(get: Callable[[], Any], notes: list[str]) -> Any:
    try:
        return get()
    except InputError as error:
        notes.append(str(error))
        return None


def _wrong(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _lines(given: str, path: Path, notes: list[str]) -> list[tuple[dict[str, Any], int]]:
    found = []
    for number, line in enumerate(given.splitlines(), start=1):
        if line.strip():
            try:
                found.append((mapping(line, f"{path}, line {number}"), number))
            except InputError as error:
                notes.append(str(error))
    return found


def _unfinished(folder: Path, lines: Iterable[tuple[dict[str, Any], int]]) -> dict[str, Any]:
    """Gather what a log tells of tasks and scores so far, in the layout of results.json."""
    last: dict[str, Any] = {}
    for line, _ in lines:
        if line.get("kind") == "evaluation" and isinstance(line.get("scores"), dict):
            last = line
    scores = last.get("metrics") or {name: {"score": value} for name, value in last.get("scores", {}).items()}
    return {
        "name": folder.resolve().name,
        "label": folder.resolve().name,
        "tasks": [
            {"name": name, "score_metric": next(iter(found), ""), "metrics": {"validation": found}}
            for name, found in scores.items()
        ],
        "averages": {AVERAGE: {"validation": last.get("average")}},
    }


class _Look:
    """Takes values out of a JSON document, and notes what is not there or is something else."""

    def __init__(self, where: str, notes: list[str]) -> None:
        self.where, self.notes = where, notes

    def get(self, document: Any, name: str, take: Callable[[Any], Any], default: Any) -> Any:
        try:
            return take(document[name])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            note = f"{self.where}: {name} is missing" + (
                "." if isinstance(error, KeyError) else f" or wrong ({error})."
            )
            if note not in self.notes:
                self.notes.append(note)
            return default


def _run(folder: Path, look: _Look, document: Mapping[str, Any], series: int) -> Run:
    half = (
        "parameters" not in document and "method" not in document
    )  # an unfinished one lacks more than is worth a note
    quiet = _Look(look.where, []) if half else look
    entries = [e for e in look.get(document, "tasks", list, []) if isinstance(e, dict) and "name" in e]
    tasks = [_task(entry, quiet) for entry in entries]
    metrics = {str(entry["name"]): quiet.get(entry, "metrics", _splits, {}) for entry in entries}
    return Run(
        label=look.get(document, "label", str, folder.name),
        series=series,
        metrics=metrics,
        averages={AVERAGE: {}, **look.get(document, "averages", _splits, {})},
        folder=folder,
        name=look.get(document, "name", str, folder.name),
        backbone=quiet.get(document, "backbone", str, None),
        seed=quiet.get(document, "seed", _number, None),
        steps=quiet.get(document, "steps", _number, None),
        best_step=quiet.get(document, "best_step", _number, None),
        tasks=tasks,
        floor=_floor(tasks, entries, quiet),
        parameters={**dict.fromkeys(PARAMETERS), **quiet.get(document, "parameters", _numbers, {})},
        time={**dict.fromkeys(TIME), **quiet.get(document, "time", _numbers, {})},
        memory=_numbers(document["memory"]).get("peak_bytes") if isinstance(document.get("memory"), dict) else None,
        notes=look.notes,
    )


def _task(entry: Mapping[str, Any], look: _Look) -> Task:
    sampling = look.get(entry, "sampling", _numbers, {})
    return Task(
        name=str(entry["name"]),
        kind=look.get(entry, "kind", str, ""),
        metric=look.get(entry, "score_metric", str, ""),
        labels=look.get(entry, "labels", lambda labels: tuple(map(str, labels)), ()),
        rows=look.get(entry, "rows", _numbers, {}),
        planned=sampling.get("planned"),
        seen=sampling.get("seen"),
    )


def _floor(tasks: Sequence[Task], entries: Sequence[Mapping[str, Any]], look: _Look) -> Method:
    found = [look.get(entry, "baseline", dict, {}) for entry in entries]
    label = " / ".join(dict.fromkeys(str(each["name"]) for each in found if "name" in each))
    metrics = {
        str(entry["name"]): look.get(each, "metrics", _splits, {}) if each else {}
        for entry, each in zip(entries, found, strict=True)
    }
    method = Method(label, FLOOR, metrics, {})
    means = {split: mean(method.score(task, split) for task in tasks) for split in ("validation", "test")}
    return Method(label, FLOOR, metrics, {AVERAGE: means})


def _number(value: Any) -> Number | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} in the place of a number")
    return value if math.isfinite(value) else None


def _numbers(given: Mapping[str, Any]) -> dict[str, Number | None]:
    return {str(key): _number(value) for key, value in given.items()}


def _splits(given: Mapping[str, Any]) -> dict[str, dict[str, Number | None]]:
    return {str(key): _numbers(value) for key, value in given.items()}


def mean(values: Iterable[Number | None]) -> float | None:
    """Return the mean, or None where one is not known."""
    known = list(values)
    present = [value for value in known if value is not None]
    return sum(present) / len(present) if present and len(present) == len(known) else None


def _log(run: Run, line: Mapping[str, Any]) -> None:
    """Add a line of metrics.jsonl; after a resumed run the later line of a step holds."""
    step = int(line["step"])
    if line["kind"] == "train":
        run.loss[step] = _noted(run, "loss", step, _number(line["loss"]))
    elif line["kind"] == "evaluation" and line["split"] == "validation":
        scores = {"average": _number(line["average"]), **_numbers(line["scores"])}
        run.validation[step] = {name: _noted(run, f"score of {name}", step, value) for name, value in scores.items()}
    elif line["kind"] == "conflict":
        run.conflict[step] = _splits(line["cosines"])


def _noted(run: Run, what: str, step: int, value: Number | None) -> Number | None:
    if value is None:
        run.notes.append(f"metrics.jsonl: the {what} at step {step} is no number.")
    return value


def _predicted(path: Path, notes: list[str]) -> dict[str, Predicted]:
    """Read predictions.json; runs of earlier versions have none, and an unfinished run has none yet."""
    if not path.is_file():
        return {}
    document = _try(lambda: mapping(text(path, "the predictions of a run"), str(path)), notes)
    found = {}
    for name, entry in ((document or {}).get("tasks") or {}).items():
        try:
            values, answers, chances = ([_number(v) for v in entry[key]] for key in COLUMNS)
            targets = [value for value in values if value is not None]
            worst = [(int(row["row"]), tuple(map(str, row["texts"]))) for row in entry["worst"]]
            if not len(targets) == len(answers) == len(chances) or any(not 0 <= r < len(targets) for r, _ in worst):
                raise ValueError("its columns differ in length")
            found[str(name)] = Predicted(targets, answers, chances, worst)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            notes.append(f"predictions.json: {name} is left out, {_wrong(error)}.")
    return found


def rivals_of(run: Run) -> list[Run]:
    """Read the methods that were trained beside a run; one that can't be compared is left out, with a note."""
    found: list[Run] = []
    for path in sorted(run.folder.glob("baselines/*/results.json")):
        try:
            rival = read(path.parent, run.series + 1 + len(found))
        except InputError as error:
            run.notes.append(f"{path.parent.name} is left out: {error}")
            continue
        ours, theirs = ({(task.name, task.metric) for task in r.tasks} for r in (run, rival))
        if ours != theirs:
            odd = ", ".join(f"{name} ({metric})" for name, metric in sorted(ours ^ theirs))
            run.notes.append(f"{rival.label} is left out, since only one of the two runs has {odd}.")
            continue
        run.notes.extend(f"{rival.label}: {note}" for note in rival.notes)
        found.append(rival)
    return found
