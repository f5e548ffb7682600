"""Charts: what is drawn is what stands in the table, and plotly takes it."""

import math

import numpy as np
import pytest
from scipy.cluster import hierarchy

from unolora import charts
from unolora.charts import Point, Series, Span


def valid(panel):
    """The panel as plotly itself reads it: an unknown property or a value it can't take raises."""
    graph_objects = pytest.importorskip("plotly.graph_objects")
    return graph_objects.Figure(panel.plot)


def test_lines_have_bands_where_there_are_intervals():
    spans = {10: Span(0.5, 0.4, 0.6), 20: Span(0.7, 0.6, 0.9), 30: None}
    panel = charts.lines("x", [Series("one", 1, spans), Series("two", 2, {10: 0.1, 20: math.nan})])
    band, one, two = valid(panel).data
    assert (list(band.x), list(band.y)) == ([10, 20, 20, 10], [0.6, 0.9, 0.6, 0.4])
    assert list(one.y) == [0.5, 0.7, None]
    assert list(two.y) == [0.1, None]
    assert [row[0] for row in panel.table.rows] == [10, 20, 30]
    assert panel.table.rows[1][1:] == [spans[20], pytest.approx(math.nan, nan_ok=True)]


def test_bars_and_marks_have_whiskers():
    series = [Series("m", 1, {"a": Span(0.5, 0.4, 0.7), "b": 0.3}), Series("n", 2, {"a": None})]
    for draw in (charts.bars, charts.marks):
        panel = draw("", series)
        first = valid(panel).data[0]
        assert list(first.error_x.array) == pytest.approx([0.2, 0])
        assert list(first.error_x.arrayminus) == pytest.approx([0.1, 0])
        assert panel.table.rows == [["a", Span(0.5, 0.4, 0.7), None], ["b", 0.3, None]]


def test_points_without_a_number_are_in_the_table_only():
    given = [Point("m", 1, 1.0, 2.0, "p"), Point("m", 1, None, 3.0, "q"), Point("n", 2, 4.0, Span(5.0, 4.0, 7.0), "r")]
    panel = charts.points("", given, x="x", y="y", same=True)
    first, second = valid(panel).data
    assert (list(first.x), list(first.y)) == ([1.0], [2.0])
    assert list(second.error_y.array) == [2.0]
    assert len(panel.table.rows) == 3


def test_a_wide_grid_is_told_by_its_gist():
    names = [f"c{i}" for i in range(charts.MOST_COLUMNS + 1)]
    values = [[float(i == j) + j / 100 for j in range(len(names))] for i in range(len(names))]
    panel = charts.grid("", names, names, values, first="Name")
    assert np.shape(valid(panel).data[0].z) == (31, 31)
    head = [column.title for column in panel.table.columns]
    assert head == ["Name", "Mean of the row", "Largest", "Of"]
    others = [j / 100 for j in range(1, 31)]
    assert panel.table.rows[0] == ["c0", pytest.approx(np.mean(others)), 0.3, "c30"]
    small = charts.grid("", ["r"], ["a", "b"], [[1.0, None]], turned=True)
    assert small.table.rows == [["a", 1.0], ["b", None]]


def test_a_tree_joins_what_scipy_joins():
    places = np.array([[0.0], [5.0], [1.0], [9.0]])
    linkage = hierarchy.linkage(places, "average", optimal_ordering=True)
    panel = charts.tree("", list("abcd"), linkage.tolist(), x="distance")
    figure = valid(panel)
    assert list(figure.layout.yaxis.ticktext) == [list("abcd")[leaf] for leaf in hierarchy.leaves_list(linkage)]
    assert [trace.x[1] for trace in figure.data] == pytest.approx(linkage[:, 2])
    assert {panel.table.rows[0][0], panel.table.rows[0][1]} == {"a", "c"}
    assert charts.tree("", ["a"], [], x="distance").table.rows == []


@pytest.mark.parametrize(
    ("value", "how", "text", "ends"),
    [
        (None, "score", charts.NOTHING, ""),
        (math.nan, "score", charts.NOTHING, ""),
        (-0.5, "score", charts.MINUS + "0.500", ""),
        (Span(0.5, 0.4, 0.6), "score", "0.500", "± 0.100"),
        (Span(0.5, 0.4, 0.7), "score", "0.500", "0.400 to 0.700"),
        (Span(-0.1, -0.2, 0.0), "gain", charts.MINUS + "0.100", "± 0.100"),
        (Span(0.5, math.nan, 0.6), "score", "0.500", ""),
        (Span(0.5, None, None), "score", "0.500", ""),
        (2.5e9, "bytes", "2.5 GB", ""),
        (0, "bytes", "0 B", ""),
    ],
)
def test_numbers_as_text(value, how, text, ends):
    assert charts.show(value, how) == text
    assert charts.ends(value, how) == ends


def test_series_of_one_colour_differ_in_their_markers():
    markers = [charts.lines("", [Series("", n, {1: 1.0})]).plot["data"][0]["marker"]["symbol"] for n in (1, 9, 17)]
    assert len(set(markers)) > 1
