"""Train a suite: each of its methods with each of its seeds, some at a time, and gather what they reached.

    python scripts/reproduce.py configs/glue-small.yaml results/glue-small --data-root DIR --jobs 2

A suite is a YAML file: `settings` that all runs share (what `unolora train` takes), `seeds`, and `methods`, each a name
with the settings that are its own. Runs lie in WORK/<method>-seed<seed>/; finished ones are kept, stopped ones go on.
OUT gets their numbers without weights or paths, and table.md.

With a section `tune` each method is first trained with as many learning rates, on one seed, without a look at the test
split; the rate with the best validation average is the one of its runs:

    tune:
      seed: 0
      learning_rates: [1.0e-3, 3.0e-3, 1.0e-2]
      of: {full: [1.0e-4, 3.0e-4, 1.0e-3]}          # a method's own

OUT/tuning.json then holds what each rate reached. A suite whose settings say `training.test: false` is about validation
altogether, and so is its table.

Where WORK is gone, or on another machine, `--restore` goes on from what OUT has: its runs, and its trials in
OUT/trials, count as finished if their settings are the suite's.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from unolora import compare, runs
from unolora.atomic import new_folder, write_json, write_text
from unolora.errors import InputError, unknown
from unolora.settings import Settings, flat, from_dict, merged, to_dict

KEYS = ("settings", "tune", "seeds", "methods")
TUNE_KEYS = ("seed", "learning_rates", "of")
VERSIONS = ("unolora", "torch", "transformers", "peft", "python")
PLACES = ("output", "overwrite", "data.root")
GIVEN_HERE = (*PLACES, "baselines", "training.seed")
AVERAGE = "mean_of_first_metrics"
TRIALS = "trials"  # folder in OUT


@dataclass
class Run:
    """A method with a seed, or with a learning rate to try."""

    method: str
    settings: Settings  # output: its folder in WORK

    @property
    def name(self) -> str:
        """What its folders are called."""
        return self.folder.name

    @property
    def folder(self) -> Path:
        """Where it is trained."""
        return Path(self.settings.output or "")

    @property
    def log(self) -> Path:
        """What it writes to the terminal."""
        return self.folder.with_name(f"{self.name}.log")

    @property
    def diverged(self) -> bool:
        """Whether its training ended without results since losses or gradients were not finite."""
        return (self.folder / "not-finite.json").is_file()

    @property
    def finished(self) -> bool:
        """Whether it has results."""
        return (self.folder / "results.json").is_file()

    @property
    def over(self) -> bool:
        """Whether there is nothing to train: it has results or, of a learning rate to try, diverged: an answer too."""
        return self.finished or (self.diverged and not self.settings.training.test)

    def results(self) -> dict[str, Any]:
        """Read them."""
        return dict(json.loads((self.folder / "results.json").read_text(encoding="utf-8")))

    def validation(self) -> float:
        """Return its average over the validation splits."""
        return float(self.results()["averages"][AVERAGE]["validation"])


# ---------------------------------------------------------------- the suite


@dataclass(frozen=True)
class Suite:
    """What a YAML file asks for.

    Attributes:
        runs: Seed by seed, so that every method has one run before any has two.
        trials: Method -> a run for each learning rate to choose from; empty where nothing is tuned.
    """

    runs: list[Run]
    trials: dict[str, list[Run]]

    def of(self, methods: Sequence[str] | None) -> Suite:
        """Return the part of some methods.

        Raises:
            InputError: There is no such method.
        """
        known = dict.fromkeys(run.method for run in self.runs)
        for name in methods or ():
            if name not in known:
                raise unknown("method of the suite", name, known)
        kept = set(methods or known)
        trials = {name: trials for name, trials in self.trials.items() if name in kept}
        return Suite([run for run in self.runs if run.method in kept], trials)

    @property
    def split(self) -> str:
        """The split that its runs are compared on."""
        return "test" if self.runs[0].settings.training.test else "validation"


def read_suite(path: Path, work: Path, data_root: Path | None = None) -> Suite:
    """Read a suite.

    Raises:
        InputError: It can't be read, or a run's settings make no sense.
    """
    suite = runs.read_yaml(path, "give the YAML file of a suite")
    for key in suite:
        if key not in KEYS:
            raise unknown("key of a suite", key, KEYS)
    shared, tune, seeds, methods = (suite.get(key, {}) for key in KEYS)
    if not isinstance(seeds, list) or not seeds or len(set(map(str, seeds))) < len(seeds):
        raise InputError(f"{path}: `seeds` must be a list of different numbers, got {seeds!r}")
    for name, value in (("settings", shared), ("methods", methods)):
        if not isinstance(value, dict) or not value:
            raise InputError(f"{path}: `{name}` must be a mapping with something in it, got {value!r}")
    root = str((data_root or path.parent).resolve())

    def run(name: Any, folder: str, **training: Any) -> Run:
        if not re.fullmatch(r"[A-Za-z0-9_.+-]+", str(name)):
            raise InputError(f"{path}: method {name!r} names folders: letters, digits and _.+- only")
        try:
            _check_own(shared)
            _check_own(methods[name] or {})
            settings = from_dict(merged(shared, methods[name] or {}))
            settings = replace(
                settings,
                training=replace(settings.training, **training),
                data=replace(settings.data, root=root),
                output=str(work / folder),
            )
        except InputError as error:
            raise InputError(f"{path}: method {name!r}: {error}") from error
        return Run(str(name), settings)

    found = [run(name, f"{name}-seed{seed}", seed=seed) for seed in seeds for name in methods]
    if "tune" not in suite:
        return Suite(found, {})
    seed, grids = _grids(path, tune, methods)
    trials = {
        name: [run(name, f"{name}-rate{rate:g}", seed=seed, learning_rate=rate, test=False) for rate in rates]
        for name, rates in grids.items()
    }
    return Suite(found, trials)


def _grids(path: Path, tune: Any, methods: Mapping[str, Any]) -> tuple[int, dict[str, list[float]]]:
    """Return the seed that rates are tried on, and each method's rates, of which all have the same number.

    Raises:
        InputError: The section makes no sense.
    """
    if not isinstance(tune, dict):
        raise InputError(f"{path}: `tune` must be a mapping of {', '.join(TUNE_KEYS)}, got {tune!r}")
    for key in tune:
        if key not in TUNE_KEYS:
            raise unknown("key of `tune`", key, TUNE_KEYS)
    seed, common, own = tune.get("seed", 0), tune.get("learning_rates"), tune.get("of") or {}
    for name in own:
        if name not in methods:
            raise unknown("method in `tune`", name, methods)
    grids = {str(name): own.get(name, common) for name in methods}
    for name, rates in grids.items():
        if not isinstance(rates, list) or not rates or len(set(map(str, rates))) < len(rates):
            raise InputError(f"{path}: `tune` needs a list of different learning rates for {name!r}, got {rates!r}")
        for rate in rates:
            if isinstance(rate, bool) or not isinstance(rate, int | float):
                raise InputError(f"{path}: a learning rate of {name!r} must be a number, got {rate!r}")
    counts = {name: len(rates) for name, rates in grids.items()}
    if len(set(counts.values())) > 1:
        few, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        raise InputError(
            f"{path}: `tune` tries {counts[most]} learning rates of {most!r} and {counts[few]} of {few!r}; give every "
            "method as many"
        )
    return seed, grids


def _check_own(settings: Any) -> None:
    if not isinstance(settings, dict):
        raise InputError(f"expected a mapping of settings, got {settings!r}")
    for name in GIVEN_HERE:
        section, _, key = name.rpartition(".")
        inside = settings.get(section) if section else settings
        if isinstance(inside, dict) and key in inside:
            raise InputError(f"`{name}` is not a suite's to say: seeds are in `seeds`, places on the command line")


def tuned(suite: Suite) -> list[Run]:
    """Return the runs with the learning rates that were chosen, of the methods whose trials are all over."""
    if not suite.trials:
        return suite.runs
    chosen = {name: choice(trials) for name, trials in suite.trials.items()}
    return [
        replace(run, settings=replace(run.settings, training=replace(run.settings.training, learning_rate=rate)))
        for run in suite.runs
        if (rate := chosen[run.method]) is not None
    ]


def choice(trials: Sequence[Run]) -> float | None:
    """Return the learning rate with the best validation average; None if a trial is not over, or all diverged."""
    if not all(trial.finished or trial.diverged for trial in trials):
        return None
    scores = {trial.settings.training.learning_rate: trial.validation() for trial in trials if trial.finished}
    return max(scores, key=scores.__getitem__) if scores else None


def check_same(all_runs: Sequence[Run]) -> None:
    """Refuse to go on with, or to count, runs of other settings that lie where these go.

    Raises:
        InputError: Naming what differs.
    """
    for run in all_runs:
        if (run.folder / "config.yaml").is_file():
            # A run's own file says what `auto` came to.
            now, there = flat(runs.settled(run.settings)), flat(runs.settled(runs.read_settings(run.folder)))
            odd = sorted(name for name in now if now[name] != there[name] and name not in PLACES)
            if odd:
                raise InputError(
                    f"{run.folder} was trained with other settings ({', '.join(odd)}); delete it, or choose another "
                    "--work"
                )


# ---------------------------------------------------------------- training


@dataclass
class Process:
    """A run in training."""

    run: Run
    popen: subprocess.Popen[bytes]
    signals: int = 0  # that were handed on
    began: float = field(default_factory=time.monotonic)

    @property
    def well(self) -> bool:
        """Whether it ended as it should."""
        return self.run.over and (self.popen.returncode == 0 or not self.run.finished)


def start(run: Run, threads: int, lock: int) -> Process:
    """Start `unolora train`, or go on, away from the terminal's Ctrl-C: `train_all` hands that on."""
    settings = run.folder.with_name(f"{run.name}.yaml")
    _write_settings(settings, to_dict(run.settings))
    begun = (run.folder / "config.yaml").is_file()
    command = [sys.executable, "-m", "unolora", "train", *(["--resume", str(run.folder)] if begun else [str(settings)])]
    with run.log.open("ab") as log:
        popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,
            pass_fds=[lock],  # it holds the lock as well, should this process be killed
        )
    return Process(run, popen)


def train_all(todo: Sequence[Run], known: Sequence[Run], jobs: int, lock: int) -> int:
    """Train runs, `jobs` at a time, with a line for each that ends.

    Args:
        todo: What to train, in this order.
        known: Finished runs, whose times tell how long the rest will take.
        jobs: How many run at once.
        lock: Handle of what `locked` holds.

    Returns:
        How many failed.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; all have stopped with a checkpoint.
    """
    began, queue, running = time.monotonic(), list(todo), list[Process]()
    done, failed = list(known), 0
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with counted_signals() as signals:
        while running or (queue and not signals):
            while queue and len(running) < jobs and not signals:
                running.append(start(queue.pop(0), threads, lock))
            for process in [p for p in running if p.popen.poll() is not None]:
                running.remove(process)
                done += [process.run] * (process.well and process.run.finished)
                failed += not process.well
                left = seconds_left([*(p.run for p in running), *queue], done) / jobs
                count = f"{len(done)} of {len(known) + len(todo)}, {duration(time.monotonic() - began)} so far"
                say(process, count if signals else f"{count}, about {duration(left)} left")
            for process in running:
                while process.signals < len(signals):
                    process.popen.send_signal(signal.SIGINT)
                    process.signals += 1
            time.sleep(0.05)
    if signals:
        raise KeyboardInterrupt
    return failed


@contextmanager
def locked(work: Path) -> Iterator[int]:
    """Hold a folder of runs for as long as this process or a run that it started lives.

    Raises:
        InputError: Another one holds it.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{work}: runs are in training there; wait for them, or choose another --work") from error
        yield file.fileno()


@contextmanager
def counted_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C, SIGTERM and a closed terminal in a list for as long as the block lasts."""
    found: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else it is `nohup`, which means to go on
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda got, _: found.append(got)) for number in numbers}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def seconds_left(todo: Sequence[Run], done: Sequence[Run]) -> float:
    """Expect of each run what its method took with other seeds, or else what runs took on average."""
    took: dict[str, list[float]] = {}
    for run in done:
        spent = run.results()["time"]
        took.setdefault(run.method, []).append(spent["train_seconds"] + spent["evaluation_seconds"])
    everything = [seconds for times in took.values() for seconds in times] or [0.0]
    return sum(statistics.fmean(took.get(run.method, everything)) for run in todo)


def say(process: Process, count: str) -> None:
    """Write the line of a run that ended."""
    run, spent = process.run, duration(time.monotonic() - process.began)
    if process.well and not run.finished:
        what = f"diverged in {spent}"
    elif process.well:
        what = f"done in {spent}, validation {run.validation():.4f}"
    else:
        last = run.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        what = f"ended with code {process.popen.returncode} after {spent}, see {run.log}: {''.join(last)}"
    print(f"{run.name}: {what} [{count}]", flush=True)


def duration(seconds: float) -> str:
    """Spell a time."""
    minutes, whole = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {whole} s"


# ---------------------------------------------------------------- what is kept


def collect(all_runs: Sequence[Run], out: Path) -> None:
    """Copy the numbers of finished runs to OUT, without weights and without the names of this machine's folders."""
    for run in all_runs:
        if not run.over:
            continue
        folder = out / run.name
        folder.mkdir(parents=True, exist_ok=True)
        settings = to_dict(runs.read_settings(run.folder))
        backbone = _without_place(settings["backbone"])
        settings |= {"backbone": backbone, "output": None, "data": {**settings["data"], "root": None}}
        _write_settings(folder / "config.yaml", settings)
        environment = json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))
        write_json(folder / "environment.json", {name: environment[name] for name in VERSIONS})
        if not run.finished:
            write_json(folder / "not-finite.json", [])  # without its rows, which are data
            continue
        write_json(folder / "results.json", run.results() | {"backbone": backbone})
        shutil.copyfile(run.folder / "metrics.jsonl", folder / "metrics.jsonl")


def _write_settings(path: Path, settings: dict[str, Any]) -> None:
    write_text(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def _without_place(backbone: str) -> str:
    return Path(backbone).name if Path(backbone).is_absolute() else backbone


def restore(all_runs: Sequence[Run], out: Path) -> None:
    """Copy the numbers of runs that OUT has, and WORK has nothing of, back to where `collect` found them."""
    for run in all_runs:
        there = replace(run, settings=replace(run.settings, output=str(out / run.name)))
        if not run.folder.exists() and there.over:
            settings = to_dict(runs.read_settings(there.folder))
            if settings["backbone"] == _without_place(run.settings.backbone):
                settings["backbone"] = run.settings.backbone
            with new_folder(run.folder) as folder:
                shutil.copytree(there.folder, folder, dirs_exist_ok=True)
                _write_settings(folder / "config.yaml", settings)


def write_tuning(suite: Suite, out: Path) -> None:
    """Write what each learning rate reached on the validation splits, and which were chosen."""
    found = {}
    for name, trials in suite.trials.items():
        scores = {f"{t.settings.training.learning_rate:g}": t.validation() if t.finished else None for t in trials}
        by_task = {
            f"{t.settings.training.learning_rate:g}": {
                task["name"]: task["metrics"]["validation"][task["score_metric"]] for task in t.results()["tasks"]
            }
            for t in trials
            if t.finished
        }
        state = {t.name: "done" if t.finished else "diverged" if t.diverged else "not trained" for t in trials}
        found[name] = {"chosen": choice(trials), "validation": scores, "tasks": by_task, "trials": state}
    seed = next(iter(suite.trials.values()))[0].settings.training.seed
    write_json(out / "tuning.json", {"seed": seed, "average": AVERAGE, "methods": found})


def table(suite: Suite, out: Path) -> str:
    """Return the table of what was collected, its rows in the suite's order.

    Raises:
        InputError: Nothing was, or its files can't be compared.
    """
    folders = [out / run.name for run in suite.runs if (out / run.name / "results.json").is_file()]
    if not folders:
        raise InputError(f"{out}: none of the suite's runs is finished; train them without --collect")
    loose = len({run.settings.training.steps for run in suite.runs}) > 1  # it means to compare different protocols
    columns, notes = compare.compare(folders, split=suite.split, metrics="first", loose=loose)
    return compare.FORMATS["markdown"](columns, notes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line; return the exit code: 0, 1 when a run failed, 2 for bad input, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the suite")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the numbers and table.md")
    parser.add_argument("--data-root", type=Path, help="folder of the data; by default that of CONFIG.yaml")
    parser.add_argument("--work", type=Path, help="folder of the runs; by default runs/NAME of the YAML file")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores; default: 1")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="train these of the suite's methods only")
    parser.add_argument("--tune-only", action="store_true", help="stop when the learning rates are chosen")
    parser.add_argument("--restore", action="store_true", help="take what OUT has, and WORK has not, for trained")
    parser.add_argument("--collect", action="store_true", help="train nothing, gather what is finished")
    options = parser.parse_args(arguments)
    try:
        return reproduce(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


def reproduce(options: argparse.Namespace) -> int:
    """Train what is not finished, then gather."""
    if options.jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {options.jobs}")
    if options.data_root is not None and not options.data_root.is_dir():
        raise InputError(f"--data-root {options.data_root}: no such folder")
    work = options.work or Path("runs", options.config.stem)
    suite = read_suite(options.config, work, options.data_root).of(options.methods)
    trials = [trial for each in suite.trials.values() for trial in each]
    if options.tune_only and not trials:
        raise InputError(f"{options.config} has no section `tune`, so there is nothing that --tune-only could train")
    failed = 0
    if options.restore:
        restore(trials, options.out / TRIALS)
        restore(suite.runs, options.out)
    if options.collect:
        check_same([*trials, *tuned(suite)])
    else:
        with locked(work) as lock:
            failed = train_missing(trials, "trials of learning rates", options.jobs, lock)
            if not options.tune_only:
                failed += train_missing(tuned(suite), "runs", options.jobs, lock)
    gather(read_suite(options.config, work, options.data_root), options.out)
    return 1 if failed else 0


def gather(suite: Suite, out: Path) -> None:
    """Write OUT.

    Raises:
        InputError: Nothing is finished.
    """
    if suite.trials:
        out.mkdir(parents=True, exist_ok=True)
        write_tuning(suite, out)
        collect([trial for each in suite.trials.values() for trial in each], out / TRIALS)
    ready = tuned(suite)
    collect(ready, out)
    finished = sum(run.finished for run in ready)
    if finished or not suite.trials:
        write_text(out / "table.md", table(suite, out))
    print(f"{finished} of {len(suite.runs)} runs are in {out / 'table.md'}")


def train_missing(all_runs: Sequence[Run], what: str, jobs: int, lock: int) -> int:
    """Train what is not over; return how many failed."""
    if not all_runs:
        return 0
    check_same(all_runs)
    over = [run for run in all_runs if run.over]
    todo = [run for run in all_runs if run not in over]
    print(
        f"{len(todo)} of {len(all_runs)} {what} to train in {all_runs[0].folder.parent}, {jobs} at a time", flush=True
    )
    return train_all(todo, [run for run in over if run.finished], jobs, lock)


if __name__ == "__main__":
    sys.exit(main())
