"""A page: a head, key figures and sections in, one HTML file out, which opens anywhere without a network.

The markup, style and script lie in `assets/`. A figure's numbers stand in a table below it, so nothing is lost without
sight, without JavaScript or without plotly.
"""

from __future__ import annotations

import base64
import functools
import gzip
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from unolora import charts
from unolora.charts import Figure, Table

NO_FIGURES = (
    "The figures need plotly, which was not installed when this report was written: pip install 'unolora[report]'"
)


@dataclass(frozen=True)
class Code:
    """Text to copy."""

    label: str
    text: str


@dataclass(frozen=True)
class Quotes:
    """Texts of rows, each with a line about it."""

    title: str
    rows: list[tuple[str, tuple[str, ...]]]  # (what is said about it, its texts)


@dataclass(frozen=True)
class More:
    """Something to open."""

    summary: str
    items: list[Any]
    open: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page; an item is a paragraph (str), a Table, Figure, Quotes, Code or More."""

    id: str
    title: str
    items: list[Any]


@dataclass(frozen=True)
class Page:
    """All that a page shows."""

    kicker: str
    title: str
    subtitle: str  # of the browser's tab
    meta: list[str]
    lead: str
    cards: list[tuple[str, str, str]]  # name, value, remark
    sections: list[Section]
    notes: list[str] = field(default_factory=list)


def render(page: Page) -> str:
    """Write a page as HTML."""
    loader = jinja2.PackageLoader("unolora", "assets")
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.undefined = jinja2.StrictUndefined
    pages.filters |= {"show": charts.show, "ends": charts.ends, "middle": charts.middle}
    kinds: list[type] = [Table, Figure, Quotes, Code, More]
    pages.tests |= {"known": lambda value: charts.known(charts.middle(value))}
    pages.tests |= {kind.__name__.lower(): lambda item, kind=kind: isinstance(item, kind) for kind in kinds}
    colours, css, js = (loader.get_source(pages, name)[0] for name in ("colours.css", "report.css", "report.js"))
    return pages.get_template("report.html.jinja").render(
        assets={"css": colours + css, "js": js}, plotly=_plotly(), no_figures=NO_FIGURES, page=page
    )


def _plotly() -> str | None:
    """Return plotly.js, gzip in base64 (a third of its size; `report.js` unpacks it), or None without plotly."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return None
    return _packed(get_plotlyjs())


@functools.lru_cache(maxsize=1)
def _packed(script: str) -> str:
    return base64.b64encode(gzip.compress(script.encode(), compresslevel=6, mtime=0)).decode()


def listed(items: Sequence[Any]) -> list[Any]:
    """Leave out what is not there."""
    return [item for item in items if item]
