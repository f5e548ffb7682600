r"""Finished runs side by side: read, rows, columns, text.

RUN/results.json, RUN/baselines/*/results.json    one dict a run
runs of one method's settings, each its seed      a row: means and 95 % intervals over seeds
rows                                              columns, the paper's rows below where the protocol is the paper's
columns                                           aligned text, Markdown, LaTeX or CSV
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from unolora import charts
from unolora import runs as run_folders
from unolora.errors import InputError, unknown
from unolora.metrics import scored_on
from unolora.settings import flat

AVERAGES = ("mean_of_first_metrics", "mean_of_task_means", "mean_of_metrics")
SPLITS = ("test", "validation")
NOT_OF_THE_METHOD = {
    "output", "overwrite", "baselines", "data.root", "training.seed",
    "training.log_every", "training.report_to", "training.checkpoint_every", "training.keep_checkpoints",
    "training.conflict_every",
}  # fmt: skip
"""Settings in which the runs of one row may differ."""
IN_PROTOCOL = {"backbone", "tasks", "training.steps", "training.batch_size"}
NOTHING = "\u2013"


class Interval(NamedTuple):
    """A mean over seeds and the half width of its 95 % interval; None where one seed tells nothing about others."""

    mean: float
    half: float | None = None


@dataclass(frozen=True)
class Column:
    """A title, how its values are shown (a name of SHOW), and a value for each row."""

    title: str
    show: str
    values: list[Any]


# ---------------------------------------------------------------- the paper

PAPER_STEPS, PAPER_BATCH, PAPER_AVERAGE = 262_144, 32, "mean_of_metrics"
PAPER_ROWS = {  # training and test rows of the paper's split of GLUE; the halves of an odd number differ by one
    "cola": (8_551, 522), "sst2": (66_349, 872), "mrpc": (3_668, 204), "qqp": (362_846, 40_430),
    "stsb": (5_749, 750), "mnli": (391_702, 9_815), "qnli": (103_743, 5_463), "rte": (2_490, 139),
}  # fmt: skip
# What the paper calls F1 is micro-averaged for MRPC and macro-averaged for QQP, so it stands under those names.
PAPER_SCORES = ("cola matthews", "sst2 accuracy", "mrpc accuracy", "mrpc f1_micro", "qqp accuracy", "qqp f1_macro",
                "stsb pearson", "stsb spearman", "mnli accuracy", "qnli accuracy", "rte accuracy")  # fmt: skip
PAPER = (  # label, trained % a task, average, scores
    ("single-task full fine-tuning", 100.0, 84.67, ()),
    ("single-task LoRA", 0.4, 84.40, ()),
    ("multi-task full fine-tuning", 12.5, 85.47, ()),
    ("HyperFormer++", 0.290, 86.48, ()),
    ("UnoLoRA", 0.049, 84.40, (50.79, 94.61, 85.78, 85.78, 89.99, 89.32, 88.63, 88.44, 84.71, 92.68, 77.70)),
    ("UnoLoRA*", 0.050, 84.95, (56.11, 93.92, 86.76, 86.76, 89.88, 89.21, 88.52, 88.69, 85.24, 93.14, 76.26)),
)
"""Table 1."""


def unlike_the_paper(run: Mapping[str, Any], split: str) -> list[str]:
    """Say how a run's protocol differs from that of the paper's Table 1; nothing if it does not."""
    wrong = []
    if Path(run["backbone"]).name.lower() != "t5-base":
        wrong.append(f"backbone {run['backbone']}, not T5-base")
    if run["tasks"].keys() != PAPER_ROWS.keys():
        wrong.append("other tasks than GLUE's eight")
    elif parts := [name for name in PAPER_ROWS if not _all_rows(name, run["tasks"][name]["rows"])]:
        wrong.append(f"not all rows of {', '.join(parts)}")
    if run["steps"] != PAPER_STEPS:
        wrong.append(f"{run['steps']:,} steps, not {PAPER_STEPS:,}")
    if run["batch_size"] != PAPER_BATCH:
        wrong.append(f"batches of {run['batch_size']}, not {PAPER_BATCH}")
    if split != "test":
        wrong.append(f"the {split} split, not the test split")
    return wrong


def _all_rows(task: str, rows: Mapping[str, int]) -> bool:
    """Whether a task has all its rows, but for the few of training that repeat a held-out row and are dropped."""
    train, test = PAPER_ROWS[task]
    return 0.99 * train <= rows["train"] <= train and abs(rows["test"] - test) <= 1


def _paper_rows(average: str) -> list[dict[str, Any]]:
    return [
        {
            "label": f"{label} (paper)",
            "scores": dict(zip(PAPER_SCORES, (Interval(round(s / 100, 6)) for s in scores), strict=False)),
            "average": Interval(round(mean / 100, 6)) if average == PAPER_AVERAGE else None,
            "per_task_percent": percent,
            "steps": PAPER_STEPS,
        }
        for label, percent, mean, scores in PAPER
    ]


# ---------------------------------------------------------------- read


def read(folders: Iterable[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """Read runs.

    Args:
        folders: Run folders, whose baselines are runs too, or folders of run folders.

    Returns:
        The runs, each once, and a line for each unfinished run that was left out.

    Raises:
        InputError: A folder is no run or not finished, or its results are of another version.
    """
    found: dict[Path, dict[str, Any]] = {}
    notes: list[str] = []
    for folder in folders:
        inside = _finished(folder) or _runs_inside(folder, notes)
        for path in inside:
            found.setdefault(path.resolve(), _read_run(path))
    return list(found.values()), notes


def _finished(folder: Path) -> list[Path]:
    """Return a finished run and its finished baselines."""
    if not (folder / "results.json").is_file():
        return []
    return [folder, *(path.parent for path in sorted(folder.glob("baselines/*/results.json")))]


def _runs_inside(folder: Path, notes: list[str]) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give folders that `unolora train` wrote")
    if (folder / "config.yaml").is_file():
        raise InputError(f"{folder}: no results.json, the run is not finished; {run_folders.how_to_go_on(folder)}")
    found = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        found += _finished(path)
        if (path / "config.yaml").is_file() and not (path / "results.json").is_file():
            notes.append(f"{path} is left out, it is not finished; {run_folders.how_to_go_on(path)}.")
    if not found:
        raise InputError(f"{folder}: no finished run, and none in its folders; give folders that `unolora train` wrote")
    return found


def _read_run(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    try:
        return _run(json.loads(path.read_text(encoding="utf-8")), folder)
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        wrong = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{path}: expected what this version of `unolora train` writes, got {wrong}; train the run again"
        ) from error


def _run(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Take what is compared out of results.json."""
    splits = SPLITS if scored_on(document["averages"]) == "test" else ("validation",)
    tasks = {
        str(task["name"]): {
            "score_metric": str(task["score_metric"]),
            "rows": {split: int(task["rows"][split]) for split in ("train", "validation", "test")},
            "metrics": {split: {k: _number(v) for k, v in task["metrics"][split].items()} for split in splits},
        }
        for task in document["tasks"]
    }
    if not tasks:
        raise ValueError("no tasks")
    return {
        "folder": folder,
        "method": str(document["method"]),
        "label": str(document["label"]),
        "seed": int(document["seed"]),
        "backbone": str(document["backbone"]),
        "steps": int(document["steps"]),
        "batch_size": int(document["batch_size"]),
        "tasks": tasks,
        "averages": {k: {s: _number(v[s]) for s in splits} for k, v in document["averages"].items()},
        "trained_percent": _number(document["parameters"]["trainable_percent"]),
        "per_task_percent": _number(document["parameters"]["per_task_percent"]),
        "file_bytes": _number(document["parameters"]["file_bytes"]),
        "train_seconds": _number(document["time"]["train_seconds"]),
        "settings": method_settings(folder, str(document["method"])),
    }


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} in the place of a number")
    return float(value)


def method_settings(folder: Path, method: str) -> dict[str, Any] | None:
    """Return what a method was trained with; that of a baseline stands in the run around it."""
    for path in (folder, folder.parent.parent if folder.parent.name == "baselines" else folder):
        if (path / "config.yaml").is_file():
            try:
                found = run_folders.read_settings(path)
            except InputError as error:
                raise InputError(f"{path / 'config.yaml'}: {error}") from error
            return {name: value for name, value in flat(found).items() if name not in NOT_OF_THE_METHOD} | {
                "method": method
            }
    return None


# ---------------------------------------------------------------- rows


def rows(
    runs: Sequence[Mapping[str, Any]],
    *,
    split: str = "test",
    average: str = "mean_of_first_metrics",
    against: str | None = None,
) -> list[dict[str, Any]]:
    """Average the runs of each method over its seeds, and take the differences to one of them.

    Args:
        runs: What `read` returned.
        split: Which scores.
        average: Which average.
        against: Label of the row that the others are compared to; by default the first.

    Returns:
        A row for each method in the order of the runs: intervals of its scores and its average, of the difference of
        the averages paired by seed (None without a common seed, or when the tasks differ), and what it costs.

    Raises:
        InputError: Two runs are the same, an average is missing, or no row is called `against`.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        numbers = {k: float(v) if type(v) is int else v for k, v in (run["settings"] or {}).items()}  # 16 is 16.0
        key = json.dumps([run["label"], numbers, protocol(run)], sort_keys=True)
        groups.setdefault(key, []).append(run)
    found = [_row(group, split, average) for group in groups.values()]
    for row, label in zip(found, _labels(found), strict=True):
        row["label"] = label
    labels = [row["label"] for row in found]
    if against is not None and against not in labels:
        raise unknown("row", against, labels)
    reference = found[labels.index(against) if against is not None else 0]
    for row in found:
        common = [seed for seed in row["by_seed"] if seed in reference["by_seed"]]
        same = row is not reference and row["scores"].keys() == reference["scores"].keys()
        row["pairs"] = common if same else []
        row["difference"] = interval([row["by_seed"][s] - reference["by_seed"][s] for s in row["pairs"]])
        row["reference"] = reference["label"]
    return found


def _row(group: Sequence[Mapping[str, Any]], split: str, average: str) -> dict[str, Any]:
    by_seed: dict[int, Mapping[str, Any]] = {}
    for run in group:
        if run["seed"] in by_seed:
            other = by_seed[run["seed"]]["folder"]
            raise InputError(f"{run['folder']} and {other} are the same method, settings and seed; leave one out")
        by_seed[run["seed"]] = run
        if average not in run["averages"]:
            raise InputError(
                f"{run['folder']}: its results have no {average}, only {', '.join(run['averages']) or 'none'}; choose "
                "another --average, or train the run again"
            )
        if split not in run["averages"][average]:
            raise InputError(
                f"{run['folder']}: no scores on the {split} split, which `training.test: false` left alone; compare on "
                "the validation split"
            )
    seeds = sorted(by_seed)
    ordered, first = [by_seed[seed] for seed in seeds], by_seed[seeds[0]]
    return {
        "label": first["label"],
        "first": first,
        "folders": [run["folder"] for run in ordered],
        "seeds": seeds,
        "by_seed": {seed: by_seed[seed]["averages"][average][split] for seed in seeds},
        "scores": {
            f"{name} {metric}": interval([run["tasks"][name]["metrics"][split][metric] for run in ordered])
            for name, task in first["tasks"].items()
            for metric in task["metrics"][split]
        },
        "average": interval([run["averages"][average][split] for run in ordered]),
        "steps": first["steps"],
        **{
            name: math.fsum(run[name] for run in ordered) / len(ordered)
            for name in ("trained_percent", "per_task_percent", "file_bytes", "train_seconds")
        },
    }


def _labels(found: Sequence[Mapping[str, Any]]) -> list[str]:
    return told_apart([row["label"] for row in found], [row["first"]["settings"] for row in found])


def told_apart(labels: Sequence[str], settings: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Return each label, with the settings that tell it from others of the same label.

    Args:
        labels: Of methods.
        settings: What each was trained with (`method_settings`), None where it is not known.
    """
    known = [each or {} for each in settings]
    found = []
    for label, own in zip(labels, known, strict=True):
        alike = [each for other, each in zip(labels, known, strict=True) if other == label]
        odd = [name for name in own if name not in IN_PROTOCOL and any(s.get(name) != own[name] for s in alike)]
        values = {name: "default" if own[name] is None else own[name] for name in odd}
        found.append(", ".join([label, *(f"{name.rpartition('.')[2]}={value}" for name, value in values.items())]))
    return found


def interval(values: Sequence[float]) -> Interval | None:
    """Return the mean and the half width of its 95 % interval after Student; None of nothing."""
    from scipy.stats import t

    if not values:
        return None
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Interval(mean)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return Interval(mean, float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n))


def protocol(run: Mapping[str, Any]) -> dict[str, str]:
    """Return what must be the same for scores to be comparable."""
    found = {"backbone": run["backbone"], "steps": str(run["steps"]), "batch size": str(run["batch_size"])}
    for name, task in sorted(run["tasks"].items()):
        rows = "/".join(str(task["rows"][split]) for split in ("train", "validation", "test"))
        found[f"task {name}"] = f"{' and '.join(task['metrics']['validation'])} on {rows} rows"
    return found


def differences(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names in which the protocols of runs differ."""
    protocols = [protocol(run) for run in runs]
    names = dict.fromkeys(name for found in protocols for name in found)
    return [name for name in names if len({found.get(name) for found in protocols}) > 1]


def check_protocol(runs: Sequence[Mapping[str, Any]]) -> None:
    """Refuse runs whose scores are not comparable.

    Raises:
        InputError: Naming the first difference.
    """
    first = protocol(runs[0])
    for run in runs[1:]:
        for name in differences([runs[0], run]):
            ours, theirs = first.get(name, "none"), protocol(run).get(name, "none")
            raise InputError(
                f"{run['folder']} and {runs[0]['folder']} differ in {name}: {theirs} instead of {ours}; compare runs "
                "of one protocol, or give --loose"
            )


# ---------------------------------------------------------------- columns


def columns(
    found: Sequence[Mapping[str, Any]], *, average: str = "mean_of_first_metrics", metrics: str = "all"
) -> list[Column]:
    """Arrange rows as columns.

    Args:
        found: What `rows` returned, and rows of the paper.
        average: The name of their average.
        metrics: "all", or "first" for the metric alone that is a task's score.
    """
    ours = [row for row in found if "first" in row]
    wanted = {
        f"{name} {metric}": None
        for row in ours
        for name, task in row["first"]["tasks"].items()
        for metric in (task["metrics"]["validation"] if metrics == "all" else [task["score_metric"]])
    }
    odd = differences([row["first"] for row in ours])

    def column(title: str, show: str, name: str) -> Column:
        return Column(title, show, [row.get(name) for row in found])

    table = [column("method", "text", "label")]
    table += [Column(title, "score", [row["scores"].get(title) for row in found]) for title in wanted]
    table.append(column(average.replace("_", " "), "fine", "average"))
    if len(ours) > 1:
        table.append(column(f"difference to {ours[0]['reference']}", "gain", "difference"))
    table += [
        column("trained %, with heads", "percent", "trained_percent"),
        column("trained % a task, without heads", "percent", "per_task_percent"),
        column("adapter file", "bytes", "file_bytes"),
        column("steps", "count", "steps"),
        column("training time", "duration", "train_seconds"),
        Column("seeds", "text", [", ".join(map(str, row["seeds"])) if "seeds" in row else None for row in found]),
    ]
    if odd:
        table.append(Column("differs in", "text", [_odd(row, odd) for row in found]))
    return table


def _odd(row: Mapping[str, Any], odd: Sequence[str]) -> str | None:
    if "first" not in row:
        return None
    own = protocol(row["first"])
    return "; ".join(f"{name} {own.get(name, 'none')}" for name in odd)


def notes(found: Sequence[Mapping[str, Any]], split: str, average: str) -> list[str]:
    """Say what the numbers of a table are, and what it does not show."""
    several = any(len(row["seeds"]) > 1 for row in found)
    how = "means over seeds ± half of the 95 % interval (Student's t)" if several else "one seed each, so no intervals"
    lines = [f"Scores on the {split} split, {how}" + "; differences are paired by seed." * (len(found) > 1)]
    lines[0] = lines[0].rstrip(".") + "."
    for row in found:
        if row["label"] != row["reference"] and len(row["pairs"]) < len(row["seeds"]):
            pairs = ", ".join(map(str, row["pairs"])) or "none"
            lines.append(f"{row['label']}: seeds paired with those of {row['reference']}: {pairs}.")
    wrong = list(dict.fromkeys(why for row in found for why in unlike_the_paper(row["first"], split)))
    if wrong:
        lines.append(f"The paper's Table 1 is not shown beside these, its protocol is another: {'; '.join(wrong)}.")
    else:
        lines.append("The paper's F1 is micro-averaged for MRPC, macro-averaged for QQP; its average holds both.")
    if not wrong and average != PAPER_AVERAGE:
        lines.append(f"The paper's average is the mean of metrics: --average {PAPER_AVERAGE}.")
    return lines


# ---------------------------------------------------------------- text


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.1f} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


SHOW: dict[str, Callable[[Any], str]] = {
    "text": str,
    "score": lambda value: f"{value:.3f}",
    "fine": lambda value: f"{value:.4f}",
    "gain": lambda value: f"{value:+.4f}",
    "percent": lambda value: f"{value:#.3g}".rstrip("."),
    "count": lambda value: f"{value:,}",
    "bytes": charts.SHOW["bytes"],
    "duration": _duration,
}


def _cell(value: Any, show: str) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, Interval):
        half = "" if value.half is None else f" ± {SHOW[show](value.half).lstrip('+')}"
        return SHOW[show](value.mean) + half
    return SHOW[show](value)


def _grid(table: Sequence[Column]) -> list[list[str]]:
    """Return the cells as text, row by row, titles first."""
    shown = [[column.title, *(_cell(value, column.show) for value in column.values)] for column in table]
    return [list(row) for row in zip(*shown, strict=True)]


def as_text(table: Sequence[Column], lines: Sequence[str]) -> str:
    """Align columns for a terminal; methods stand across, since there are more columns than methods."""
    across = list(zip(*_grid(table), strict=True))
    widths = [max(map(len, column)) for column in zip(*across, strict=True)]
    body = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in across
    ]
    return "\n".join([*body, "", *lines]) + "\n"


def as_markdown(table: Sequence[Column], lines: Sequence[str]) -> str:
    """Write a Markdown table, numbers to the right, and the notes below."""
    head, *body = [[cell.replace("|", "\\|").replace("*", "\\*") for cell in row] for row in _grid(table)]
    rule = ["---" if column.show == "text" else "---:" for column in table]
    shown = ["| " + " | ".join(row) + " |" for row in (head, rule, *body)]
    return "\n".join([*shown, *(f"\n{line}" for line in lines)]) + "\n"


LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", NOTHING: "--"}
)


def as_latex(table: Sequence[Column], lines: Sequence[str]) -> str:
    """Write a tabular for the package booktabs, the notes as comments above."""
    head, *body = [[cell.translate(LATEX) for cell in row] for row in _grid(table)]
    for row in body:
        for place, column in enumerate(table):
            if column.show != "text" and row[place].startswith("-") and row[place] != "--":
                row[place] = f"$-${row[place][1:]}"
    form = "".join("l" if column.show == "text" else "r" for column in table)
    shown = [" & ".join(row) + r" \\" for row in (head, *body)]
    comments = [f"% {line}" for line in lines]
    begin, end = rf"\begin{{tabular}}{{{form}}}", r"\end{tabular}"
    return "\n".join([*comments, begin, r"\toprule", shown[0], r"\midrule", *shown[1:], r"\bottomrule", end]) + "\n"


UNITS = {"bytes": " [bytes]", "duration": " [s]"}


def as_csv(table: Sequence[Column], lines: Sequence[str]) -> str:
    """Write numbers as they are, half widths in columns of their own; it has no place for notes."""
    wide: list[list[Any]] = []
    for column in table:
        pairs = [value if isinstance(value, Interval) else Interval(value) for value in column.values]
        wide.append([column.title + UNITS.get(column.show, ""), *(pair.mean for pair in pairs)])
        if column.show in ("score", "fine", "gain"):
            wide.append([f"{column.title} ±", *(pair.half for pair in pairs)])
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(zip(*wide, strict=True))
    return file.getvalue()


FORMATS = {"table": as_text, "markdown": as_markdown, "latex": as_latex, "csv": as_csv}


def compare(
    folders: Iterable[Path],
    *,
    split: str = "test",
    average: str = "mean_of_first_metrics",
    metrics: str = "all",
    against: str | None = None,
    loose: bool = False,
) -> tuple[list[Column], list[str]]:
    """Read runs and arrange them; see `rows` and `columns` for what is in it.

    Args:
        folders: Run folders, or folders of run folders.
        split: "test" or "validation".
        average: One of AVERAGES.
        metrics: "all" or "first".
        against: Label of the row that the others are compared to; by default the first.
        loose: Whether to show runs of different protocols beside each other.

    Returns:
        The table, and the notes that go with it: what one of FORMATS writes.

    Raises:
        InputError: A folder is no finished run, or the runs can't be compared.
    """
    runs, left_out = read(folders)
    if not loose:
        check_protocol(runs)
    found = rows(runs, split=split, average=average, against=against)
    lines = notes(found, split, average) + left_out
    like_the_paper = not any(unlike_the_paper(row["first"], split) for row in found)
    return columns(found + (_paper_rows(average) if like_the_paper else []), average=average, metrics=metrics), lines
