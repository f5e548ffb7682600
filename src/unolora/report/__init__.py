r"""A run folder in, one HTML file out, which opens anywhere without a network.

    RUN/results.json, metrics.jsonl     what was reached, and on the way  \
    RUN/predictions.json                mistakes                           \
    RUN/analysis/                       what was learned                    >  RUN/report.html
    RUN/baselines/*/ (the same)         the rivals, trained alike          /
    RUN/config.yaml, environment.json   what is needed to repeat it       /

    read.py        files -> a run           scores.py, mistakes.py, learned.py   a run -> tables and figures
    page.py        tables and figures -> HTML            several.py              runs beside each other

What is missing or wrong in a run is said on the page, and the rest is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unolora.atomic import write_text
from unolora.charts import Column, Table
from unolora.errors import InputError
from unolora.report import learned, mistakes, scores
from unolora.report.page import Code, More, Page, Section, listed, render
from unolora.report.read import Run, mapping, read, rivals_of, text
from unolora.report.several import write_comparison

__all__ = ["write_comparison", "write_report"]

ANALYSIS = "analysis"
"""The folder in a run that holds what `unolora analyze` found."""


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    The page holds everything it shows and asks nothing of a network. Without plotly it has the same tables, and in the
    place of the figures a line on how to get them.

    Args:
        folder: What `unolora train` wrote, finished or not.

    Raises:
        InputError: There is neither a `results.json` nor a log that could be read.
    """
    folder = Path(folder)
    run = read(folder, series=1)
    rivals = rivals_of(run)
    environment = _noting(run, lambda: _environment(folder), {})
    config = _noting(run, lambda: text(folder / "config.yaml", "the configuration of a run"), None)
    sections = [
        Section("scores", "Scores", _scores(run, rivals)),
        Section("curves", "Learning curves", _curves(run, rivals)),
        Section("mistakes", "Mistakes", _mistakes(run)),
        Section("learned", "What was learned", _learned(run, rivals)),
        Section("sampling", "Tasks and sampling", _sampling(run)),
        Section("cost", "Parameters and time", list(scores.cost_tables(run, rivals))),
        Section("repeat", "Repeat this run", _repeat(config, environment)),
    ]
    seed = None if run.seed is None else f"seed {run.seed:,}"
    page = Page(
        kicker="unolora report",
        title=run.name,
        subtitle=run.label,
        meta=listed([run.label, run.backbone, seed, environment.get("date")]),
        lead=scores.summary(run, rivals),
        cards=scores.cards(run, rivals),
        sections=sections,
        notes=list(dict.fromkeys(run.notes)),
    )
    path = folder / "report.html"
    write_text(path, render(page))
    return path


def _environment(folder: Path) -> dict[str, Any]:
    path = folder / "environment.json"
    return mapping(text(path, "the environment of a run"), str(path))


def _noting(run: Run, get: Any, default: Any) -> Any:
    try:
        return get()
    except InputError as error:
        run.notes.append(str(error))
        return default


def _scores(run: Run, rivals: list[Run]) -> list[Any]:
    if not run.tasks:
        return ["There are no scores yet."]
    intervals = " Beneath a score, the 95 % interval of a bootstrap of the test rows." * bool(run.predicted)
    floor = f" The floor is {run.floor.label}: what a guess reaches without reading the text." * bool(run.floor.label)
    about = (
        f"Each task is scored by the first of its metrics, on rows that training never saw.{floor} The best of a row "
        f"is in bold; a gain above zero is for the better.{intervals}"
    )
    test, validation = (scores.scores(run, rivals, split) for split in ("test", "validation"))
    others = {split: scores.other_metrics(run, rivals, split) for split in ("test", "validation")}
    kind = "The step to keep was chosen on this split, so its scores are a little too kind."
    return listed(
        [
            about,
            test,
            More("Other metrics, test split", [others["test"]]) if others["test"] else None,
            scores.score_figure(test, run, rivals, "test"),
            More("Scores and other metrics, validation split", listed([kind, validation, others["validation"]])),
        ]
    )


def _curves(run: Run, rivals: list[Run]) -> list[Any]:
    return scores.curve_figures(run, rivals) or ["The log of this run holds neither evaluations nor losses."]


def _mistakes(run: Run) -> list[Any]:
    if not run.predicted:
        return ["This run kept no predictions: it is not finished, or was trained by an earlier version."]
    worst = mistakes.worst(run)
    about = "The wrong labels that the run was surest of, and its largest errors."
    return listed([mistakes.figure(run), about if worst else None, *worst])


def _learned(run: Run, rivals: list[Run]) -> list[Any]:
    folder = run.folder / ANALYSIS
    if not folder.is_dir():
        return [
            f"There is no analysis yet: `unolora analyze {run.folder.name}` makes one, of methods with an A and a B."
        ]
    from unolora import analysis

    found = _noting(run, lambda: analysis.read(folder), None)
    if found is None:
        return ["The analysis can't be read."]
    run.notes.extend(found.notes)
    return learned.items(found, {each.label: each.series for each in (run, *rivals)})


def _sampling(run: Run) -> list[Any]:
    if not run.tasks:
        return ["There are no results that would say what was sampled."]
    about = (
        "Planned is the share that the sampling strategy gives a task; seen is what the batches held. One pass means "
        "that as many examples were seen as the task has training rows."
    )
    tasks = More("Tasks: kind, labels, rows", [scores.task_table(run)])
    return [about, scores.sampling_table(run), scores.sampling_figure(run), tasks]


def _repeat(config: str | None, environment: Mapping[str, Any]) -> list[Any]:
    if config is None:
        return ["The configuration is missing, so this run can't be repeated from this page."]
    about = "Save the configuration below as config.yaml, or take the file from the folder of the run, and train:"
    rows = [[key, str(value)] for key, value in environment.items()]
    return [
        about,
        Code("Command", "unolora train config.yaml --output runs/again"),
        More("config.yaml", [Code("config.yaml", config)], open=True),
        Table("Environment", [Column("What"), Column("Which")], rows),
    ]
