"""What a page shows: tables, and figures as plain data for plotly.js whose numbers stand in a table as well.

A figure's colours, fonts and margins come from the page (`assets/report.js`), so that they follow its theme: a trace's
`meta` says which. It is the number of a series, or one of SCALES for a heat map. Nothing here needs plotly.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Number = int | float
Rows = list[list[Any]]
Plot = dict[str, Any]

FLOOR, RUN = 0, 1  # series numbers: the colour, dash and marker of a method in every figure; rivals follow
DASHES = ("dot", "solid", "dash", "dashdot", "longdash", "longdashdot", "dash", "dashdot")
MARKERS = ("circle", "circle", "square", "diamond", "triangle-up", "cross", "x", "star")
SCALES = ("sequential", "diverging")
NOTHING, MINUS = "\u2013", "\u2212"
MOST_COLUMNS = 30
"""Of a heat map that stands as it is in the table below; of a larger one each row's mean and its largest cell."""


class Span(NamedTuple):
    """A number and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    show: str = "text"  # how `show` writes its values
    series: int | None = None


@dataclass(frozen=True)
class Table:
    """A caption, columns, rows; a value is a text, a number, a Span, or None where it is not known."""

    caption: str
    columns: list[Column]
    rows: Rows  # the first value of a row is its header
    best: frozenset[tuple[int, int]] = frozenset()  # (row, column) of the winners
    total: bool = False  # the last row sums up


@dataclass(frozen=True)
class Series:
    """A curve, or bars of one colour."""

    label: str
    number: int  # FLOOR, RUN, rivals: its colour, dash and marker
    points: Mapping[Any, Any]  # step or task -> value


@dataclass(frozen=True)
class Panel:
    """One set of axes, and its numbers."""

    heading: str
    plot: Plot  # for plotly.js
    table: Table
    strong: bool = False


@dataclass(frozen=True)
class Figure:
    """Panels that share a title and, where there are several series, the keys that show and hide them."""

    title: str
    alt: str
    panels: list[Panel]
    keys: list[tuple[str, int]]
    columns: int = 3  # at most that many panels beside each other


# ---------------------------------------------------------------- numbers as text


def duration(seconds: Number) -> str:
    """Write seconds as "1.5 s", "2 min 30 s" or "3 h 4 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _bytes(value: Number) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


SHOW: dict[str, Callable[[Number], str]] = {
    "score": lambda value: f"{value:.3f}",
    "gain": lambda value: f"{value:+.3f}" if abs(value) >= 0.0005 else "0.000",
    "digits": lambda value: f"{value:.3g}",
    "count": lambda value: f"{value:,.0f}",
    "percent": lambda value: f"{value:.3g} %",
    "share": lambda value: f"{100 * value:.1f} %",
    "times": lambda value: f"{value:.2f}",
    "rate": lambda value: f"{value:,.1f}",
    "duration": duration,
    "bytes": _bytes,
}


def known(value: Any) -> bool:
    """Whether there is a value: None and NaN are none."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def show(value: Any, how: str) -> str:
    """Write a value as text; a Span's interval is written by `ends`."""
    if not known(middle(value)):
        return NOTHING
    return str(value) if how == "text" else SHOW[how](middle(value)).replace("-", MINUS)


def ends(value: Any, how: str) -> str:
    """Write the interval of a Span, as ± where its ends are equally far; "" for what has none."""
    if not isinstance(value, Span) or not all(known(end) and math.isfinite(end) for end in value):
        return ""
    if math.isclose(value.high - value.value, value.value - value.low, rel_tol=1e-6, abs_tol=1e-12):
        return f"\u00b1 {show(value.high - value.value, how).lstrip('+')}"
    return f"{show(value.low, how)} to {show(value.high, how)}"


def middle(value: Any) -> Any:
    """Return the number of a Span, and any other value as it is."""
    return value.value if isinstance(value, Span) else value


# ---------------------------------------------------------------- panels


def lines(
    heading: str,
    series: Sequence[Series],
    *,
    how: str = "score",
    x: str = "Step",
    kept: Number | None = None,
) -> Panel:
    """Draw curves over steps, or over what `x` says; Spans become a band around the curve.

    Args:
        heading: Of the panel.
        series: Curves.
        how: A name of SHOW.
        x: Title of the first column of the table.
        kept: The step whose weights were kept.
    """
    layout: dict[str, Any] = {"height": 220, "hovermode": "x unified"}
    if x != "Step":
        layout["xaxis"] = {"title": {"text": x}}
    if kept is not None:
        line = {"type": "line", "x0": kept, "x1": kept, "yref": "paper", "y0": 0, "y1": 1}
        note = {"x": kept, "yref": "paper", "y": 1, "yanchor": "bottom", "text": "kept", "showarrow": False}
        layout |= {"shapes": [line], "annotations": [note]}
    steps = sorted(dict.fromkeys(key for each in series for key in each.points))
    table = _table(heading, series, steps, Column(x, "count"), how)
    bands = [band for each in series for band in _band(each)]
    return Panel(heading, {"data": [*bands, *map(_line, series)], "layout": layout}, table, kept is not None)


def _table(heading: str, series: Sequence[Series], keys: Iterable[Any], first: Column, how: str) -> Table:
    rows: Rows = [[key, *(each.points.get(key) for each in series)] for key in keys]
    return Table(_caption(heading), [first, *(Column(s.label, how, s.number) for s in series)], rows)


def _caption(heading: str) -> str:
    return f"Numbers of the figure{': ' * bool(heading)}{heading}"


def _name(label: str) -> str:
    return html.escape(label)  # plotly.js reads a little HTML in names


def _marker(number: int) -> str:
    return MARKERS[(number + number // len(MARKERS)) % len(MARKERS)]  # other than that of the same colour before


def _line(series: Series) -> Plot:
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(series.points) <= 30 and series.number != FLOOR else "lines",
        "meta": series.number,
        "name": _name(series.label),
        "x": list(series.points),
        "y": [_finite(value) for value in series.points.values()],
        "line": {"dash": DASHES[series.number % len(DASHES)], "width": 2.5 if series.number == RUN else 1.75},
        "marker": {"symbol": _marker(series.number), "size": 6},
        "hovertemplate": "%{y:.3f}",
    }


def _band(series: Series) -> list[Plot]:
    """Return the area between the ends of a curve's intervals, if it has any."""
    spans = [(x, value) for x, value in series.points.items() if isinstance(value, Span) and all(map(known, value))]
    if not spans:
        return []
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "meta": series.number,
            "name": _name(series.label),
            "x": [x for x, _ in spans] + [x for x, _ in reversed(spans)],
            "y": [value.high for _, value in spans] + [value.low for _, value in reversed(spans)],
            "fill": "toself",
            "line": {"width": 0},
            "hoverinfo": "skip",
        }
    ]


def _finite(value: Any) -> Any:
    return middle(value) if known(middle(value)) else None


def bars(heading: str, series: Sequence[Series], *, how: str = "score", first: str = "Task") -> Panel:
    """Draw bars lying down: that stays readable with thirty tasks and on a phone. Spans get whiskers."""
    keys = list(dict.fromkeys(key for each in series for key in each.points))
    height = 50 + len(keys) * (14 * len(series) + 14)
    x = {"rangemode": "tozero", **({"tickformat": ".0%"} if how == "share" else {})}
    y = {"autorange": "reversed", "type": "category", "showgrid": False}
    layout = {"height": height, "bargap": 0.22, "xaxis": x, "yaxis": y, "margin": {"r": 48}}
    plot = {"data": [_bar(each, how) for each in series], "layout": layout}
    return Panel(heading, plot, _table(heading, series, keys, Column(first), how))


def _bar(series: Series, how: str) -> Plot:
    values = list(series.points.values())
    spans = any(isinstance(value, Span) for value in values)
    return {
        "type": "bar",
        "orientation": "h",
        "meta": series.number,
        "name": _name(series.label),
        "y": [_name(str(key)) for key in series.points],
        "x": [_finite(value) for value in values],
        "text": ["" if not known(middle(value)) else show(value, how) for value in values],
        "textposition": "none" if spans else "outside",
        "cliponaxis": False,
        "hovertemplate": "%{y}: %{text}<extra>%{fullData.name}</extra>",
        **({"error_x": _whiskers(values)} if spans else {}),
    }


def _whiskers(values: Sequence[Any]) -> Plot:
    """Return plotly's error bars; a value without an interval gets none."""
    spans = [v if isinstance(v, Span) and all(map(known, v)) else None for v in values]
    above, below = ([abs(s[end] - s.value) if s else 0.0 for s in spans] for end in (2, 1))
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1, "width": 3}


def marks(heading: str, series: Sequence[Series], *, how: str = "score", first: str = "Task", x: str = "") -> Panel:
    """Draw a mark with whiskers for each row and series: intervals beside each other."""
    keys = list(dict.fromkeys(key for each in series for key in each.points))
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "meta": each.number,
            "name": _name(each.label),
            "y": [_name(str(key)) for key in each.points],
            "x": [_finite(value) for value in each.points.values()],
            "error_x": _whiskers(list(each.points.values())),
            "marker": {"symbol": _marker(each.number), "size": 8},
            "hovertemplate": "%{y}: %{x:.3f}<extra>%{fullData.name}</extra>",
        }
        for each in series
    ]
    y = {"autorange": "reversed", "type": "category"}
    layout = {"height": 70 + 26 * max(1, len(keys)), "xaxis": {"title": {"text": x}}, "yaxis": y}
    return Panel(heading, {"data": traces, "layout": layout}, _table(heading, series, keys, Column(first), how))


class Point(NamedTuple):
    """A point of a scatter plot: its series, where it lies (a Span in y gets whiskers), and what it is."""

    label: str
    number: int
    x: Any
    y: Any
    text: str


def points(
    heading: str, given: Sequence[Point], *, x: str, y: str, log: bool = False, same: bool = False, height: int = 340
) -> Panel:
    """Draw points in a plane.

    Args:
        heading: Of the panel.
        given: The points; those without a number are left out of the figure, not of the table.
        x: Title of the axis.
        y: Title of the other.
        log: Whether x is logarithmic.
        same: Whether to draw the line where both are the same.
        height: In CSS pixels.
    """
    groups: dict[tuple[str, int], list[Point]] = {}
    for point in given:
        groups.setdefault((point.label, point.number), []).append(point)
    traces = [_cloud(label, number, members) for (label, number), members in groups.items()]
    layout: dict[str, Any] = {
        "height": height,
        "xaxis": {"title": {"text": x}, **({"type": "log"} if log else {})},
        "yaxis": {"title": {"text": y}},
        "hovermode": "closest",
    }
    values = [v for p in given for v in (middle(p.x), middle(p.y)) if known(v)]
    if same and values:
        low, high = min(values), max(values)
        layout["shapes"] = [{"type": "line", "x0": low, "x1": high, "y0": low, "y1": high}]
    columns = [Column("Point"), Column("Series"), Column(x, "digits"), Column(y, "digits")]
    return Panel(
        heading,
        {"data": traces, "layout": layout},
        Table(_caption(heading), columns, [[p.text, p.label, p.x, p.y] for p in given]),
    )


def _cloud(label: str, number: int, members: Sequence[Point]) -> Plot:
    found = [p for p in members if known(middle(p.x)) and known(middle(p.y))]
    trace: Plot = {
        "type": "scatter",
        "mode": "markers",
        "meta": number,
        "name": _name(label),
        "x": [middle(p.x) for p in found],
        "y": [middle(p.y) for p in found],
        "text": [_name(p.text) for p in found],
        "marker": {"symbol": _marker(number), "size": 7 if len(found) <= 60 else 5, "opacity": 0.8},
        "hovertemplate": "%{text}: %{x:.4g}, %{y:.4g}<extra>%{fullData.name}</extra>",
    }
    if any(isinstance(p.y, Span) for p in found):
        trace["error_y"] = _whiskers([p.y for p in found])
    return trace


def grid(
    heading: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    scale: str = "sequential",
    how: str = "digits",
    first: str = "",
    turned: bool = False,
    limits: tuple[float, float] | None = None,
) -> Panel:
    """Draw a heat map.

    Args:
        heading: Of the panel.
        rows: Names of the rows, the first on top.
        columns: Names of the columns.
        values: A number for each.
        scale: One of SCALES; "diverging" has its middle at zero.
        how: A name of SHOW.
        first: Title of the table's first column.
        turned: Whether rows are the columns of the table, which a wide figure needs.
        limits: The ends of the scale; by default the least and the greatest value.
    """
    cells = [[value if known(value) else None for value in row] for row in values]
    few = len(columns) <= 8 and len(rows) <= 12
    trace: Plot = {
        "type": "heatmap",
        "meta": scale,
        "x": [_name(name) for name in columns],
        "y": [_name(name) for name in rows],
        "z": cells,
        "xgap": 1 if len(columns) <= 40 else 0,
        "ygap": 1,
        "colorbar": {"thickness": 10, "outlinewidth": 0},
        "hovertemplate": "%{y}, %{x}: %{z:.4g}<extra></extra>",
    }
    if few:
        trace |= {"text": [[show(v, how) if v is not None else "" for v in row] for row in cells]}
        trace["texttemplate"] = "%{text}"
    if scale == "diverging":
        trace["zmid"] = 0
    if limits is not None:
        trace |= {"zmin": limits[0], "zmax": limits[1]}
    axis = {"type": "category", "showgrid": False}
    layout = {
        "height": 90 + (24 if len(rows) <= 24 else 12) * max(2, len(rows)),
        "xaxis": axis,
        "yaxis": {**axis, "autorange": "reversed"},
    }
    table = _grid_table(heading, rows, columns, cells, how, first, turned)
    return Panel(heading, {"data": [trace], "layout": layout}, table)


def _grid_table(
    heading: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[float | None]],
    how: str,
    first: str,
    turned: bool,
) -> Table:
    if turned:
        rows, columns, cells = columns, rows, [list(each) for each in zip(*cells, strict=True)]
    if len(columns) <= MOST_COLUMNS:
        body: Rows = [[name, *row] for name, row in zip(rows, cells, strict=True)]
        return Table(_caption(heading), [Column(first), *(Column(name, how) for name in columns)], body)
    heads = [Column(first), Column("Mean of the row", how), Column("Largest", how), Column("Of")]
    return Table(
        _caption(heading), heads, [[name, *_gist(row, columns, name)] for name, row in zip(rows, cells, strict=True)]
    )


def _gist(row: Sequence[float | None], columns: Sequence[str], name: str) -> list[Any]:
    """Return a row's mean, its largest cell and whose that is, the row's own column aside."""
    others = [
        (value, column) for value, column in zip(row, columns, strict=True) if value is not None and column != name
    ]
    if not others:
        return [None, None, None]
    return [math.fsum(value for value, _ in others) / len(others), *max(others)]


def tree(heading: str, names: Sequence[str], linkage: Sequence[Sequence[float]], *, x: str) -> Panel:
    """Draw a dendrogram lying down.

    Args:
        heading: Of the panel.
        names: The leaves.
        linkage: SciPy's [K - 1, 4].
        x: What the distance is.
    """
    order = _leaves(len(names), linkage)
    height = {leaf: (float(place), 0.0) for place, leaf in enumerate(order)}  # node -> where it lies, its distance
    traces: list[Plot] = []
    rows: Rows = []
    members = {leaf: [names[leaf]] for leaf in range(len(names))}
    for step, (one, other, distance, _) in enumerate(linkage):
        (y0, x0), (y1, x1) = height[int(one)], height[int(other)]
        node = len(names) + step
        height[node], members[node] = ((y0 + y1) / 2, float(distance)), members[int(one)] + members[int(other)]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "meta": RUN,
                "x": [x0, distance, distance, x1],
                "y": [y0, y0, y1, y1],
                "line": {"width": 2},
                "hovertemplate": f"{_name(' + '.join(members[node]))}: {distance:.3f}<extra></extra>",
            }
        )
        rows.append([" + ".join(members[int(one)]), " + ".join(members[int(other)]), float(distance)])
    layout = {
        "height": 80 + 26 * len(names),
        "hovermode": "closest",
        "xaxis": {"title": {"text": x}, "rangemode": "tozero"},
        "yaxis": {"tickvals": list(range(len(names))), "ticktext": [_name(names[leaf]) for leaf in order]},
    }
    columns = [Column("Joins"), Column("With"), Column(x[:1].upper() + x[1:], "score")]
    return Panel(heading, {"data": traces, "layout": layout}, Table(_caption(heading), columns, rows))


def _leaves(count: int, linkage: Sequence[Sequence[float]]) -> list[int]:
    """Return the leaves in an order in which no branches cross."""
    order = {leaf: [leaf] for leaf in range(count)}
    for step, (one, other, *_) in enumerate(linkage):
        order[count + step] = order[int(one)] + order[int(other)]
    return order[max(order)] if count else []


def keys_of(series: Iterable[Series]) -> list[tuple[str, int]]:
    """Return the (label, number) of each series, once."""
    return list(dict.fromkeys((each.label, each.number) for each in series))
