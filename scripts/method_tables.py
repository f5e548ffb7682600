"""Write the tables of docs/method.md from results/, and put them there: `python scripts/method_tables.py`.

    results/arena/tuning.md                the learning rates that were tried, and what was chosen
    results/arena/paired.md                test splits: each method against UnoLoRA*, paired by seed
    results/arena-ablations/paired.md      validation splits: each change against the base, paired by seed
    results/arena-ablations/defaults.md    the defaults beside the paper's settings, and what each is worth
    results/arena-ablations/places.md      task by task, the second feed-forward maps against query and value

What was not measured yet is said to be so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import readme_tables
import yaml

from unolora import compare, runs
from unolora.atomic import write_text
from unolora.settings import flat

AVERAGE = "mean_of_first_metrics"
OWN = ("training.seed", "data.root", "output", "overwrite")
"""Settings in which runs of a suite differ by themselves."""
NOT_YET = "not measured yet"

# setting, the paper's, the default, the rows of results/arena-ablations that have the paper's and the default
DEFAULTS = (
    (
        "adapted projections",
        "query and value",
        "BERT's second feed-forward maps; of other backbones query and value",
        ("query-value", "feed-forward-output"),
    ),
    ("start of the scale", "s = S(e), near zero", "s = 1 + S(e), spread (`scale_init: one`)", ("start-paper", "base")),
    ("sample encoding", "over padding too (its code)", "over the tokens (`mask_padding`)", ("unmasked", "base")),
    ("batches", "of one task", "mixed (`sampling.mixed`)", ("task-batches", "base")),
    ("positions", "48 rows for 72 projections (its code)", "one for each projection (`num_positions`)", None),
    ("dropout of the adapter", "0.1", "0", None),
    ("learning rate", "1e-4, 262,144 steps", "1e-3, the task's to choose", None),
)


@dataclass(frozen=True)
class Change:
    """A row: what was changed, what is trained for a task in percent of the backbone, and the averages by seed."""

    name: str
    settings: Mapping[str, Any]
    per_task: float
    by_seed: dict[int, float]
    tasks: dict[int, dict[str, float]]  # seed -> the validation score of each task


def read(folder: Path, split: str) -> list[Change]:
    """Read the finished runs of a suite, named METHOD-seedN, in the order in which its methods come in the suite."""
    found: dict[str, Change] = {}
    for path in sorted(folder.glob("*-seed*/results.json")):
        name, _, seed = path.parent.name.rpartition("-seed")
        results = json.loads(path.read_text(encoding="utf-8"))
        settings = {k: v for k, v in flat(runs.read_settings(path.parent)).items() if k not in OWN}
        change = found.setdefault(name, Change(name, settings, results["parameters"]["per_task_percent"], {}, {}))
        change.by_seed[int(seed)] = results["averages"][AVERAGE][split]
        change.tasks[int(seed)] = {
            task["name"]: task["metrics"]["validation"][task["score_metric"]] for task in results["tasks"]
        }
    suite = yaml.safe_load((readme_tables.ROOT / "configs" / f"{folder.name}.yaml").read_text(encoding="utf-8"))
    return [found[name] for name in suite["methods"] if name in found]


def difference(change: Change, base: Change) -> compare.Interval | None:
    """Return the difference of the averages, paired by seed; None without a common seed."""
    return compare.interval([value - base.by_seed[s] for s, value in change.by_seed.items() if s in base.by_seed])


def gain(found: compare.Interval | None) -> str:
    """Spell a difference; with a single seed there is no interval."""
    if found is None:
        return compare.NOTHING
    return f"{found.mean:+.4f}" + (", one seed" if found.half is None else f" ± {found.half:.4f}")


def verdict(found: compare.Interval | None) -> str:
    """Say what an interval allows to say."""
    if found is None or found.half is None:
        return "open"
    return "better" if found.mean > found.half else "worse" if -found.mean > found.half else "open"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table of texts."""
    columns = zip(*rows, strict=True)
    return compare.as_markdown(
        [compare.Column(title, "text", list(values)) for title, values in zip(head, columns, strict=True)], []
    )


def paired(folder: Path, split: str, first: str) -> str:
    """Write the rows of a suite against one of them."""
    changes = read(folder, split)
    base = next((change for change in changes if change.name == first), None)
    if base is None:
        return f"{NOT_YET}\n"
    rows = []
    for change in changes:
        odd = [f"{k.rpartition('.')[2]}={v}" for k, v in change.settings.items() if base.settings.get(k) != v]
        mean, apart = compare.interval(list(change.by_seed.values())), difference(change, base)
        seeds = ", ".join(map(str, sorted(change.by_seed)))
        assert mean is not None
        told = [compare.NOTHING] * 2 if change is base else [gain(apart), verdict(apart)]
        what = [change.name, ", ".join(odd) or compare.NOTHING, f"{change.per_task:.3g}"]
        rows.append([*what, f"{mean.mean:.4f}", *told, seeds])
    head = ["", "what differs", "trained % a task", f"{split} average", f"difference to {first}", "", "seeds"]
    return markdown(head, rows)


def by_task(folder: Path, name: str, first: str) -> str:
    """Write what a row has more than another, task by task, on the validation splits, paired by seed."""
    changes = {change.name: change.tasks for change in read(folder, "validation")}
    ours, theirs = changes.get(name, {}), changes.get(first, {})
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return f"{NOT_YET}\n"
    rows = []
    for task in ours[seeds[0]]:
        apart = compare.interval([ours[seed][task] - theirs[seed][task] for seed in seeds])
        rows.append([task, gain(apart), verdict(apart)])
    return markdown(["", f"{name} less {first}, seeds {', '.join(map(str, seeds))}", ""], rows)


def tuning(folder: Path) -> str:
    """Write the learning rates that were tried."""
    path = folder / "tuning.json"
    if not path.is_file():
        return f"{NOT_YET}\n"
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for name, method in found["methods"].items():
        tried = [
            f"{rate}: {value:.4f}" if value is not None else f"{rate}: no score"
            for rate, value in method["validation"].items()
        ]
        chosen, grid = method["chosen"], list(method["validation"])
        edge = chosen is not None and f"{chosen:g}" in (grid[0], grid[-1])
        told = NOT_YET if chosen is None else f"{chosen:g}" + " (at the edge)" * edge
        rows.append([name, ", ".join(tried), told])
    return markdown(["", f"validation average by learning rate, seed {found['seed']}", "chosen"], rows)


def defaults(folder: Path) -> str:
    """Write the defaults beside the paper's settings."""
    changes = {change.name: change for change in read(folder, "validation")} if folder.is_dir() else {}
    rows = []
    for what, paper, ours, names in DEFAULTS:
        told = NOT_YET
        if names is not None and changes.keys() >= set(names):
            told = f"{gain(difference(*(changes[name] for name in names)))} with the paper's"
        rows.append([what, paper, ours, told])
    return markdown(["", "paper", "default", "arena, validation average"], rows)


def main() -> None:
    """Write the tables, then the pages."""
    arena, ablations = (readme_tables.ROOT / "results" / name for name in ("arena", "arena-ablations"))
    for folder in (arena, ablations):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(arena / "tuning.md", tuning(arena))
    write_text(arena / "paired.md", paired(arena, "test", "unolora-star"))
    write_text(ablations / "paired.md", paired(ablations, "validation", "base"))
    write_text(ablations / "defaults.md", defaults(ablations))
    write_text(ablations / "places.md", by_task(ablations, "feed-forward-output", "query-value"))
    readme_tables.main()


if __name__ == "__main__":
    main()
