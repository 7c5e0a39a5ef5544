"""The charts of a report: Vega-Lite specs that name their rows, and the rows. No torch, no browser."""

from __future__ import annotations

import json
from typing import Any

from teacher_cache.pipeline.evaluate.recall import RECALL_KS
from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult
from teacher_cache.pipeline.report.chart import (
    DASHES,
    MOST_SERIES,
    PALETTES,
    Chart,
    coloured,
    dots,
    finite,
    histogram,
    quantity,
    spec_of,
    tips,
    vega_config,
)
from teacher_cache.pipeline.report.data import ReportData, RunReport, of_other_data
from teacher_cache.storage.errors import UsageError

__all__ = ["all_charts", "main_chart", "main_chart_png", "newest_evaluations"]

_TOWERS = {"image": "image", "text": "caption"}
_DIRECTIONS = {"i2t": "image → text", "t2i": "text → image"}
_PNG_WIDTH, _PNG_SCALE = 560, 2.0


def all_charts(data: ReportData) -> dict[str, Chart]:
    """Every chart that there is data for, by its name."""
    made = (
        _retention(data),
        _teacher_recall(data),
        _pair_cosines(data),
        _tower_cosines(data),
        _norms(data),
        _map(data),
        _losses(data),
        _selection(data),
        _shipped(data),
    )
    return {chart.name: chart for chart in made if chart is not None}


def main_chart(data: ReportData) -> dict[str, Any]:
    """The one picture that sums the report up, as a whole Vega-Lite spec with its data and light colours.

    What the students retain, with intervals; without an evaluated student the teacher's recall and the cosines of true
    and random pairs; of a cache that is not sealed how far it is.
    """
    kept = _retention(data)
    found = [kept] if kept else [chart for chart in (_teacher_recall(data), _pair_cosines(data)) if chart]
    parts = [_alone(chart) for chart in found or [_progress(data)]]
    spec = parts[0] if len(parts) == 1 else {"vconcat": parts, "resolve": {"scale": {"color": "independent"}}}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        **spec,
        "config": {**vega_config("light"), "background": PALETTES["light"]["surface"]},
    }


def main_chart_png(data: ReportData) -> bytes:
    """:func:`main_chart` as a PNG, drawn without a browser.

    Raises:
        UsageError: vl-convert-python is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise UsageError("a report's charts need vl-convert-python: pip install 'teacher-cache[report]'") from error
    return bytes(vl_convert.vegalite_to_png(json.dumps(main_chart(data)), scale=_PNG_SCALE))


def newest_evaluations(run: RunReport, manifest_digest: str) -> list[EvaluateResult]:
    """The newest evaluation of a run with a student on each split; the splits it was not chosen on first.

    Args:
        manifest_digest: of the cache that the report is of; what was measured on other data is left out.
    """
    newest: dict[str, EvaluateResult] = {}
    for found in run.evaluations:
        if found.student is not None and not of_other_data(found, manifest_digest):
            newest.setdefault(found.split, found)
    return sorted(newest.values(), key=lambda found: found.chosen_on == found.split)


def _alone(chart: Chart) -> dict[str, Any]:
    """The spec of a chart by itself: its width a number, its data in it, its colours the light ones."""

    def light(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: light(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [light(inner) for inner in value]
        if isinstance(value, str) and value.startswith("$"):
            return PALETTES["light"].get(value[1:], value)  # the name of a run may begin so, too
        return value

    spec = {key: value for key, value in chart.spec.items() if key != "width"}
    title = {"text": chart.alt, "subtitle": [], "offset": 12}
    # rows are not spoken to: a caption that begins with a dollar sign is no colour
    return {"title": title, "width": _PNG_WIDTH, **light(spec), "data": {"values": chart.records()}}


def _metric_rows(series: str, values: dict[str, Any], intervals: Any) -> list[tuple[Any, ...]]:
    """A row for each of the six numbers and their mean, where there is one."""
    rows = []
    for direction, words in _DIRECTIONS.items():
        for name in (f"R@{k}" for k in RECALL_KS):
            between = getattr(intervals, direction)[name] if intervals is not None else None
            rows.append((f"{words} {name}", series, values[direction].get(name), between))
    if "mean" in values:
        rows.append(("mean recall", series, values["mean"], intervals.mean if intervals is not None else None))
    return [
        (metric, of, value, between.low if between else None, between.high if between else None)
        for metric, of, value, between in rows
    ]


def _retention(data: ReportData) -> Chart | None:
    found = [(run, each) for run in data.runs for each in newest_evaluations(run, data.info.manifest_digest)]
    if not found:
        return None
    rows: list[tuple[Any, ...]] = []
    chosen = False
    for run, each in found[:MOST_SERIES]:
        assert each.retention is not None  # there is a student
        mark = " *" if each.chosen_on == each.split else ""
        chosen = chosen or bool(mark)
        rows += _metric_rows(f"{run.name}, {each.split}{mark}", each.retention, each.retention_intervals)
    caption = (
        "Share of the teacher's recall that each student keeps, with its 95 % interval over images; at the dashed line "
        "student and teacher are even."
    )
    if chosen:
        caption += " * The checkpoint was chosen on this very split: no test result."
    if len(found) > MOST_SERIES:
        caption += f" {MOST_SERIES} of {len(found)} evaluations."
    return dots(
        "retention", "% of the teacher's", rows, "student", caption, "What the students keep of the teacher", True
    )


def _teacher_recall(data: ReportData) -> Chart | None:
    rows: list[tuple[Any, ...]] = []
    caption = "Recall of the teacher's own embeddings in percent; any caption of an image counts."
    recall = data.stats.recall if data.stats else None
    if recall is not None:
        of = f"among {recall.images:,} images"
        rows += _metric_rows(of, recall.model_dump(), None)
        caption += f" {recall.images:,} images that were read and their {recall.captions:,} captions"
        caption += " are each other's gallery."
    seen: set[str] = set()
    for run in data.runs:
        for each in run.evaluations:
            # of other bytes than these it would be another teacher's, or other rows
            if each.split not in seen and each.cache_manifest_digest == data.info.manifest_digest:
                if len(seen) + 1 < MOST_SERIES:
                    rows += _metric_rows(
                        f"split {each.split}, {each.images:,} images", each.teacher, each.teacher_intervals
                    )
                seen.add(each.split)
    if not rows:
        return None
    if seen:
        caption += " Splits are galleries of their own, with 95 % intervals over images; larger galleries are harder."
    return dots("teacher", "recall, %", rows, "gallery", caption, "The teacher's recall", False)


def _pair_cosines(data: ReportData) -> Chart | None:
    stats = data.stats
    if stats is None:
        return None
    apart = (
        ""
        if stats.separation is None
        else f" A true pair has the greater cosine with probability {stats.separation:.4f}."
    )
    return histogram(
        "pairs",
        "cosine of image and caption",
        [("true pairs", "$image", stats.true_pairs), ("random pairs", "$text", stats.random_pairs)],
        f"Cosines of captions with their own image and with a random other one, in 20 bins each.{apart}",
        "Cosines of true and random pairs",
    )


def _tower_cosines(data: ReportData) -> Chart | None:
    stats = data.stats
    if stats is None:
        return None
    return histogram(
        "cosines",
        "cosine of two random rows",
        [("two images", "$image", stats.image.cosine), ("two captions", "$text", stats.text.cosine)],
        "How close two random rows of one tower are: what all embeddings share, they share for nothing.",
        "Cosines within each tower",
    )


def _norms(data: ReportData) -> Chart | None:
    stats = data.stats
    if stats is None:
        return None
    return histogram(
        "norms",
        "norm before normalising",
        [("images", "$image", stats.image.norm), ("captions", "$text", stats.text.norm)],
        "Length of the teacher's output before it was normalised. Outliers are worth a look.",
        "Norms of both towers",
    )


def _map(data: ReportData) -> Chart | None:
    if data.row_map is None or not data.row_map.points:
        return None
    points = data.row_map.points
    images = sum(point.tower == "image" for point in points)
    columns = (
        ("index", "point"),
        ("x", "x"),
        ("y", "y"),
        ("tower", "tower"),
        ("row", "row"),
        ("label", "caption or sample_id"),
        ("split", "split"),
        ("picture", "row of its image"),
    )
    rows = tuple(
        (at, round(p.x, 4), round(p.y, 4), _TOWERS[p.tower], p.row, p.label, p.split, p.image_row)
        for at, p in enumerate(points)
    )
    names = list(_TOWERS.values())
    look = {
        "color": {"field": "tower", "type": "nominal", "scale": {"domain": names, "range": ["$image", "$text"]}},
        "shape": {"field": "tower", "type": "nominal", "scale": {"domain": names, "range": ["circle", "triangle-up"]}},
    }
    place = {axis: quantity(axis, None, axis=None, scale=_whole([getattr(p, axis) for p in points])) for axis in "xy"}
    small = 26 if len(points) > 1500 else 48
    # with and without something searched for: hits stand out, the rest steps back
    found = "query != '' && indexof(lower(datum.label), query) >= 0"
    spec = spec_of(
        "map",
        height=460,
        params=[
            {"name": "query", "value": ""},
            {"name": "split", "value": ""},
            {"name": "tower", "value": ""},
            {"name": "chosen", "value": -1},
        ],
        transform=[{"filter": "(split == '' || datum.split == split) && (tower == '' || datum.tower == tower)"}],
        layer=[
            {
                "name": "points",
                "params": [
                    {
                        "name": "window",
                        "select": {"type": "interval", "zoom": "wheel![event.ctrlKey || event.shiftKey]"},
                        "bind": "scales",
                    }
                ],
                "mark": {"type": "point", "filled": True},
                "encoding": {
                    **place,
                    **look,
                    "opacity": {"condition": {"test": f"query == '' || ({found})", "value": 0.75}, "value": 0.12},
                    "size": {"condition": {"test": found, "value": 3 * small}, "value": small},
                },
            },
            {
                "transform": [{"filter": "datum.index == chosen"}],
                "mark": {"type": "point", "size": 340, "stroke": "$ink", "strokeWidth": 2.5, "shape": "circle"},
                "encoding": place,
            },
        ],
    )
    of = "" if images == data.row_map.images_of else f" of {data.row_map.images_of:,}"
    caption = f"{images:,}{of} images and {len(points) - images:,} captions. {data.row_map.method}"
    return Chart("map", caption, "Map of images and captions", spec, columns, rows, canvas=True)


def _whole(values: list[float]) -> dict[str, Any]:
    """A scale on which all values have some room: the same whatever is filtered."""
    least, greatest = min(values), max(values)
    room = 0.04 * (greatest - least) or 1.0
    return {"domain": [least - room, greatest + room], "nice": False, "zero": False}


def _losses(data: ReportData) -> Chart | None:
    rows: list[tuple[Any, ...]] = []
    runs = [run for run in data.runs if run.steps]
    for run in runs[:MOST_SERIES]:
        for step in run.steps:
            values = {"total": step.loss, **step.parts}
            rows += [(run.name, part, step.step, step.epoch, finite(value)) for part, value in values.items()]
    # a part that is never finite has no axis
    parts = list(dict.fromkeys(row[1] for row in rows if row[-1] is not None))
    rows = [row for row in rows if row[1] in parts]
    if not rows:
        return None
    columns = (("run", "student"), ("part", "loss"), ("step", "step"), ("epoch", "epoch"), ("value", "value"))
    names = [run.name for run in runs[:MOST_SERIES]]
    dash: dict[str, Any] = {
        "field": "run",
        "type": "nominal",
        "scale": {"domain": names, "range": DASHES[: len(names)]},
    }
    if len(names) == 1:
        dash["legend"] = None
    spec = spec_of(
        "losses",
        height=220,
        params=[{"name": "part", "value": parts[0]}, {"name": "above0", "value": False}],
        transform=[{"filter": "datum.part == part && (!above0 || datum.value > 0)"}],
        mark={"type": "line", "strokeWidth": 1.6},
        encoding={
            "x": quantity("step", "step"),
            "y": quantity("value", "loss", scale={"type": "linear", "zero": False}),
            "color": coloured(names, "run")["color"],
            "strokeDash": dash,
            "tooltip": tips(columns, {"value": ".4f"}),
        },
    )
    steps, of = sum(len(run.steps) for run in runs[:MOST_SERIES]), sum(run.steps_of for run in runs[:MOST_SERIES])
    caption = f"{steps:,} of {of:,} steps, evenly spaced." if steps < of else f"All {steps:,} steps."
    caption += " A gap is a loss that was not finite." if any(row[-1] is None for row in rows) else ""
    caption += _of_runs(len(runs))
    return Chart("losses", caption, "Loss by step", spec, columns, tuple(rows))


def _of_runs(count: int) -> str:
    return f" {MOST_SERIES} of {count} students." if count > MOST_SERIES else ""


def _selection(data: ReportData) -> Chart | None:
    runs = [run for run in data.runs if any(epoch.selection for epoch in run.record.epochs)]
    rows = tuple(
        (
            run.name,
            epoch.epoch,
            epoch.selection.split,
            epoch.selection.mean_recall,
            "kept" if run.record.best and run.record.best.epoch == epoch.epoch else "",
        )
        for run in runs[:MOST_SERIES]
        for epoch in run.record.epochs
        if epoch.selection
    )
    if not rows:
        return None
    columns = (
        ("run", "student"),
        ("epoch", "epoch"),
        ("split", "split"),
        ("recall", "mean recall, %"),
        ("best", "best"),
    )
    names = [run.name for run in runs[:MOST_SERIES]]
    look = coloured(names, "run")
    place = {
        "x": quantity("epoch", "epoch", axis={"tickMinStep": 1, "format": "d"}, scale={"zero": False}),
        "y": quantity("recall", "mean recall, %", scale={"zero": False}),
        "color": look["color"],
    }
    spec = spec_of(
        "selection",
        height=220,
        layer=[
            {"mark": {"type": "line", "strokeWidth": 1.4, "opacity": 0.7}, "encoding": place},
            {
                "mark": {"type": "point", "filled": True, "size": 55, "opacity": 1},
                "encoding": {**place, "shape": look["shape"], "tooltip": tips(columns, {"recall": ".1f"})},
            },
            {
                "transform": [{"filter": "datum.best == 'kept'"}],
                "mark": {"type": "point", "size": 260, "strokeWidth": 2, "shape": "circle", "filled": False},
                "encoding": place,
            },
        ],
    )
    splits = ", ".join(dict.fromkeys(row[2] for row in rows))
    caption = f"Mean of the six recalls behind each epoch on split {splits}; the ring is the epoch that was kept."
    return Chart("selection", caption + _of_runs(len(runs)), "Recall by epoch", spec, columns, rows)


def _shipped(data: ReportData) -> Chart | None:
    columns = (
        ("name", "model"),
        ("rate", "images/s"),
        ("kept", "% of the teacher's mean recall"),
        ("low", "95 % from"),
        ("high", "95 % to"),
        ("megabytes", "MB"),
    )
    rows: list[tuple[Any, ...]] = []
    for table in data.deployments:
        for row in table.rows:
            name = f"{table.student}: {row.name}" if len(data.deployments) > 1 else row.name
            kept = row.retention.mean if row.retention else None
            share = kept.share if kept else 100.0  # the teacher keeps all of itself
            between = kept.interval if kept else None
            ends = (between.low, between.high) if between else (None, None)
            rate = row.cost.images[max(row.cost.images)].per_second
            rows.append((name, rate, share, *ends, row.bytes / 1e6))
    if not rows:
        return None
    names = list(dict.fromkeys(row[0] for row in rows))[:MOST_SERIES]
    shown = tuple(row for row in rows if row[0] in names)
    look = coloured(names, "name")
    x = {"x": quantity("rate", "images/s, largest batch", scale={"zero": True})}
    y = {"title": "% of the teacher's mean recall", "scale": {"zero": False}}
    spec = spec_of(
        "shipped",
        height=250,
        layer=[
            {
                "transform": [{"filter": "isValid(datum.low)"}],
                "mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.75},
                "encoding": {**x, "y": {**quantity("low", None), **y}, "y2": {"field": "high"}, "color": look["color"]},
            },
            {
                "mark": {"type": "point", "filled": True, "opacity": 1},
                "encoding": {
                    **x,
                    "y": {**quantity("kept", None), **y},
                    **look,
                    "size": quantity("megabytes", "MB", scale={"range": [50, 420]}, legend=None),
                    "tooltip": tips(
                        columns, {"rate": ",.0f", "kept": ".1f", "low": ".1f", "high": ".1f", "megabytes": ".1f"}
                    ),
                },
            },
        ],
    )
    caption = "Up and to the right is better, with 95 % intervals; larger marks are larger files."
    if len(shown) < len(rows):
        caption += f" {len(shown)} of {len(rows)} models."
    return Chart("shipped", caption, "Recall, speed and size of each model", spec, columns, shown)


def _progress(data: ReportData) -> Chart:
    columns = (("part", "part"), ("done", "chunks committed, %"))
    rows = tuple(
        (
            f"images, view {part.view}" if part.tower == "image" else "captions",
            100 * part.chunks_committed / part.chunks if part.chunks else 100.0,
        )
        for part in data.info.coverage
    )
    spec = spec_of(
        "progress",
        height=26 * len(rows),
        mark={"type": "bar", "color": "$image"},
        encoding={
            "y": {"field": "part", "type": "nominal", "sort": None, "title": None},
            "x": quantity("done", "chunks committed, %", scale={"domain": [0, 100]}),
        },
    )
    return Chart("progress", "", "How far the cache is", spec, columns, rows)
