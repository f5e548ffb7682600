"""Ratios of times and of memory that hold on a machine with other work on it.

A and B take turns within one process, in an order that turns with the round, and the median over rounds of the ratio
counts: what slows the machine for seconds slows both.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from unolora.errors import InputError

ROUNDS = 7
"""The fewest rounds that a median is taken over."""


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Args:
        what: Is measured.
        against: The thing it is measured against.
        ratio: Of the two.
        reach: What it should be, such as "<= 0.93" or "= 1 ± 0.02"; empty where nothing is asked.
        spread: The quartiles of the rounds' ratios; None for what is counted.
        cpu: The ratio of processor time; None where it says nothing.
        note: More, such as shapes.
    """

    what: str
    against: str
    ratio: float
    reach: str = ""
    spread: tuple[float, float] | None = None
    cpu: float | None = None
    note: str = ""

    def reached(self) -> bool | None:
        """Whether the ratio is as it should be; None where nothing is asked."""
        if not self.reach:
            return None
        sign, limit, *within = self.reach.split()
        if sign == "=":
            return abs(self.ratio - float(limit)) <= float(within[1])
        return self.ratio <= float(limit) if sign == "<=" else self.ratio >= float(limit)


@dataclass(frozen=True)
class Times:
    """Seconds of each round: on the clock, and of the processor."""

    wall: list[float]
    cpu: list[float]

    def times(self, factor: float) -> Times:
        """Return what as many times the work takes, where a part of it was timed."""
        return Times([factor * seconds for seconds in self.wall], [factor * seconds for seconds in self.cpu])


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    """Time functions in turns, after one call of each that does not count.

    Raises:
        InputError: Fewer than `ROUNDS` rounds.
    """
    if rounds < ROUNDS:
        raise InputError(f"a median needs at least {ROUNDS} rounds, got {rounds}")
    for run in runs.values():
        run()
    found = {name: Times([], []) for name in runs}
    names = list(runs)
    gc.collect()
    gc.disable()
    try:
        for at in range(rounds):
            start = at % len(names)
            for name in names[start:] + names[:start]:
                wall, cpu = time.perf_counter(), time.process_time()
                runs[name]()
                found[name].cpu.append(time.process_time() - cpu)
                found[name].wall.append(time.perf_counter() - wall)
    finally:
        gc.enable()
    return found


def line(
    times: Mapping[str, Times], what: str, against: str, reach: str = "", note: str = "", *, faster: bool = False
) -> Line:
    """Compare two of the functions that `interleaved` timed.

    Args:
        times: Of both.
        what: The name of one.
        against: The name of the other.
        reach: See `Line`.
        note: See `Line`.
        faster: Give how many times as fast `what` is, not how many times as long it takes.
    """

    def ratios(kind: str) -> list[float]:
        pairs = zip(getattr(times[what], kind), getattr(times[against], kind), strict=True)
        return [b / a if faster else a / b for a, b in pairs]

    wall = ratios("wall")
    quartiles = statistics.quantiles(wall, n=4)
    cpu = statistics.median(ratios("cpu"))
    return Line(what, against, statistics.median(wall), reach, (quartiles[0], quartiles[2]), cpu, note)


def in_turns(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Run Python programs in processes of their own, in turns; each prints a JSON object as its last line.

    Returns:
        Of each program and round the object, and beside it `wall`, the seconds of the whole process.

    Raises:
        RuntimeError: A program failed; the message has the end of what it said.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    names = list(commands)
    for at in range(rounds):
        start = at % len(names)
        for name in names[start:] + names[:start]:
            arguments = commands[name]
            started = time.perf_counter()
            done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{name}: {done.stderr[-500:]}")
            wall = time.perf_counter() - started
            found[name].append({**json.loads(done.stdout.splitlines()[-1]), "wall": wall})
    return found


def paired(
    found: Mapping[str, Sequence[Mapping[str, float]]],
    key: str,
    what: str,
    against: str,
    reach: str = "",
    note: str = "",
) -> Line:
    """Compare a number that two of the programs of `in_turns` printed."""
    ratios = [a[key] / b[key] for a, b in zip(found[what], found[against], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return Line(what, against, statistics.median(ratios), reach, (quartiles[0], quartiles[2]), None, note)
