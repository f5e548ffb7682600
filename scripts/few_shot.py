"""A new task from a few examples: add-task on a run that has not seen it, LoRA from scratch, heads only.

    python scripts/few_shot.py RUN TASK results/few-shot        # goes on where it was stopped

RUN is a run without TASK, which is built in. For each draw the same training rows go to all three, on one backbone, and
all are scored on the same test rows after the last step, at learning rates that were chosen beforehand.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import measured
import numpy as np

from unolora import grow, runs, training
from unolora.atomic import write_text
from unolora.settings import from_dict, to_dict
from unolora.tasks import Source, Task, get
from unolora.tasks.rows import in_turns, load, order

METHODS = {"add-task": "add-task (row and head)", "lora-shared": "LoRA from scratch", "heads-only": "heads only"}
RATES = {"add-task": 1e-2, "lora-shared": 3e-3, "heads-only": 1e-2}
VALIDATION = 32
"""Validation rows, of which there must be some; they choose nothing."""


def main() -> None:
    """Run what is missing, and write scores.json and table.md."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("task")
    parser.add_argument("output", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    measured.quiet()
    found: dict[str, float] = measured.read(options.output)
    for draw in range(options.draws):
        for size in options.sizes:
            for method in METHODS:
                if (key := f"{method} {size} {draw}") not in found:
                    found[key] = fit(options, method, size, draw)
                    measured.write(options.output, found)
                    print(key, found[key], flush=True)
    write_text(options.output / "table.md", table(found))


def table(found: dict[str, float]) -> str:
    """Return means and standard deviations over draws, a line for each method."""
    values: dict[str, list[float]] = {}
    for key, score in found.items():
        values.setdefault(key.rpartition(" ")[0], []).append(score)
    sizes = sorted({int(key.split()[1]) for key in values})
    lines = [
        f"| | learning rate | {' | '.join(f'{size} examples' for size in sizes)} |",
        f"| --- | --- |{' --- |' * len(sizes)}",
    ]
    for method, label in METHODS.items():
        drawn = [values[f"{method} {size}"] for size in sizes]
        cells = [f"{np.mean(each):.3f} ± {np.std(each, ddof=1):.3f}" for each in drawn]
        lines.append(f"| {label} | {RATES[method]:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def fit(options: argparse.Namespace, method: str, size: int, draw: int) -> float:
    """Train once in a folder that goes, and return the task's score on its test rows."""
    rate = RATES[method]
    # Nobody would read the report and the analysis.
    quick = mock.patch("unolora.report.write_report"), mock.patch("unolora.training.write_analysis")
    with tempfile.TemporaryDirectory() as folder, quick[0], quick[1]:
        task, output = drawn(get(options.task), size, draw, Path(folder)), Path(folder, "run")
        if method == "add-task":
            grow.add_task(options.run, task, output, steps=options.steps, learning_rate=rate)
        else:
            training.train(alone(options, method, task, draw, rate, output))
        entry = json.loads((output / "results.json").read_text())["tasks"][-1]
    return round(float(entry["metrics"]["test"][task.metrics[0]]), 6)


def alone(options: argparse.Namespace, method: str, task: Task, draw: int, rate: float, output: Path) -> Any:
    """The run's settings, for another method on the new task alone."""
    found = to_dict(runs.read_settings(options.run))
    found["training"] |= {
        "steps": options.steps,
        "evaluate_every": options.steps,
        "checkpoint_every": options.steps + 1,
        "learning_rate": rate,
        "seed": draw,
    }
    return from_dict(found | {"method": method, "baselines": [], "tasks": [grow.spelled(task)], "output": str(output)})


def drawn(task: Task, size: int, draw: int, folder: Path) -> Task:
    """The task on files with `size` training rows, as even over the labels as they come, and all test rows."""
    data = load(task)
    rows = data.splits["train"]
    few = in_turns(rows.targets, order(len(rows), "few-shot", draw), task.kind)[:size]
    chosen = {"train": rows.take(np.array(few))}
    chosen |= {"validation": data.splits["validation"].take(np.arange(VALIDATION)), "test": data.splits["test"]}
    columns, labels = task.columns, data.task.labels
    for name, split in chosen.items():
        lines = [
            json.dumps({columns[0]: texts[0], task.target: labels[int(target)] if labels else float(target)})
            for texts, target in zip(split.texts, split.targets, strict=True)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return replace(data.task, source=Source(**{name: str(folder / f"{name}.jsonl") for name in chosen}))


if __name__ == "__main__":
    main()
