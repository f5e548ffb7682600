"""What `unolora analyze` found, as parts of a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from unolora.analysis import Analysis, figures
from unolora.charts import RUN, Column, Figure, Rows, Span, Table
from unolora.report.page import More, listed

SHARED_ONLY = 3
"""Adapters whose correlations and scales are drawn; of more, the first ones."""


def items(found: Analysis, numbered: Mapping[str, int]) -> list[Any]:
    """Arrange the analyses: what is alike, how large, what the scales do, what tasks lose.

    Args:
        found: From `analysis.analyze` or `analysis.read`.
        numbered: The series of each label; labels that are not in it follow.
    """
    labels = dict.fromkeys(row["label"] for row in found.table)
    numbers = dict(numbered)
    for label in labels:
        numbers.setdefault(label, max(numbers.values(), default=RUN - 1) + 1)
    shares = {key: value for key, value in found.arrays.items() if key.startswith("pca/")}
    adapters = {_adapter(row): row["label"] for row in found.table if row["matrix"] in "AB"}
    first = list(adapters)[:SHARED_ONLY]
    return listed(
        [
            *_subspaces(found),
            ABOUT_SIZE,
            figures.ranks(found.table, numbers),
            figures.spectra(found.arrays, adapters, {label: numbers[label] for label in labels}),
            _summary(found),
            *_scales(found),
            *_ablations(found),
            ABOUT_ENTRIES,
            figures.places(found.table, shares, numbers),
            *(figures.alike(name, found.arrays, _projections(found)) for name in first),
            f"{len(adapters) - len(first)} more adapters are not drawn." if len(adapters) > len(first) else None,
        ]
    )


ABOUT_SIZE = (
    "Effective rank: the sum of the singular values over the largest one, and the exponential of their entropy. These, "
    "norms and spectra do not change when the ranks are rotated (Q A with B Q^T, which is the same adapter)."
)
ABOUT_ENTRIES = (
    "The next figures look at matrices entry by entry, as the paper does. An adapter that is the same product of a "
    "rotated A and B lies elsewhere in them, so they say less than the overlap of subspaces."
)
ABOUT_OVERLAP = (
    "Overlap is the mean squared cosine of the principal angles between two row spaces of A, or two column spaces of "
    "B: 1 where they are the same, r / d on average where they are random. A starts at random and B at zero, so what "
    "training added to A (moved A) is what compares with B. Above chance is the overlap with the random part taken "
    "out; p layers is that of a permutation of the layers."
)


def _subspaces(found: Analysis) -> list[Any]:
    if not found.comparisons:
        return []
    heads = {"Pairs": "count", "Seeds": "count", "Overlap": "score", "Random": "score"}
    columns = [Column("Adapters"), Column("Matrix"), *(Column(title, how) for title, how in heads.items())]
    columns += [Column("p random", "score"), Column("p layers", "score"), Column("Above chance", "score")]
    rows: Rows = [
        [
            f"{row['label']}, {row['relation']}",
            row["matrix"],
            row["pairs"],
            row["seeds"],
            figures.span(row.get("overlap"), row.get("overlap \u00b1")),
            _random(row),
            row.get("p (random)"),
            row.get("p (layers)"),
            figures.span(row["above chance"], row.get("above chance \u00b1")),
        ]
        for row in found.comparisons
    ]
    return [ABOUT_OVERLAP, Table("Overlap of subspaces", columns, rows), figures.overlaps(found.comparisons)]


def _random(row: Mapping[str, Any]) -> Span | None:
    value, low, high = (row.get(name) for name in ("random", "random low", "random high"))
    if value is None or low is None or high is None or np.isnan(low):  # as where a B is zero
        return None
    return Span(value, low, high)


def _summary(found: Analysis) -> More:
    columns = [Column("Method"), Column("Task"), Column("Matrix"), Column("Measure"), Column("Mean", "digits")]
    rows: Rows = [
        [row["label"], row["task"] or "all", row["matrix"], row["measure"], _mean(row), row["runs"]]
        for row in found.summary
    ]
    table = Table("Means over projections", [*columns, Column("Runs", "count")], rows)
    return More("Means over projections, with intervals over runs", [table])


def _mean(row: Mapping[str, Any]) -> Any:
    return figures.span(row["mean"], row["\u00b1"])


def _scales(found: Analysis) -> list[Any]:
    """Draw the scales, and which tasks are alike, of the first runs that have them."""
    names = list(dict.fromkeys(row["run"] for row in found.table))[:SHARED_ONLY]
    drawn: list[Figure | str | None] = []
    for name in names:
        means = found.arrays.get(f"{name}/s/mean")
        tasks = found.tasks[name]
        if means is not None:
            spreads, off = found.arrays[f"{name}/s/spread over samples"], found.arrays[f"{name}/s/switched off"]
            drawn.append(_spread(found, name))
            drawn.append(figures.scales(name, means, spreads, tasks, _projections(found)))
            drawn.append(figures.switched_off(name, off, tasks))
        drawn.append(figures.tasks(name, found.arrays, tasks))
    return drawn


def _spread(found: Analysis, name: str) -> str:
    """Say how much of the scales' variance lies between tasks."""
    between, within = (found.arrays[f"{name}/s/variance {where}"] for where in ("between tasks", "within tasks"))
    total = float(between.sum() + within.sum())
    share = float(between.sum()) / total if total else 0.0
    sizes = [float(np.sqrt(each.mean())) for each in (between, within)]
    return (
        f"The scales of {name} differ by {sizes[0]:.3f} between tasks and by {sizes[1]:.4f} between the samples of a "
        f"task (root mean square over ranks): {share:.2%} of their variance lies between tasks."
    )


def _ablations(found: Analysis) -> list[Figure]:
    names = list(dict.fromkeys(row["run"] for row in found.ablations))
    return [figures.ablated(name, [row for row in found.ablations if row["run"] == name]) for name in names]


def _adapter(row: Mapping[str, Any]) -> str:
    return f"{row['run']}:{row['task']}" if row["task"] else str(row["run"])


def _projections(found: Analysis) -> list[str]:
    """Return the projections in the order of the network, as "0 q" where that tells them apart."""
    names = list(dict.fromkeys((row["projection"], f"{row['layer']} {row['kind']}") for row in found.table))
    short = [name for _, name in names]
    return short if len(set(short)) == len(short) else [name for name, _ in names]
