"""The commands of the `unolora` program, each a function of its arguments that returns the exit code."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from unolora import tables
from unolora.arguments import Parser, read_lines, run_parser, train_settings
from unolora.errors import InputError

if TYPE_CHECKING:
    from unolora.export import Exported
    from unolora.progress import Bar
    from unolora.trainer import MultiTaskTrainer

RUN_FILES = ("results.json", "config.yaml", "metrics.jsonl")
"""One of them makes a folder a run."""


def train(arguments: Sequence[str]) -> int:
    """Train a method, with a bar for each; print the scores and where the report is."""
    settings, root, resume = train_settings(list(arguments))
    _quiet_libraries()
    from unolora import processes, runs, training

    console = _console()
    try:
        processes.start()
        with _bars(console) as progress:
            shown = progress if processes.rank() == 0 else None
            folder = training.train(settings, root=root, resume=resume, progress=shown)
    except training.Interrupted as stop:
        sys.stderr.write(f"{stop}\n")
        return 130
    except processes.ProcessLostError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        begun = Path(settings.output or "", "config.yaml").is_file()
        way = f"; {runs.how_to_go_on(Path(settings.output or ''))}" if begun else ""
        sys.stderr.write(f"interrupted{way}\n")
        return 130
    if processes.rank() != 0:
        return 0
    results = [folder / "results.json", *sorted((folder / "baselines").glob("*/results.json"))]
    console.print(tables.scores([json.loads(path.read_text(encoding="utf-8")) for path in results]))
    _write(f"report   {folder / 'report.html'}")
    _write(f"adapter  {folder / 'adapter'}")
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Score a run on a split of its own data."""
    parser = run_parser("evaluate")
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
    parser = run_parser("predict")
    parser.add_argument("--task", required=True, help="name of the task, or auto: the one that the inputs look like")
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
    by_itself = options.task == "auto" and "auto" not in [task.name for task in run.tasks]
    task = run.tasks[0 if by_itself else run.row(options.task)]
    table = options.file is not None and options.file.suffix.lower() in (".jsonl", ".csv", ".tsv", ".parquet")
    if table and by_itself:
        raise InputError("--task auto takes texts, not a table, whose columns a task's template must name")
    if table:
        from unolora.tasks.files import read_file
        from unolora.tasks.rows import fill

        inputs = fill(task, read_file(options.file))
    else:
        lines = options.text or read_lines(options.file)
        pairs = any("\t" in line for line in lines) if by_itself else len(task.template) == 2
        inputs = [tuple(line.split("\t")) if pairs else (line,) for line in lines]
    if not inputs:
        raise InputError(f"nothing to predict: {options.file or 'standard input'} is empty; give one input a line")
    if by_itself:
        from unolora.auto import Picker

        options.task = Picker(run).pick(inputs)
    for answer in scoring.predict_texts(run, options.task, inputs, batch_size=options.batch_size):
        _write(json.dumps(answer, ensure_ascii=False))
    return 0


def tasks(arguments: Sequence[str]) -> int:
    """List tasks."""
    parser = Parser("tasks")
    parser.add_argument("run", type=Path, nargs="?", help="run folder; the built-in tasks without one")
    options = parser.parse_args(arguments)
    from unolora.runs import read_since, read_tasks
    from unolora.tasks import TASKS

    found = read_tasks(options.run / "adapter" / "tasks.json") if options.run else list(TASKS.values())
    came = read_since(options.run) if options.run else {}
    title = f"tasks of {options.run}" if options.run else "built-in tasks"
    table = Table("task", "kind", "answers", "metrics", "what it is", title=title, show_lines=True)
    if came:
        table.add_column("since")
    for task in found:
        answers = ", ".join(task.labels) or ("a number" if task.kind == "regression" else "as found")
        row = [task.name, task.kind, answers, ", ".join(task.metrics), task.description]
        table.add_row(*row, *([came[task.name][:10]] if came else []))
    _console().print(table)
    return 0


def add_task(arguments: Sequence[str]) -> int:
    """Teach a run one more task; print its scores."""
    parser = run_parser("add-task")
    parser.add_argument("--task", required=True, help="YAML file that spells one task, or the name of a built-in one")
    parser.add_argument("--output", type=Path, required=True, help="run folder to write")
    parser.add_argument("--start", help="nearest (old task), mean or scratch; default: nearest")
    parser.add_argument(
        "--tune",
        default="row",
        help="row (old tasks stay as they are), hypernetwork or all, with replay of the old tasks' rows; default: row",
    )
    parser.add_argument("--examples", type=int, help="learn from this many training rows; default: all")
    parser.add_argument(
        "--steps", type=int, help="default: those of the run; 0 where conditioning text leaves nothing to learn"
    )
    parser.add_argument("--learning-rate", type=float, help="default: that of the run")
    options = parser.parse_args(arguments)
    _quiet_libraries()
    from unolora import grow

    console = _console()
    task, root = grow.read_task(options.task)
    with _bars(console) as progress:
        folder = grow.add_task(
            options.run,
            task,
            options.output,
            root=root,
            start=options.start,
            tune=options.tune,
            examples=options.examples,
            steps=options.steps,
            learning_rate=options.learning_rate,
            progress=progress,
        )
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    console.print(tables.scores([results]))
    added = results["changes"][-1]
    if "old_tasks" in added:
        console.print(tables.moved(added["old_tasks"]))
    if added["start"]:
        _write(f"start    {added['start']}")
    _write(f"run      {folder}")
    return 0


def remove_task(arguments: Sequence[str]) -> int:
    """Copy a run without one of its tasks."""
    parser = run_parser("remove-task")
    parser.add_argument("--task", required=True, help="name of the task")
    parser.add_argument("--output", type=Path, required=True, help="run folder to write")
    options = parser.parse_args(arguments)
    _quiet_libraries()
    from unolora import grow

    _write(f"run      {grow.remove_task(options.run, options.task, options.output)}")
    return 0


def rename_task(arguments: Sequence[str]) -> int:
    """Copy a run with another name for one of its tasks."""
    parser = run_parser("rename-task")
    parser.add_argument("--task", required=True, help="name of the task")
    parser.add_argument("--to", required=True, metavar="NAME", help="its new name")
    parser.add_argument("--output", type=Path, required=True, help="run folder to write")
    options = parser.parse_args(arguments)
    _quiet_libraries()
    from unolora import grow

    _write(f"run      {grow.rename_task(options.run, options.task, options.to, options.output)}")
    return 0


def import_(arguments: Sequence[str]) -> int:
    """Make one adapter of several plain LoRAs; say how much of each is kept."""
    parser = Parser("import")
    parser.add_argument("lora", type=Path, nargs="+", help="folder of a plain PEFT LoRA; one a task, two or more")
    parser.add_argument("--output", type=Path, required=True, help="adapter folder to write")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="names of the tasks; default: those of the folders")
    parser.add_argument("--r", type=int, help="rank of the shared pair; default: the largest of theirs")
    parser.add_argument("--backbone", help="default: the one that the LoRAs name")
    options = parser.parse_args(arguments)
    _quiet_libraries()
    from unolora.importing import import_folder

    kept = import_folder(options.lora, options.output, options.tasks, options.r, options.backbone)
    for folder, (task, share) in zip(options.lora, kept.items(), strict=True):
        _write(f"{task}  {folder}  {100 * share:.1f} % kept")
    _write(f"adapter  {options.output}")
    return 0


def export(arguments: Sequence[str]) -> int:
    """Write tasks of a run for those who don't have `unolora`; say what that costs."""
    parser = run_parser("export")
    parser.add_argument("--task", help="name of the task")
    parser.add_argument("--all", action="store_true", help="every task as a plain LoRA, in one folder")
    parser.add_argument("--format", default="peft-lora", help="peft-lora, merged (into the backbone) or onnx")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="table over whose rows a scale that depends on the sample is averaged; default: the validation rows",
    )
    parser.add_argument("--distill", action="store_true", help="train that average on the model's own answers")
    options = parser.parse_args(arguments)
    if (options.task is None) != options.all:
        raise InputError("give --task NAME or --all")
    if options.all and (options.format != "peft-lora" or options.calibration):
        raise InputError(
            "--all writes plain LoRAs, averaged over validation rows; leave out --format and --calibration"
        )
    _quiet_libraries()
    from unolora import export as exporting
    from unolora import runs

    run = runs.load_run(options.run)
    if options.all:
        done = exporting.export_all(run, options.output, options.distill)
    else:
        done = [
            exporting.export(run, options.task, options.output, options.format, options.calibration, options.distill)
        ]
    for each in done:
        _write(f"{each.task}  {each.folder}  {_cost(each)}")
    return 0


def _cost(done: Exported) -> str:
    if done.scores is None:
        return "exact"
    metric, before = next(iter(done.scores["model"].items()))
    after = done.scores["exported"][metric]
    how = "distilled" if done.distilled else "mean"
    return (
        f"{how} scale over {done.calibrated_on} rows; validation {metric} {before:.4f} -> {after:.4f}, "
        f"lost {before - after:z.4f}"
    )


def push(arguments: Sequence[str]) -> int:
    """Upload a run to the hub."""
    parser = run_parser("push")
    parser.add_argument("--to", required=True, metavar="OWNER/NAME", help="repository; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    options = parser.parse_args(arguments)
    from unolora.hub import push_to_hub

    _write(push_to_hub(options.run, options.to, private=options.private))
    return 0


def report(arguments: Sequence[str]) -> int:
    """Write a run's report.html again, or a page that compares several runs."""
    parser = Parser("report")
    parser.add_argument("run", type=Path, nargs="+", help="run folder; of several, or a folder of such, a comparison")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="of a comparison; default: comparison.html beside the first run"
    )
    parser.add_argument("--against", metavar="LABEL", help="the method that a comparison takes differences to")
    options = parser.parse_args(arguments)
    from unolora.report import write_comparison, write_report

    first = options.run[0]
    alone = len(options.run) == 1 and (not first.is_dir() or any((first / name).is_file() for name in RUN_FILES))
    if alone and (options.output or options.against):
        raise InputError("--output and --against are for a comparison: a run's report is the report.html in its folder")
    if alone:
        _write(str(write_report(first)))
    else:
        beside = first if len(options.run) == 1 else first.resolve().parent
        _write(str(write_comparison(options.run, options.output or beside / "comparison.html", options.against)))
    return 0


def compare(arguments: Sequence[str]) -> int:
    """Print a table of finished runs."""
    from unolora import compare as runs_beside

    parser = Parser("compare")
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


def serve(arguments: Sequence[str]) -> int:
    """Serve all tasks of a run over HTTP, or make an API key."""
    from unolora.serving.settings import ServeSettings

    parser = Parser("serve")
    parser.add_argument("run", type=Path, nargs="?", help="run folder")
    ServeSettings.add_flags(parser)
    parser.add_argument(
        "--new-key", metavar="NAME", help="make a key, add its hash to the file of --keys, and print it"
    )
    parser.add_argument("--admin", action="store_true", help="with --new-key: one that may also reload the adapter")
    options = parser.parse_args(arguments)
    if options.new_key is not None:
        if options.keys is None or options.run is not None:
            raise InputError("--new-key goes with --keys FILE and without a run")
        from unolora.serving.auth import new_key

        _write(new_key(Path(options.keys), options.new_key, admin=options.admin))
        return 0
    if options.run is None or options.admin:
        raise InputError("give a run folder, or --keys FILE --new-key NAME [--admin]")
    settings = ServeSettings.from_flags(options)
    _quiet_libraries()
    try:
        from unolora.serving.server import serve as listen
    except ModuleNotFoundError as error:
        raise InputError(f"serving needs {error.name}, which is not installed: pip install 'unolora[serve]'") from error
    listen(options.run, settings, lambda url: _write(f"serving {options.run} on {url} (Ctrl-C stops it)"))
    return 0


def analyze(arguments: Sequence[str]) -> int:
    """Print what runs have learned in common, and write the numbers."""
    parser = Parser("analyze")
    parser.add_argument("run", type=Path, nargs="+", help="run folder, or RUN/baselines/METHOD")
    parser.add_argument("--against", type=Path, nargs="+", default=[], metavar="RUN", help="runs to compare them with")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder to write; default: analysis in the first run"
    )
    parser.add_argument(
        "--rows", type=int, default=32, help="validation rows of each task for the scales, 0 for none; default: 32"
    )
    parser.add_argument(
        "--ablate", action="store_true", help="also score each run without each rank, layer, the sample"
    )
    options = parser.parse_args(arguments)
    if options.rows < 0:
        raise InputError(f"--rows must be at least 0, got {options.rows}")
    _quiet_libraries()
    from unolora import analysis

    found = analysis.analyze(options.run, options.against, rows=options.rows, ablate=options.ablate)
    folder = options.output or options.run[0] / "analysis"
    analysis.write(found, folder)
    console = _console()
    if found.comparisons:
        console.print(tables.overlaps(found.comparisons))
    console.print(tables.summary(found.summary))
    if found.ablations:
        console.print(tables.ablations(found.ablations))
    for note in found.notes:
        _write(note)
    _write(f"numbers  {folder}")
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """Describe the installation and the machine."""
    parser = Parser("doctor")
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
    """Measure, print the ratios, and write benchmarks.md; `bench serve` has flags of its own."""
    if arguments[:1] == ["serve"]:
        _quiet_libraries()
        from unolora.bench.serve import main

        return main(arguments[1:])
    from unolora.bench.run import MEASUREMENTS, ON_GLUE, number, read, run, wanted
    from unolora.bench.timing import ROUNDS

    parser = Parser("bench")
    parser.add_argument("name", nargs="*", help=f"measurements, by default all: {', '.join([*MEASUREMENTS, *ON_GLUE])}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="that a median is taken over; default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("benchmarks.md"), help="default: %(default)s")
    about = f"GLUE as JSON lines, a folder a task, for {', '.join(ON_GLUE)}; default: %(default)s"
    parser.add_argument("--data", type=Path, default=Path("glue"), metavar="FOLDER", help=about)
    parser.add_argument("--figures", type=Path, metavar="HTML", help="draw the measured growth, and nothing else")
    options = parser.parse_args(arguments)
    _quiet_libraries()
    if options.figures is not None:
        from unolora.bench.growth import write_figures

        write_figures(read(options.output), options.figures)
        _write(f"written  {options.figures}")
        return 0
    if not options.name and not options.data.is_dir():
        _write(f"left out  {', '.join(ON_GLUE)}: {options.data}: no such folder")
    for name, lines in run(options.name, options.rounds, options.data, options.output):
        table = Table("what", "measured against", "ratio", "reach", title=name)
        for line in lines:
            table.add_row(line.what, line.against, number(line), wanted(line))
        _console().print(table)
    _write(f"written  {options.output}")
    return 0


def _console() -> Console:
    """A console that prints text as it is: a path or a label may hold what rich takes for markup."""

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # `main` knows what to do

    return Plain(markup=False, emoji=False, highlight=False)


@contextmanager
def _bars(console: Console) -> Iterator[Callable[[str, MultiTaskTrainer], Bar]]:
    """Give a `progress` that draws a bar for each training."""
    from unolora.progress import Bar

    with ExitStack() as bars:

        def progress(label: str, trainer: MultiTaskTrainer) -> Bar:
            bar = Bar(label, trainer, console)
            bars.callback(bar.stop)
            return bar

        yield progress


def _quiet_libraries() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # PEFT still asks transformers by a name that transformers has deprecated.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
