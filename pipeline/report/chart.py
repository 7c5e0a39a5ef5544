"""A chart of a report: its spec and rows, the colours of both themes, and helpers that charts share.

Specs name no colours: these come with the Vega-Lite config of a theme.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt

from teacher_cache.storage.look.stats import Distribution

Theme = Literal["light", "dark"]

# after Okabe & Ito 2008, "Color Universal Design", adjusted to a contrast of 3:1 with the background (text: 4.5:1);
# shapes and dashes repeat the information of the colours
PALETTES: dict[Theme, dict[str, str]] = {
    "light": {
        "ground": "#f6f7f8",
        "surface": "#ffffff",
        "sunken": "#eef0f3",
        "ink": "#1b1f24",
        "muted": "#565f6b",
        "line": "#d5dae1",
        "accent": "#0b5cad",
        "good": "#16703f",
        "warn": "#8a5a00",
        "bad": "#b3261e",
        "series1": "#0072b2",
        "series2": "#c65500",
        "series3": "#007a5a",
        "series4": "#a04a82",
        "series5": "#80650a",
        "series6": "#555555",
    },
    "dark": {
        "ground": "#13161a",
        "surface": "#1b1f25",
        "sunken": "#242a32",
        "ink": "#e7eaee",
        "muted": "#a7b0bc",
        "line": "#39414c",
        "accent": "#82bdf7",
        "good": "#5fd39a",
        "warn": "#f0c063",
        "bad": "#ff9a90",
        "series1": "#58b3ec",
        "series2": "#f2975a",
        "series3": "#46c9a0",
        "series4": "#e29ac7",
        "series5": "#e2c44b",
        "series6": "#bcbcbc",
    },
}

_SHAPES = ["circle", "triangle-up", "square", "diamond", "cross", "triangle-down"]
MOST_SERIES = len(_SHAPES)


@dataclass(frozen=True)
class Chart:
    """A chart with its data.

    Attributes:
        name: name of the chart, and of its data in the spec.
        caption: text below the chart.
        alt: alternative text for screen readers.
        spec: Vega-Lite spec, with ``data: {"name": name}``.
        columns: field and heading of each column.
        rows: values in the order of the columns; None if unknown.
        canvas: True to draw on a canvas, for thousands of marks.
    """

    name: str
    caption: str
    alt: str
    spec: dict[str, Any]
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Any, ...], ...]
    canvas: bool = False

    def records(self) -> list[dict[str, Any]]:
        """Return the rows as Vega-Lite takes them."""
        fields = [field for field, _ in self.columns]
        return [dict(zip(fields, row, strict=True)) for row in self.rows]


def vega_config(theme: Theme) -> dict[str, Any]:
    """Return the Vega-Lite config of a theme: colours of text and lines, system font, no frame."""
    colour = PALETTES[theme]
    # no ARIA roles: the surrounding figure has the name
    text = {"labelColor": colour["muted"], "titleColor": colour["ink"], "titleFontWeight": 600, "aria": False}
    return {
        "background": "transparent",
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "mark": {"aria": False},
        "point": {"color": colour["ink"]},
        "rule": {"color": colour["ink"]},
        "line": {"color": colour["ink"]},
        "tick": {"color": colour["ink"]},
        "axis": {
            **text,
            "gridColor": colour["line"],
            "domainColor": colour["line"],
            "tickColor": colour["line"],
            "labelFontSize": 12,
            "titleFontSize": 12,
            "labelLimit": 160,
        },
        "legend": {
            **text,
            "orient": "top",
            "title": None,
            "labelFontSize": 12,
            "labelLimit": 240,
            "columns": 2,
            "symbolBaseFillColor": colour["muted"],
            "symbolBaseStrokeColor": colour["muted"],
        },
        "title": {"color": colour["ink"], "anchor": "start", "frame": "group", "fontSize": 14, "aria": False},
        "range": {
            "category": [colour[f"series{number}"] for number in range(1, MOST_SERIES + 1)],
            "symbol": _SHAPES,
        },
    }


def spec_of(name: str, chart: Any, **properties: Any) -> dict[str, Any]:
    """Return the Vega-Lite spec of an Altair chart, with named data and the width of its container."""
    chart = chart.properties(data=alt.NamedData(name), width="container", **properties)
    with alt.data_transformers.enable(consolidate_datasets=False):  # page.js supplies the rows by name
        spec: dict[str, Any] = chart.to_dict()
    return {key: value for key, value in spec.items() if key not in ("$schema", "config")}


def tips(columns: Iterable[tuple[str, str]], formats: dict[str, str]) -> list[alt.Tooltip]:
    """Return a tooltip for each column, with numbers in d3 formats."""
    return [
        alt.Tooltip(f"{field}:Q", title=title, format=formats[field])
        if field in formats
        else alt.Tooltip(f"{field}:N", title=title)
        for field, title in columns
    ]


def series_colour(names: Sequence[str], field: str = "series") -> alt.Color:
    """Return the colour encoding of series, in the order of ``names``. A single series has no legend."""
    return alt.Color(f"{field}:N", **series_scale(names))


def series_shape(names: Sequence[str], field: str = "series") -> alt.Shape:
    """Return the shape encoding of series, which repeats the colours."""
    return alt.Shape(f"{field}:N", **series_scale(names))


def series_scale(names: Sequence[str]) -> dict[str, Any]:
    """Return the scale of series in an order, and whether there is a legend."""
    return {"scale": alt.Scale(domain=list(names)), **({} if len(names) > 1 else {"legend": None})}


def dots(
    name: str, heading: str, rows: list[tuple[Any, ...]], of: str, caption: str, alt_text: str, at_100: bool
) -> Chart | None:
    """Return a dot chart of values with intervals, one line per metric, or None if all values are unknown.

    Args:
        heading: title of the value axis.
        rows: (metric, series, value, low, high), and the value of chance if it is to be drawn.
        of: heading of the series.
        at_100: draw a line at 100.
    """
    known = [value for row in rows for value in row[2:] if value is not None]
    if not known:
        return None
    ends = [min(known), max(known), *([100.0] if at_100 else [])]
    fields = ("metric", "series", "value", "low", "high", "chance")
    headings = ("metric", of, heading, "95 % from", "95 % to", "chance")
    columns = tuple(zip(fields, headings, strict=True))[: len(rows[0])]
    series = list(dict.fromkeys(row[1] for row in rows))
    metrics = list(dict.fromkeys(row[0] for row in rows))
    # a fixed domain: Vega warns if a layer without rows has no extent
    axis: dict[str, Any] = {
        "title": heading,
        "scale": alt.Scale(domain=[min(ends), max(ends)], nice=True, zero=False),
        "axis": alt.Axis(tickCount=8),
    }
    place = alt.Chart().encode(
        y=alt.Y("metric:N", sort=metrics, title=None, axis=alt.Axis(ticks=False, domain=False)),
        yOffset=alt.YOffset("series:N", sort=series),
    )
    base = place.encode(color=series_colour(series))
    intervals = (
        base.transform_filter("isValid(datum.low) && isValid(datum.high)")
        .mark_rule(strokeWidth=2.5, opacity=0.75)
        .encode(x=alt.X("low:Q", **axis), x2="high:Q")
    )
    points = (
        base.transform_filter("isValid(datum.value)")
        .mark_point(filled=True, size=75, opacity=1)
        .encode(
            x=alt.X("value:Q", **axis),
            shape=series_shape(series),
            tooltip=tips(columns, dict.fromkeys(("value", "low", "high", "chance"), ".1f")),
        )
    )
    layers = [intervals, points]
    if ("chance", "chance") in columns:
        layers.insert(0, place.mark_tick(thickness=2, size=12).encode(x=alt.X("chance:Q", **axis)))
    if at_100:
        even = alt.Chart(alt.InlineData(values=[{"at": 100}]))
        layers.insert(0, even.mark_rule(strokeDash=[4, 3], strokeWidth=1.2).encode(x=alt.X("at:Q", **axis)))
    # not a step: Vega-Lite warns of steps with a container's width
    spec = spec_of(name, alt.layer(*layers), height=len(metrics) * (14 * len(series) + 10))
    return Chart(name, caption, alt_text, spec, columns, tuple(rows))


def histogram(
    name: str, title: str, series: dict[str, Distribution | None], caption: str, alt_text: str
) -> Chart | None:
    """Return overlaid histograms with the same bins, or None without data."""
    known = {label: values for label, values in series.items() if values is not None and values.count}
    if not known:
        return None
    columns = (("series", "of"), ("from", "from"), ("to", "to"), ("count", "count"), ("share", "share"))
    bars = (
        alt.Chart()
        .mark_bar(fillOpacity=0.45, strokeWidth=1, binSpacing=0)
        .encode(
            x=alt.X("from:Q", title=title, bin=alt.BinParams(binned=True), scale=alt.Scale(zero=False)),
            x2="to:Q",
            # shares: counts of images and of many more captions cannot be compared
            y=alt.Y("share:Q", title="share in a bin", stack=None, axis=alt.Axis(format="%", tickCount=4)),
            color=series_colour(list(known)),
            stroke=alt.Stroke("series:N", **series_scale(list(known))),
            tooltip=tips(columns, {"from": ".3f", "to": ".3f", "count": ",d", "share": ".1%"}),
        )
    )
    rows = [row for label, values in known.items() for row in _bins(label, values)]
    return Chart(name, caption, alt_text, spec_of(name, bars, height=190), columns, tuple(rows))


def _bins(label: str, values: Distribution) -> Iterable[tuple[Any, ...]]:
    least, greatest = values.histogram_ends
    width = (greatest - least) / len(values.histogram)
    for number, count in enumerate(values.histogram):
        start = least + number * width
        yield label, start, start + width, count, count / values.count
