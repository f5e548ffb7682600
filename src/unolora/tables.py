"""The tables that commands print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table


def scores(results: Sequence[dict[str, Any]]) -> Table:
    """Show the scores of a run's methods beside each other, from what their results.json hold."""
    from unolora.metrics import scored_on

    split = scored_on(results[0]["averages"])
    table = Table(f"{split} split", "score", "constant", *(found["label"] for found in results))
    for place, task in enumerate(results[0]["tasks"]):
        metric = task["score_metric"]
        values = [task["baseline"]["metrics"], *(found["tasks"][place]["metrics"] for found in results)]
        table.add_row(task["name"], metric, *(f"{value[split][metric]:.3f}" for value in values))
    table.add_section()
    averages = [f"{found['averages']['mean_of_first_metrics'][split]:.3f}" for found in results]
    table.add_row("mean of first metrics", "", "", *averages)
    return table


def overlaps(rows: Sequence[dict[str, Any]]) -> Table:
    """Show how near subspaces are, from the comparisons of an analysis."""
    table = Table("runs", "apart", "", "pairs", "overlap", "random (95 %)", "p random", "p layers", "above chance")
    for row in rows:
        apart = row["relation"] + (f", {row['seeds']} seeds" if row["seeds"] > 1 else "")
        above = _with_half(row["above chance"], row["above chance ±"])
        if "overlap" in row:
            random = f"{row['random']:.4f} ({row['random low']:.4f} to {row['random high']:.4f})"
            chances = [f"{p:.3f}" if p is not None else "\u2013" for p in (row["p (random)"], row["p (layers)"])]
            cells = [_with_half(row["overlap"], row["overlap ±"]), random, *chances]
        else:
            cells = [""] * 4
        table.add_row(row["label"], apart, row["matrix"], str(row["pairs"]), *cells, above)
    return table


def summary(rows: Sequence[dict[str, Any]]) -> Table:
    """Show what an analysis says of each method and task."""
    table = Table("method", "task", "", "mean over projections", "value", "runs")
    for row in rows:
        value = _with_half(row["mean"], row["±"])
        table.add_row(row["label"], row["task"], row["matrix"], row["measure"], value, str(row["runs"]))
    return table


def ablations(rows: Sequence[dict[str, Any]]) -> Table:
    """Show what a run loses without each of its parts."""
    table = Table("run", "without", "task", "metric", "score", "change")
    for row in rows:
        numbers = (f"{row['score']:.4f}", f"{row['change']:+.4f}")
        table.add_row(row["run"], row["without"], row["task"], row["metric"], *numbers)
    return table


def _with_half(mean: float, half: float | None) -> str:
    if mean != mean:  # NaN, as of a B that is zero
        return "\u2013"
    return f"{mean:.4f}" + ("" if half is None else f" ± {half:.4f}")


def moved(old_tasks: dict[str, dict[str, Any]]) -> Table:
    """Show what became of the old tasks when one was added."""
    table = Table("old task, test split", "score", "before", "after", "change")
    for name, found in old_tasks.items():
        before, after = found["before"], found["after"]
        table.add_row(name, found["metric"], f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
    return table
