"""How often `predict --task auto` finds the task of a few unlabelled rows.

    python scripts/auto_accuracy.py RUN results/auto

Draws of several sizes from each task's test rows; the rows of a draw are all different.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import measured
import numpy as np

from unolora import runs
from unolora.atomic import write_text
from unolora.auto import Picker, encoded
from unolora.scoring import read_split

SIZES = (1, 4, 8, 32)
DRAWS = 200


def main() -> None:
    """Write scores.json and table.md."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    measured.quiet()
    run = runs.load_run(options.run)
    picker = Picker(run)
    names = [task.name for task in run.tasks]
    counts = {}
    for row, name in enumerate(names):
        rows = read_split(run, row, "test")
        states = encoded(run, row, rows, range(len(rows)))
        random = np.random.default_rng(row)
        for size in SIZES:
            found = np.zeros(len(names), int)
            for _ in range(DRAWS):
                few = random.choice(len(states), size, replace=False)
                found[int(picker.cosines(states[few]).argmax())] += 1
            counts[f"{name} {size}"] = dict(zip(names, found.tolist(), strict=True))
    measured.write(options.output, counts)
    write_text(options.output / "table.md", table(names, counts))


def table(names: list[str], counts: dict[str, dict[str, int]]) -> str:
    """Shares of draws that are right."""
    lines = [f"| task | {' | '.join(f'{size} rows' for size in SIZES)} |", f"| --- |{' ---: |' * len(SIZES)}"]
    right = {
        (name, size): counts[f"{name} {size}"][name] / sum(counts[f"{name} {size}"].values())
        for name in names
        for size in SIZES
    }
    lines += [f"| {name} | {' | '.join(f'{right[name, size]:.3f}' for size in SIZES)} |" for name in names]
    means = [np.mean([right[name, size] for name in names]) for size in SIZES]
    lines.append(f"| mean | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
