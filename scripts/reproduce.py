"""Train a suite: each of its methods with each of its seeds, some at a time, and gather what they reached.

    python scripts/reproduce.py configs/glue-small.yaml results/glue-small --data-root DIR --jobs 2

A suite is a YAML file: `settings` that all runs share (what `unolora train` takes), `seeds`, and `methods`, each a name
with the settings that are its own. Runs lie in WORK/<method>-seed<seed>/; finished ones are kept, stopped ones go on.
OUT gets their numbers without weights or paths, and table.md.
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
from unolora.atomic import write_json, write_text
from unolora.errors import InputError, unknown
from unolora.settings import SECTIONS, Settings, flat, from_dict, to_dict

KEYS = ("settings", "seeds", "methods")
VERSIONS = ("unolora", "torch", "transformers", "peft", "python")
PLACES = ("output", "overwrite", "data.root")
GIVEN_HERE = (*PLACES, "baselines", "training.seed")


@dataclass
class Run:
    """A method with a seed."""

    method: str
    settings: Settings  # output: its folder in WORK

    @property
    def name(self) -> str:
        """What its folders are called."""
        return f"{self.method}-seed{self.settings.training.seed}"

    @property
    def folder(self) -> Path:
        """Where it is trained."""
        return Path(self.settings.output or "")

    @property
    def log(self) -> Path:
        """What it writes to the terminal."""
        return self.folder.with_name(f"{self.name}.log")

    @property
    def finished(self) -> bool:
        """Whether it has results."""
        return (self.folder / "results.json").is_file()

    def results(self) -> dict[str, Any]:
        """Read them."""
        return dict(json.loads((self.folder / "results.json").read_text(encoding="utf-8")))


# ---------------------------------------------------------------- the suite


def read_suite(path: Path, work: Path, data_root: Path | None = None) -> list[Run]:
    """Read a suite's runs, seed by seed, so that every method has one run before any has two.

    Raises:
        InputError: It can't be read, or a run's settings make no sense.
    """
    suite = runs.read_yaml(path, "give the YAML file of a suite")
    for key in suite:
        if key not in KEYS:
            raise unknown("key of a suite", key, KEYS)
    shared, seeds, methods = (suite.get(key, {}) for key in KEYS)
    if not isinstance(seeds, list) or not seeds or len(set(map(str, seeds))) < len(seeds):
        raise InputError(f"{path}: `seeds` must be a list of different numbers, got {seeds!r}")
    for name, value in (("settings", shared), ("methods", methods)):
        if not isinstance(value, dict) or not value:
            raise InputError(f"{path}: `{name}` must be a mapping with something in it, got {value!r}")
    root = str((data_root or path.parent).resolve())
    found = []
    for seed in seeds:
        for name, own in methods.items():
            if not re.fullmatch(r"[A-Za-z0-9_.+-]+", str(name)):
                raise InputError(f"{path}: method {name!r} names folders: letters, digits and _.+- only")
            try:
                _check_own(shared)
                _check_own(own or {})
                settings = from_dict(merged(shared, own or {}))
                settings = replace(
                    settings,
                    training=replace(settings.training, seed=seed),
                    data=replace(settings.data, root=root),
                    output=str(work / f"{name}-seed{seed}"),
                )
            except InputError as error:
                raise InputError(f"{path}: method {name!r}: {error}") from error
            found.append(Run(str(name), settings))
    return found


def merged(settings: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with some replaced, section by section."""
    both = dict(settings)
    for name, value in own.items():
        below = both.get(name, {})
        sections = name in SECTIONS and isinstance(below, dict) and isinstance(value, dict)
        both[name] = {**below, **value} if sections else value
    return both


def _check_own(settings: Any) -> None:
    if not isinstance(settings, dict):
        raise InputError(f"expected a mapping of settings, got {settings!r}")
    for name in GIVEN_HERE:
        section, _, key = name.rpartition(".")
        inside = settings.get(section) if section else settings
        if isinstance(inside, dict) and key in inside:
            raise InputError(f"`{name}` is not a suite's to say: seeds are in `seeds`, places on the command line")


def check_same(all_runs: Sequence[Run]) -> None:
    """Refuse to go on with, or to count, runs of other settings that lie where these go.

    Raises:
        InputError: Naming what differs.
    """
    for run in all_runs:
        if (run.folder / "config.yaml").is_file():
            now, there = (flat(settings) for settings in (run.settings, runs.read_settings(run.folder)))
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
        return self.popen.returncode == 0 and self.run.finished


def start(run: Run, threads: int, lock: int) -> Process:
    """Start `unolora train`, or go on, away from the terminal's Ctrl-C: `train_all` hands that on."""
    settings = run.folder.with_name(f"{run.name}.yaml")
    write_text(settings, yaml.safe_dump(to_dict(run.settings), sort_keys=False, allow_unicode=True))
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
                done += [process.run] * process.well
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
    if process.well:
        average = run.results()["averages"]["mean_of_first_metrics"]["validation"]
        what = f"done in {spent}, validation {average:.4f}"
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
        if not run.finished:
            continue
        folder = out / run.name
        folder.mkdir(parents=True, exist_ok=True)
        settings = to_dict(run.settings)
        backbone = Path(settings["backbone"]).name if Path(settings["backbone"]).is_absolute() else settings["backbone"]
        settings |= {"backbone": backbone, "output": None, "data": {**settings["data"], "root": None}}
        write_text(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        write_json(folder / "results.json", run.results() | {"backbone": backbone})
        environment = json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))
        write_json(folder / "environment.json", {name: environment[name] for name in VERSIONS})
        shutil.copyfile(run.folder / "metrics.jsonl", folder / "metrics.jsonl")


def table(all_runs: Sequence[Run], out: Path) -> str:
    """Return the table of what was collected, its rows in the suite's order.

    Raises:
        InputError: Nothing was, or its files can't be compared.
    """
    folders = [out / run.name for run in all_runs if (out / run.name / "results.json").is_file()]
    if not folders:
        raise InputError(f"{out}: none of the suite's runs is finished; train them without --collect")
    columns, notes = compare.compare(folders, metrics="first")
    return compare.FORMATS["markdown"](columns, notes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line; return the exit code: 0, 1 when a run failed, 2 for bad input, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the suite")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the numbers and table.md")
    parser.add_argument("--data-root", type=Path, help="folder of the data; by default that of CONFIG.yaml")
    parser.add_argument("--work", type=Path, help="folder of the runs; by default runs/NAME of the YAML file")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores; default: 1")
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
    found = read_suite(options.config, work, options.data_root)
    failed = 0
    if options.collect:
        check_same(found)
    else:
        with locked(work) as lock:
            check_same(found)
            todo, known = [r for r in found if not r.finished], [r for r in found if r.finished]
            print(f"{len(todo)} of {len(found)} runs to train in {work}, {options.jobs} at a time", flush=True)
            failed = train_all(todo, known, options.jobs, lock)
    collect(found, options.out)
    write_text(options.out / "table.md", table(found, options.out))
    print(f"{sum(run.finished for run in found)} of {len(found)} runs are in {options.out / 'table.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
