"""The paper's figures, and those beyond it, from the numbers of an `Analysis`: arrays in, figures out.

    Fig. 3    `places`          all A's and all B's in the plane of their principal components
    Fig. 5    `ranks`, `spectra`  effective ranks, norms and singular values of each projection
    Fig. 7    `alike`           correlation between the layers
    beyond    `overlaps`, `scales`, `tasks`, `ablated`

What is drawn is plain data for plotly.js (see `charts`); `plotly.graph_objects.Figure(panel.plot)` takes it as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unolora.analysis import numbers
from unolora.charts import RUN, Figure, Panel, Point, Series, Span, bars, grid, keys_of, lines, marks, points, tree

Array = np.ndarray[Any, Any]
Row = Mapping[str, Any]
Labels = Mapping[str, int]
"""Label of a method -> the number of its series."""

MATRICES = ("A", "B")
MOST_SERIES = 8
"""Of a scatter plot: beyond, colours and markers repeat."""


def span(mean: float | None, half: float | None) -> Any:
    """Return a mean with its interval, or alone where there is none."""
    if mean is None or half is None or np.isnan(half):
        return mean
    return Span(mean, mean - half, mean + half)


def places(table: Sequence[Row], shares: Mapping[str, Array], numbered: Labels) -> Figure | None:
    """Draw each matrix as a point in the plane of the principal components (Fig. 3).

    Args:
        table: Rows of an `Analysis.table`.
        shares: "pca/MATRIX/SHAPE/share of variance" -> shares of the components.
        numbered: The series of each label.
    """
    found: dict[tuple[str, str], dict[tuple[Any, ...], dict[str, Any]]] = {}
    for row in table:
        if row["measure"].startswith("principal component"):
            of_matrix = found.setdefault((row["matrix"], row["shape"]), {})
            key = (row["label"], row["run"], row["task"], row["projection"])
            of_matrix.setdefault(key, {})[row["measure"][-1]] = row["value"]
    panels = []
    for (matrix, shape), members in found.items():
        first, second = shares.get(f"pca/{matrix}/{shape}/share of variance", np.zeros(2))
        given = [
            Point(label, numbered.get(label, RUN), at["1"], at["2"], f"{projection} ({task or run})")
            for (label, run, task, projection), at in members.items()
        ]
        heading = f"{matrix}, {shape}"
        x, y = f"component 1 ({first:.0%})", f"component 2 ({second:.0%})"
        panels.append(points(heading, given, x=x, y=y))
    if not panels:
        return None
    alt = "Scatter plots of all A's and of all B's by their first two principal components, entry by entry."
    return Figure("Where the matrices lie", alt, panels, _keys(numbered, table))


def _keys(numbered: Labels, rows: Sequence[Row]) -> list[tuple[str, int]]:
    present = {row["label"] for row in rows}
    return [(label, number) for label, number in numbered.items() if label in present]


def ranks(table: Sequence[Row], numbered: Labels) -> Figure | None:
    """Draw effective ranks, norm and largest singular value over the projections (Fig. 5), with bands over runs."""
    panels = []
    for matrix in MATRICES:
        for measure in numbers.MEASURES:
            series = _over_projections([r for r in table if (r["matrix"], r["measure"]) == (matrix, measure)], numbered)
            if series:
                panels.append(lines(f"{matrix}: {measure}", series, how="digits", x="Projection"))
    if not panels:
        return None
    alt = (
        "Line charts of the effective ranks, the norm and the largest singular value of A and of B over projections, "
        "in the order of the network."
    )
    return Figure("Effective ranks and norms by projection", alt, panels, _keys(numbered, table))


def _over_projections(rows: Sequence[Row], numbered: Labels) -> list[Series]:
    """Average over the runs (and tasks) of a label; projections are numbered from 1 in the order of the network."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        found.setdefault(row["label"], {}).setdefault(row["projection"], []).append(row["value"])
    series = []
    for label, of_projections in found.items():
        spans = [span(*numbers.interval(values)) for values in of_projections.values()]
        series.append(Series(label, numbered.get(label, RUN), dict(enumerate(spans, start=1))))
    return series


def spectra(arrays: Mapping[str, Array], adapters: Mapping[str, str], numbered: Labels) -> Figure | None:
    """Draw the singular values, and the eigenvalues of M M^T, averaged over projections, largest first.

    Args:
        arrays: "ADAPTER/MATRIX/singular values" -> [P, R].
        adapters: Adapter -> its label; the adapters of a label give a band.
        numbered: The series of each label.
    """
    panels = []
    for what in ("singular values", "eigenvalues"):
        for matrix in MATRICES:
            found: dict[str, list[Array]] = {}
            for adapter, label in adapters.items():
                values = arrays.get(f"{adapter}/{matrix}/{what}")
                if values is not None:
                    found.setdefault(label, []).append(values.mean(axis=0))
            series = [Series(label, numbered.get(label, RUN), _by_number(each)) for label, each in found.items()]
            if series:
                panels.append(lines(f"{matrix}: {what}", series, how="digits", x="Number"))
    if not panels:
        return None
    alt = "Line charts of the singular values and eigenvalues of A and of B, averaged over the projections."
    return Figure("Spectra", alt, panels, [(label, number) for label, number in numbered.items()])


def _by_number(spectra_of: Sequence[Array]) -> dict[int, Any]:
    longest = max(map(len, spectra_of))
    padded = [np.pad(each, (0, longest - len(each))) for each in spectra_of]
    return {n: span(*numbers.interval(list(map(float, v)))) for n, v in enumerate(zip(*padded, strict=True), start=1)}


def alike(name: str, arrays: Mapping[str, Array], projections: Sequence[str]) -> Figure | None:
    """Draw the correlation between the projections of one adapter (Fig. 7).

    Args:
        name: The adapter.
        arrays: "ADAPTER/MATRIX/correlations" -> [P, P].
        projections: Their names.
    """
    panels = []
    for matrix in MATRICES:
        values = arrays.get(f"{name}/{matrix}/correlations")
        if values is not None:
            cells = [
                [None if i == j or np.isnan(v) else float(v) for j, v in enumerate(r)] for i, r in enumerate(values)
            ]
            panels.append(grid(matrix, projections, projections, cells, scale="diverging", first="Projection"))
    if not panels:
        return None
    alt = "Heat maps of Pearson's correlation between the A's of every two projections, and between the B's."
    return Figure(f"Correlation between projections, entry by entry: {name}", alt, panels, [])


def overlaps(comparisons: Sequence[Row]) -> Figure | None:
    """Draw the overlaps of A, of what training added to it, and of B, with intervals, beside random subspaces."""
    matrices = dict.fromkeys(row["matrix"] for row in comparisons if row.get("overlap") is not None)
    if not matrices:
        return None
    of_matrix = {
        matrix: {_pairing(r): span(r["overlap"], r["overlap ±"]) for r in comparisons if r["matrix"] == matrix}
        for matrix in matrices
    }
    random = {
        _pairing(r): Span(r["random"], r["random low"], r["random high"]) for r in comparisons if r["matrix"] == "A"
    }
    series = [Series("random subspaces", 0, random)]
    series += [Series(matrix, number, found) for number, (matrix, found) in enumerate(of_matrix.items(), start=1)]
    alt = "Marks with intervals: how much the subspaces of A and of B overlap between adapters, beside random ones."
    panel = marks("", series, first="Adapters", x="overlap: mean squared cosine of the principal angles")
    return Figure("Overlap of subspaces", alt, [panel], keys_of(series), columns=1)


def _pairing(row: Row) -> str:
    return f"{row['label']}, {row['relation']}"


def scales(name: str, means: Array, spreads: Array, tasks: Sequence[str], projections: Sequence[str]) -> Figure:
    """Draw the scale of each task in each rank of each projection, and its spread over the samples of the task.

    Args:
        name: The run.
        means: Over samples [K, P, R].
        spreads: Standard deviation over samples [K, P, R].
        tasks: K names.
        projections: P names.
    """
    columns = [f"{projection} rank {rank}" for projection in projections for rank in range(means.shape[2])]
    options: dict[str, Any] = {"how": "score", "first": "Projection and rank", "turned": True}
    of_task = grid("mean, over the root mean square of the rank", tasks, columns, _flat(numbers.relative_scales(means)),
                   scale="diverging", **options)  # fmt: skip
    within = grid("spread over samples", tasks, columns, _flat(spreads), **options)
    for panel in (of_task, within):
        panel.plot["layout"]["xaxis"] |= {
            "showticklabels": False,
            "ticks": "",
            "title": {"text": "projections and their ranks"},
        }
    alt = "Heat maps of tasks by ranks: the mean scale, and how much it differs between the samples of a task."
    return Figure(f"Scales: {name}", alt, [of_task, within], [], columns=1)


def _flat(values: Array) -> list[list[float]]:
    found: list[list[float]] = values.reshape(len(values), -1).tolist()
    return found


def tasks(name: str, arrays: Mapping[str, Array], names: Sequence[str]) -> Figure | None:
    """Draw which tasks are alike: by their scales as a tree, by their gradients as a heat map."""
    panels: list[Panel] = []
    linkage = arrays.get(f"{name}/s/linkage of tasks")
    if linkage is not None and len(linkage):
        panels.append(tree("by their scales", names, linkage.tolist(), x="root mean square difference"))
    cosines = arrays.get(f"{name}/gradients/cosines")
    if cosines is not None and len(cosines) > 1:
        cells = [[None if i == j else float(v) for j, v in enumerate(row)] for i, row in enumerate(cosines)]
        options: dict[str, Any] = {"scale": "diverging", "how": "times", "first": "Task"}
        panels.append(grid("by their gradients (cosine)", names, names, cells, **options))
    if not panels:
        return None
    alt = "A tree that joins tasks of like scales, and a heat map of the cosines between the gradients of tasks."
    return Figure(f"Which tasks are alike: {name}", alt, panels, [])


def switched_off(name: str, off: Array, names: Sequence[str]) -> Figure:
    """Draw how many ranks each task switches off.

    Args:
        name: The run.
        off: [K, P, R] of 0 and 1.
        names: K tasks.
    """
    series = [Series("ranks switched off", RUN, dict(zip(names, off.sum(axis=(1, 2)).tolist(), strict=True)))]
    alt = "Bar chart of how many ranks each task hardly uses."
    panel = bars(f"of {off[0].size} ranks", series, how="count")
    return Figure(f"Ranks that a task hardly uses: {name}", alt, [panel], [])


def ablated(name: str, rows: Sequence[Row]) -> Figure:
    """Draw what each task's score loses without a rank, a layer's adapters, or the sample."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    parts = [part for part in dict.fromkeys(row["without"] for row in rows) if part != "nothing"]
    change = {(row["without"], row["task"]): row["change"] for row in rows}
    cells = [[change.get((part, task)) for task in names] for part in parts]
    alt = "Heat map of how the validation score of each task changes without a part of the adapter."
    options: dict[str, Any] = {"scale": "diverging", "how": "gain", "first": "Without"}
    return Figure(
        f"Without a part of the adapter: {name}", alt, [grid("", parts, names, cells, **options)], [], columns=1
    )
