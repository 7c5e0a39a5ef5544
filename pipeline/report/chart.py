"""A chart as Vega-Lite takes it, the colours of both themes, and the forms that several charts share.

A spec says ``$image`` where it means a colour of the theme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from teacher_cache.storage.look.stats import Distribution

__all__ = [
    "DASHES",
    "MOST_SERIES",
    "PALETTES",
    "Chart",
    "Theme",
    "coloured",
    "dots",
    "finite",
    "histogram",
    "quantity",
    "spec_of",
    "tips",
    "vega_config",
]

Theme = Literal["light", "dark"]

# after Okabe & Ito 2008, "Color Universal Design", darker or lighter until each has a contrast of 3:1 to its ground;
# text has 4.5:1 and more. Shapes and dashes say the same as the colours.
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
        "image": "#0072b2",
        "text": "#c65500",
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
        "image": "#58b3ec",
        "text": "#f2975a",
        "series1": "#58b3ec",
        "series2": "#f2975a",
        "series3": "#46c9a0",
        "series4": "#e29ac7",
        "series5": "#e2c44b",
        "series6": "#bcbcbc",
    },
}

_SERIES = [f"$series{number}" for number in range(1, 7)]
_SHAPES = ["circle", "triangle-up", "square", "diamond", "cross", "triangle-down"]
DASHES = [[1, 0], [6, 3], [2, 2], [8, 2, 2, 2], [12, 3], [4, 1]]
MOST_SERIES = len(_SERIES)


@dataclass(frozen=True)
class Chart:
    """A picture of some rows.

    Attributes:
        name: of the chart, and of its rows in the spec.
        caption: what it shows, of how many; below it.
        alt: what it is, for who does not see it.
        spec: Vega-Lite, with ``data: {"name": name}``.
        columns: field and heading of each column.
        rows: values in the order of the columns; None is not known.
    """

    name: str
    caption: str
    alt: str
    spec: dict[str, Any]
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Any, ...], ...]
    canvas: bool = False

    def records(self) -> list[dict[str, Any]]:
        """The rows as Vega-Lite takes them."""
        fields = [field for field, _ in self.columns]
        return [dict(zip(fields, row, strict=True)) for row in self.rows]


def vega_config(theme: Theme) -> dict[str, Any]:
    """Vega-Lite's config of a theme: colours of text and lines, the system's font, nothing around the plot."""
    colour = PALETTES[theme]
    # without roles of their own: the figure around it has the name, and thousands of nameless marks help nobody
    text = {"labelColor": colour["muted"], "titleColor": colour["ink"], "titleFontWeight": 600, "aria": False}
    return {
        "background": "transparent",
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "mark": {"aria": False},
        "axis": {
            **text,
            "gridColor": colour["line"],
            "domainColor": colour["line"],
            "tickColor": colour["line"],
            "labelFontSize": 12,
            "titleFontSize": 12,
            "labelLimit": 160,
        },
        "legend": {**text, "orient": "top", "title": None, "labelFontSize": 12, "labelLimit": 240, "columns": 2},
        "title": {"color": colour["ink"], "anchor": "start", "frame": "group", "fontSize": 14, "aria": False},
        "range": {"category": [colour[name[1:]] for name in _SERIES]},
    }


def spec_of(name: str, **parts: Any) -> dict[str, Any]:
    """A spec of the width that there is, on the rows of that name."""
    return {"data": {"name": name}, "width": "container", **parts}


def finite(value: float | None) -> float | None:
    """JSON has no NaN; a loss may be one."""
    return value if value is not None and math.isfinite(value) else None


def quantity(field: str, title: str | None, **more: Any) -> dict[str, Any]:
    """An encoding by a numeric field."""
    return {"field": field, "type": "quantitative", "title": title, **more}


def tips(columns: Iterable[tuple[str, str]], formats: dict[str, str]) -> list[dict[str, Any]]:
    """What hovering shows: columns by their headings, numbers in d3's formats."""
    return [
        {
            "field": field,
            "title": title,
            **({"type": "quantitative", "format": formats[field]} if field in formats else {"type": "nominal"}),
        }
        for field, title in columns
    ]


def coloured(names: Sequence[str], field: str = "series", legend: bool | None = None) -> dict[str, Any]:
    """Colour and shape by name, in the order given."""
    shown: dict[str, Any] = {} if (len(names) > 1 if legend is None else legend) else {"legend": None}
    names = list(names)
    base = {"field": field, "type": "nominal", **shown}
    return {
        "color": {**base, "scale": {"domain": names, "range": _SERIES[: len(names)]}},
        "shape": {**base, "scale": {"domain": names, "range": _SHAPES[: len(names)]}},
    }


def dots(
    name: str, heading: str, rows: list[tuple[Any, ...]], of: str, caption: str, alt: str, at_100: bool
) -> Chart | None:
    """Numbers with their intervals, a line per metric; rows are (metric, series, value, low, high).

    None where no number is known.
    """
    known = [value for row in rows for value in row[2:] if value is not None]
    if not known:
        return None
    ends = [min(known), max(known), *([100.0] if at_100 else [])]
    columns = (
        ("metric", "metric"),
        ("series", of),
        ("value", heading),
        ("low", "95 % from"),
        ("high", "95 % to"),
    )
    series = list(dict.fromkeys(row[1] for row in rows))
    metrics = list(dict.fromkeys(row[0] for row in rows))
    metric = {
        "field": "metric",
        "type": "nominal",
        "sort": metrics,
        "title": None,
        "axis": {"ticks": False, "domain": False},
    }
    place = {"y": metric, "yOffset": {"field": "series", "type": "nominal", "sort": series}}
    look = coloured(series)
    # a domain by itself: a layer may have no rows, and Vega warns of what has no extent
    x = {"scale": {"domain": [min(ends), max(ends)], "nice": True, "zero": False}, "axis": {"tickCount": 8}}
    layers: list[dict[str, Any]] = []
    if at_100:
        line = {"type": "rule", "color": "$ink", "strokeDash": [4, 3], "strokeWidth": 1.2}
        layers.append(
            {"data": {"values": [{"at": 100}]}, "mark": line, "encoding": {"x": quantity("at", heading, **x)}}
        )
    layers += [
        {
            "transform": [{"filter": "isValid(datum.low) && isValid(datum.high)"}],
            "mark": {"type": "rule", "strokeWidth": 2.5, "opacity": 0.75},
            "encoding": {**place, "x": quantity("low", heading, **x), "x2": {"field": "high"}, "color": look["color"]},
        },
        {
            "transform": [{"filter": "isValid(datum.value)"}],
            "mark": {"type": "point", "filled": True, "size": 75, "opacity": 1},
            "encoding": {
                **place,
                "x": quantity("value", heading, **x),
                **look,
                "tooltip": tips(columns, {"value": ".1f", "low": ".1f", "high": ".1f"}),
            },
        },
    ]
    # a number, not a step: Vega-Lite warns of steps where the width is the container's
    spec = spec_of(name, height=len(metrics) * (14 * len(series) + 10), layer=layers)
    return Chart(name, caption, alt, spec, columns, tuple(rows))


def histogram(
    name: str, title: str, found: Sequence[tuple[str, str, Distribution | None]], caption: str, alt: str
) -> Chart | None:
    """Histograms laid over each other; found are (series, colour, distribution)."""
    there = [(series, colour, each) for series, colour, each in found if each is not None and each.count]
    if not there:
        return None
    columns = (("series", "of"), ("from", "from"), ("to", "to"), ("count", "count"), ("share", "share"))
    rows: list[tuple[Any, ...]] = []
    for series, _, each in there:
        least, greatest = each.least, each.greatest
        if least == greatest:  # numpy's bins of equal numbers
            least, greatest = least - 0.5, greatest + 0.5
        width = (greatest - least) / len(each.histogram)
        for number, count in enumerate(each.histogram):
            start = least + number * width
            rows.append((series, start, start + width, count, count / each.count))
    colour = {
        "field": "series",
        "type": "nominal",
        "scale": {"domain": [series for series, _, _ in there], "range": [colour for _, colour, _ in there]},
    }
    spec = spec_of(
        name,
        height=190,
        mark={"type": "bar", "fillOpacity": 0.45, "strokeWidth": 1, "binSpacing": 0},
        encoding={
            "x": quantity("from", title, bin={"binned": True}, scale={"zero": False}),
            "x2": {"field": "to"},
            # of so many images and many more captions: counts would not compare
            "y": quantity("share", "share in a bin", stack=None, axis={"format": "%", "tickCount": 4}),
            "color": colour,
            "stroke": colour,
            "tooltip": tips(columns, {"from": ".3f", "to": ".3f", "count": ",d", "share": ".1%"}),
        },
    )
    return Chart(name, caption, alt, spec, columns, tuple(rows))
