"""The command line: each command is a function of one dict, and imports what it needs when it runs.

`unolora --help` imports nothing heavy. An `InputError` is printed as one line and ends with exit code 2.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unolora.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console


def train(arguments: Sequence[str]) -> int:
    """Train a method on tasks, from a YAML file and flags; write a run folder."""
    settings, root, resume = _train_settings(arguments)
    console, errors = _consoles()
    from unolora.progress import Bar
    from unolora.training import Interrupted
    from unolora.training import train as run

    _quiet_libraries()
    try:
        folder = run(settings, root=root, resume=resume, progress=lambda label, trainer: Bar(label, trainer, console))
    except Interrupted as stop:
        errors.print(str(stop), highlight=False)
        return 130
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    baselines = sorted((folder / "baselines").glob("*/results.json"))
    console.print(_score_table(results, [json.loads(p.read_text(encoding="utf-8")) for p in baselines]))
    console.print(f"report   {folder / 'report.html'}\nadapter  {folder / 'adapter'}", highlight=False)
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Score a run on its test (or validation) splits."""
    parser = _parser("evaluate", evaluate)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test", help="default: test")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    _quiet_libraries()
    from unolora import scoring
    from unolora.data import Collator, encode
    from unolora.metrics import average
    from unolora.runs import load_run
    from unolora.training import load_data

    run = load_run(options.run)
    data = load_data(run.settings)
    length = run.settings.data.max_length
    splits = {row: encode(d.splits[options.split], run.tokenizer, length) for row, d in enumerate(data)}
    scores = scoring.evaluate(run.model, run.tasks, splits, Collator(run.tokenizer))
    if options.json:
        _write(json.dumps({"split": options.split, "scores": scores, "mean_of_first_metrics": average(scores)}))
        return 0
    from rich.table import Table

    table = Table(title=f"{options.run} on {options.split}")
    for column in ("task", "rows", "metrics"):
        table.add_column(column)
    for row, task in enumerate(run.tasks):
        found = "  ".join(f"{name} {value:.4f}" for name, value in scores[task.name].items())
        table.add_row(task.name, str(len(splits[row])), found)
    table.add_row("mean of first metrics", "", f"{average(scores):.4f}", style="bold")
    _consoles()[0].print(table)
    return 0


def predict(arguments: Sequence[str]) -> int:
    """Predict texts with one task of a run; JSON lines out."""
    parser = _parser("predict", predict)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--task", required=True, help="name of the task")
    parser.add_argument("--file", type=Path, help="texts, one a line; a line with a tab is a pair")
    parser.add_argument("--batch-size", type=int, default=64, help="rows of a forward (default: 64)")
    parser.add_argument("text", nargs="*", help="texts; without any, lines are read from --file or standard input")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {options.batch_size}")
    texts = options.text or list(_lines(options.file))
    _quiet_libraries()
    from unolora.runs import load_run
    from unolora.scoring import predict_texts

    run = load_run(options.run)
    for answer in predict_texts(run, options.task, texts, batch_size=options.batch_size):
        _write(json.dumps(answer, ensure_ascii=False))
    return 0


def tasks(arguments: Sequence[str]) -> int:
    """List the built-in tasks, or a run's."""
    parser = _parser("tasks", tasks)
    parser.add_argument("run", type=Path, nargs="?", help="run folder")
    options = parser.parse_args(arguments)
    from rich.table import Table

    from unolora.tasks import TASKS

    found = list(TASKS.values())
    if options.run is not None:
        from unolora.runs import read_tasks

        found = read_tasks(options.run / "adapter" / "tasks.json")
    table = Table(title=f"tasks of {options.run}" if options.run else "built-in tasks")
    for column in ("task", "kind", "answers", "metrics", "what it is"):
        table.add_column(column)
    for task in found:
        table.add_row(
            task.name, task.kind, ", ".join(task.labels) or "a number", ", ".join(task.metrics), task.description
        )
    _consoles()[0].print(table)
    return 0


def report(arguments: Sequence[str]) -> int:
    """Write a run's report.html again."""
    parser = _parser("report", report)
    parser.add_argument("run", type=Path, help="run folder")
    options = parser.parse_args(arguments)
    from unolora.report import write_report

    _write(str(write_report(options.run)))
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """Say what is installed, what the machine can do, and what is missing."""
    parser = _parser("doctor", doctor)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    from unolora.doctor import examine

    found = examine()
    if options.json:
        _write(json.dumps(found))
        return 0
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in found.items():
        table.add_row(name, str(value))
    _consoles()[0].print(table)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "doctor": doctor,
    "evaluate": evaluate,
    "predict": predict,
    "report": report,
    "tasks": tasks,
    "train": train,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for input that can't be used, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    parser = argparse.ArgumentParser(
        prog="unolora",
        description="One low-rank adapter for many tasks.",
        epilog="commands:\n" + "\n".join(f"  {name:<10}{_summary(f)}" for name, f in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("command", nargs="?", help="one of those below; `unolora COMMAND --help` tells more")
    options = parser.parse_args(arguments[:1])
    if options.version:
        from importlib.metadata import version

        _write(version("unolora"))
        return 0
    if options.command is None:
        parser.print_help()
        return 0
    try:
        if options.command not in COMMANDS:
            near = did_you_mean(options.command, COMMANDS)
            raise InputError(f"unknown command {options.command!r}{near} (known: {', '.join(COMMANDS)})")
        return COMMANDS[options.command](arguments[1:])
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _train_settings(arguments: Sequence[str]) -> tuple[Any, Path | None, bool]:
    """Read the YAML file and the flags of `unolora train`: (settings, the file's folder, whether to resume)."""
    from jsonargparse import ArgumentParser

    from unolora import runs
    from unolora import settings as run_settings

    parser = ArgumentParser(prog="unolora train", description=_summary(train), exit_on_error=False)
    parser.add_argument("config", nargs="?", help="YAML file with the settings below; flags go before it in rank")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder; no other settings are taken")
    parser.add_argument("--name", help="name of the run; it is written to runs/NAME")
    parser.add_class_arguments(run_settings.Settings, instantiate=False)
    flags, positional = [], []
    rest = iter(arguments)
    for argument in rest:
        flags.append(argument) if argument.startswith("-") else positional.append(argument)
        if argument.startswith("-") and "=" not in argument and argument not in ("-h", "--help"):
            value = next(rest, None)
            if value is None:
                raise InputError(f"{argument} needs a value")
            flags.append(value)
    del positional, flags
    raise NotImplementedError
