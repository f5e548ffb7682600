"""Runs measurements and keeps benchmarks.md, with the numbers beside it in benchmarks.json."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unolora.atomic import explained, write_json, write_text
from unolora.bench import data, evaluation, growth, lengths, steps
from unolora.bench.timing import ROUNDS, Line
from unolora.errors import InputError, unknown

Measurement = Callable[[int], list[Line]]

MEASUREMENTS: dict[str, Measurement] = {
    "step-minilm": steps.step_minilm,
    "step-t5": steps.step_t5,
    "memory": steps.memory,
    "places": steps.places,
    "inference": steps.inference,
    "many-tasks": steps.many_tasks,
    "bf16": data.bf16,
    "file": data.file,
    "imports": data.imports,
    "growth": growth.growth,
}
"""Name -> function of the number of rounds; its docstring says what it does."""

ON_GLUE: dict[str, Callable[[int, Path], list[Line]]] = {
    "lengths": lengths.lengths,
    "recipe": lengths.recipe,
    "scoring": evaluation.scoring,
    "preprocessing": data.preprocessing,
}
"""The same for those that read GLUE, whose folder comes second."""

HEAD = """\
# Benchmarks

Ratios, measured on one machine by `unolora bench`. A and B take turns within one process, or in processes of their own.
A ratio is the median over rounds of A's time (or memory) by B's, the brackets hold the quartiles. "CPU" is the same of
the processor's time. Lines without brackets are counted.
"""


def run(names: Sequence[str], rounds: int, glue: Path, output: Path) -> Iterator[tuple[str, list[Line]]]:
    """Run measurements one by one, and write the page after each.

    Args:
        names: Of `MEASUREMENTS` and `ON_GLUE`; when empty all that can be run, so without GLUE only the former.
        rounds: Over which medians are taken.
        glue: The folder of GLUE.
        output: benchmarks.md; what it holds of other measurements stays.

    Yields:
        The name and the lines of each.

    Raises:
        InputError: A name is unknown, or there are too few rounds.
    """
    for name in names:
        if name not in _every():
            raise unknown("measurement", name, [*_every(), "serve"])
    if rounds < ROUNDS:
        raise InputError(f"a median needs at least {ROUNDS} rounds, got {rounds}")
    kept = read(output)
    for name in names or (_every() if glue.is_dir() else MEASUREMENTS):
        started = time.perf_counter()
        lines = MEASUREMENTS[name](rounds) if name in MEASUREMENTS else ON_GLUE[name](rounds, glue)
        kept[name] = {
            "command": f"unolora bench {name} --rounds {rounds}",
            "seconds": round(time.perf_counter() - started),
            "environment": environment(),
            "lines": [asdict(line) for line in lines],
        }
        write_json(output.with_suffix(".json"), {name: kept[name] for name in _every() if name in kept})
        write_text(output, page(kept))
        yield name, lines


def _every() -> dict[str, Callable[..., list[Line]]]:
    return {**MEASUREMENTS, **ON_GLUE}


def read(output: Path) -> dict[str, Any]:
    """Return the measurements that are kept beside a page.

    Raises:
        InputError: They can't be read.
    """
    path = output.with_suffix(".json")
    with explained(path):
        if not path.exists():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: not what `unolora bench` wrote ({error}); delete it") from error
    return dict(found)


def environment() -> dict[str, str]:
    """Describe the machine and the versions."""
    from unolora.doctor import examine

    names = ("unolora", "torch", "transformers", "peft", "python", "device", "processor", "threads", "bf16")
    found = examine()
    return {name: found[name] for name in names}


def page(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the page of the kept measurements."""
    parts = [HEAD]
    for name in _every():
        if name not in kept:
            continue
        found = kept[name]
        lines = [Line(**line | {"spread": line["spread"] and tuple(line["spread"])}) for line in found["lines"]]
        about = ", ".join(f"{key} {value}" for key, value in found["environment"].items())
        summary = (_every()[name].__doc__ or "").strip().splitlines()[0]
        parts.append(f"## {name}\n\n{summary} `{found['command']}` ({found['seconds']} s; {about}).\n\n{table(lines)}")
    return "\n".join(parts)


def table(lines: Sequence[Line]) -> str:
    """Write lines as a Markdown table."""
    rows = ["| what | measured against | ratio | CPU | reach | note |", "| --- | --- | ---: | ---: | --- | --- |"]
    for line in lines:
        cells = [line.what, line.against, number(line), _short(line.cpu), wanted(line), line.note]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def number(line: Line) -> str:
    """Spell a ratio with its quartiles."""
    return _short(line.ratio) + (f" [{_short(line.spread[0])}, {_short(line.spread[1])}]" if line.spread else "")


def wanted(line: Line) -> str:
    """Spell what a ratio should be, and whether it is."""
    reached = line.reached()
    return "" if reached is None else f"{line.reach}: {'yes' if reached else 'no'}"


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if 0.1 <= value < 10 else f"{value:.3g}"
