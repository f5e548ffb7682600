"""The commands of the `unolora` program, each a function of its arguments that returns the exit code."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from unolora import settings as run_settings
from unolora.errors import InputError, did_you_mean
from unolora_cli import COMMANDS


def train(arguments: Sequence[str]) -> int:
    """Train a method, with a bar for each; print the scores and where the report is."""
    settings, root, resume = _train_settings(list(arguments))
    _quiet_libraries()
    from unolora import runs, training
    from unolora.progress import Bar

    console, bars = _console(), ExitStack()

    def progress(label: str, trainer: training.MultiTaskTrainer) -> Bar:
        bar = Bar(label, trainer, console)
        bars.callback(bar.stop)
        return bar

    try:
        with bars:
            folder = training.train(settings, root=root, resume=resume, progress=progress)
    except training.Interrupted as stop:
        sys.stderr.write(f"{stop}\n")
        return 130
    except KeyboardInterrupt:
        begun = Path(settings.output or "", "config.yaml").is_file()
        way = f"; {runs.how_to_go_on(Path(settings.output or ''))}" if begun else ""
        sys.stderr.write(f"interrupted{way}\n")
        return 130
    results = [folder / "results.json", *sorted((folder / "baselines").glob("*/results.json"))]
    console.print(_scores([json.loads(path.read_text(encoding="utf-8")) for path in results]))
    _write(f"report   {folder / 'report.html'}")
    _write(f"adapter  {folder / 'adapter'}")
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Score a run on a split of its own data."""
    parser = _parser("evaluate")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test", help="default: test")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    _quiet_libraries()
    from unolora import metrics, runs, scoring

    run = runs.load_run(options.run)
    scores, rows = scoring.evaluate_run(run, options.split)
    averages = metrics.averages(scores)
    if options.json:
        _write(json.dumps({"split": options.split, "scores": scores, **averages}))
        return 0
    table = Table("task", "rows", "metrics", title=f"{options.run}, {options.split} split")
    for name, found in scores.items():
        table.add_row(name, str(rows[name]), "  ".join(f"{metric} {value:.4f}" for metric, value in found.items()))
    table.add_section()
    for name, value in averages.items():
        table.add_row(name.replace("_", " "), "", f"{value:.4f}")
    _console().print(table)
    return 0


def predict(arguments: Sequence[str]) -> int:
    """Predict texts with one task of a run."""
    parser = _parser("predict")
    parser.add_argument("--task", required=True, help="name of the task")
    parser.add_argument(
        "--file",
        type=Path,
        help="a table (.jsonl .csv .tsv .parquet) with the columns of the task's template, or a text file with one "
        "input a line, where a tab separates the two texts of a pair",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="rows of a forward; default: 64")
    parser.add_argument("text", nargs="*", help="inputs; without any they are read from --file or standard input")
    options = parser.parse_intermixed_args(arguments)  # texts come before or after --task
    if options.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {options.batch_size}")
    if options.text and options.file:
        raise InputError("give texts or --file, not both")
    _quiet_libraries()
    from unolora import runs, scoring

    run = runs.load_run(options.run)
    task = run.tasks[run.row(options.task)]
    if options.file is not None and options.file.suffix.lower() in (".jsonl", ".csv", ".tsv", ".parquet"):
        from unolora.tasks.files import read_file
        from unolora.tasks.rows import fill

        inputs = fill(task, read_file(options.file))
    else:
        lines = options.text or _lines(options.file)
        inputs = [tuple(line.split("\t")) if len(task.template) == 2 else (line,) for line in lines]
    if not inputs:
        raise InputError(f"nothing to predict: {options.file or 'standard input'} is empty; give one input a line")
    for answer in scoring.predict_texts(run, options.task, inputs, batch_size=options.batch_size):
        _write(json.dumps(answer, ensure_ascii=False))
    return 0


def tasks(arguments: Sequence[str]) -> int:
    """List tasks."""
    parser = _Parser("tasks")
    parser.add_argument("run", type=Path, nargs="?", help="run folder; the built-in tasks without one")
    options = parser.parse_args(arguments)
    from unolora.runs import read_tasks
    from unolora.tasks import TASKS

    found = read_tasks(options.run / "adapter" / "tasks.json") if options.run else list(TASKS.values())
    title = f"tasks of {options.run}" if options.run else "built-in tasks"
    table = Table("task", "kind", "answers", "metrics", "what it is", title=title, show_lines=True)
    for task in found:
        answers = ", ".join(task.labels) or ("a number" if task.kind == "regression" else "as found")
        table.add_row(task.name, task.kind, answers, ", ".join(task.metrics), task.description)
    _console().print(table)
    return 0


def report(arguments: Sequence[str]) -> int:
    """Write report.html again."""
    options = _parser("report").parse_args(arguments)
    from unolora.report import write_report

    _write(str(write_report(options.run)))
    return 0


def compare(arguments: Sequence[str]) -> int:
    """Print a table of finished runs."""
    from unolora import compare as runs_beside

    parser = _Parser("compare")
    parser.add_argument("run", type=Path, nargs="+", help="run folder (its baselines count too), or a folder of such")
    parser.add_argument("--format", choices=runs_beside.FORMATS, default="table", help="default: table")
    parser.add_argument("--split", choices=runs_beside.SPLITS, default="test", help="default: test")
    parser.add_argument(
        "--average", choices=runs_beside.AVERAGES, default=runs_beside.AVERAGES[0], help="default: %(default)s"
    )
    parser.add_argument("--metrics", choices=("all", "first"), default="all", help="of each task; default: all")
    parser.add_argument("--against", metavar="LABEL", help="the row to take differences to; default: the first")
    parser.add_argument("--loose", action="store_true", help="also runs of other tasks, steps, batch size or backbone")
    options = parser.parse_args(arguments)
    table, notes = runs_beside.compare(
        options.run,
        split=options.split,
        average=options.average,
        metrics=options.metrics,
        against=options.against,
        loose=options.loose,
    )
    _write(runs_beside.FORMATS[options.format](table, notes).removesuffix("\n"))
    if options.format == "csv":  # which has no place for them
        sys.stderr.write("".join(f"{note}\n" for note in notes))
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """Describe the installation and the machine."""
    parser = _Parser("doctor")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    from unolora.doctor import examine

    found = examine()
    if options.json:
        _write(json.dumps(found))
        return 0
    table = Table(show_header=False)
    for name, value in found.items():
        table.add_row(name, value)
    _console().print(table)
    return 0


def bench(arguments: Sequence[str]) -> int:
    """Measure, print the ratios, and write benchmarks.md."""
    from unolora.bench.run import MEASUREMENTS, number, run, wanted
    from unolora.bench.timing import ROUNDS

    parser = _Parser("bench")
    parser.add_argument("name", nargs="*", help=f"measurements, by default all: {', '.join(MEASUREMENTS)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="that a median is taken over; default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("benchmarks.md"), help="default: %(default)s")
    parser.add_argument("--figures", type=Path, metavar="HTML", help="draw how the cost grows, and nothing else")
    options = parser.parse_args(arguments)
    _quiet_libraries()
    if options.figures is not None:
        from unolora.bench.growth import write_figures

        write_figures(options.figures)
        _write(f"written  {options.figures}")
        return 0
    for name, lines in run(options.name, options.rounds, options.output):
        table = Table("what", "measured against", "ratio", "reach", title=name)
        for line in lines:
            table.add_row(line.what, line.against, number(line), wanted(line))
        _console().print(table)
    _write(f"written  {options.output}")
    return 0


def _train_settings(arguments: list[str]) -> tuple[run_settings.Settings, Path | None, bool]:
    """Read the YAML file and the flags of `unolora train`: (settings, the file's folder, whether to resume)."""
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, set_parsing_settings

    from unolora import runs

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="unolora train",
        usage="unolora train CONFIG.yaml [--section.name VALUE ...] | unolora train --resume RUN",
        description=f"{COMMANDS['train']}. Flags win over the file.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="the YAML file; CONFIG.yaml alone does the same")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, with its own settings")
    parser.add_class_arguments(run_settings.Settings)
    if arguments and not arguments[0].startswith("-"):
        arguments[:1] = ["--config", arguments[0]]
    root, name = None, "run"
    for path in _config_files(arguments):
        run_settings.check_keys(runs.read_yaml(path))  # with near misses, which the parser does not have
        root, name = path.parent, path.resolve().parent.name if path.stem == "config" else path.stem
    try:
        found = parser.parse_args(arguments).as_dict()
    except (ArgumentError, TypeError) as error:
        raise InputError(_one_line(error, [action.dest for action in parser._actions])) from error
    resume = found.pop("resume")
    if resume is not None:
        if len(arguments) > 2 or not arguments[0].startswith("--resume"):
            raise InputError("--resume takes the run folder and nothing else: a run goes on with its own settings")
        settings = runs.read_settings(Path(resume))
        settings.output = resume
        return settings, None, True
    found.pop("config")
    settings = run_settings.from_dict(found)
    settings.output = settings.output or str(Path("runs", name))
    return settings, root, False


def _config_files(arguments: Sequence[str]) -> list[Path]:
    after = [value for flag, value in itertools.pairwise(arguments) if flag == "--config"]
    joined = [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]
    return [Path(name) for name in after + joined]


def _one_line(error: Exception, known: Sequence[str]) -> str:
    text = " ".join(str(error).split())
    words = [word.lstrip("-").partition("=")[0].rstrip(":") for word in text.split() if word.startswith("--")]
    return text + (did_you_mean(words[0], known) if words and words[0] not in known else "")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others here."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"unolora {command}", description=COMMANDS[command], allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        raise InputError(f"{_one_line(ValueError(message), known)}; see `{self.prog} --help`")


def _parser(command: str) -> argparse.ArgumentParser:
    parser = _Parser(command)
    parser.add_argument("run", type=Path, help="run folder")
    return parser


def _lines(path: Path | None) -> list[str]:
    try:
        data = sys.stdin.buffer.read() if path is None else path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path or 'standard input'}: not UTF-8 at byte {error.start}") from error
    # Not splitlines(), which also cuts at U+2028 and others; empty lines count, so that answers stay beside inputs.
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []


def _scores(results: Sequence[dict[str, Any]]) -> Table:
    table = Table("test split", "score", "constant", *(found["label"] for found in results))
    for place, task in enumerate(results[0]["tasks"]):
        metric = task["score_metric"]
        values = [task["baseline"]["metrics"], *(found["tasks"][place]["metrics"] for found in results)]
        table.add_row(task["name"], metric, *(f"{value['test'][metric]:.3f}" for value in values))
    table.add_section()
    averages = [f"{found['averages']['mean_of_first_metrics']['test']:.3f}" for found in results]
    table.add_row("mean of first metrics", "", "", *averages)
    return table


def _console() -> Console:
    """A console that prints text as it is: a path or a label may hold what rich takes for markup."""

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # `main` knows what to do

    return Plain(markup=False, emoji=False, highlight=False)


def _quiet_libraries() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # PEFT still asks transformers by a name that transformers has deprecated.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
