"""The charts of a report, and its main chart as a picture. No torch, no browser."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import altair as alt

from teacher_cache.pipeline.evaluate.recall import RECALL_KS, chance_recall, mean_recall
from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult
from teacher_cache.pipeline.report.chart import (
    MOST_SERIES,
    PALETTES,
    Chart,
    dots,
    histogram,
    series_colour,
    series_scale,
    series_shape,
    spec_of,
    tips,
    vega_config,
)
from teacher_cache.pipeline.report.data import MapPoint, ReportData, RunReport, of_other_data
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.identity import DatasetIdentity

_TOWERS = {"image": "image", "text": "caption"}
_DIRECTIONS = {"i2t": "image → text", "t2i": "text → image"}
_OTHERS = "other"
_WHOLE_NUMBERS = alt.Axis(tickMinStep=1, tickCount=8, format=",d")
_PNG_WIDTH, _PNG_SCALE = 560, 2.0
# what page.js sets on the map: chosen is a point, linked the row of its image
_MAP_SETTINGS = {"query": "", "split": "", "tower": "", "chosen": -1, "linked": -1}


def all_charts(data: ReportData) -> dict[str, Chart]:
    """Return all charts that have data, by name."""
    made = (
        _retention(data),
        _teacher_recall(data),
        _compared(data),
        *_distributions(data),
        _map(data),
        _losses(data),
        _selection(data),
        _shipped(data),
    )
    return {chart.name: chart for chart in made if chart is not None}


def main_chart(data: ReportData) -> dict[str, Any]:
    """Return the chart that summarizes the report: a complete Vega-Lite spec with its data, in light colours.

    It shows the students' retention. Without an evaluated student it shows the teacher's recall and the cosines of true
    and random pairs, or for a cache of prompts the cosines within each tower.

    Raises:
        UsageError: the cache is not sealed, or holds no embedding.
    """
    retention = _retention(data)
    charts = [retention] if retention else [_teacher_recall(data), *_distributions(data)]
    parts = [_alone(chart) for chart in charts if chart][:2]
    if not parts:
        raise UsageError(f"{data.location}: no embedding to draw")
    spec = parts[0] if len(parts) == 1 else {"vconcat": parts, "resolve": {"scale": {"color": "independent"}}}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        **spec,
        "config": {**vega_config("light"), "background": PALETTES["light"]["surface"]},
    }


def main_chart_png(data: ReportData) -> bytes:
    """Return :func:`main_chart` as a PNG, drawn without a browser."""
    import vl_convert

    return bytes(vl_convert.vegalite_to_png(json.dumps(main_chart(data)), scale=_PNG_SCALE))


def newest_evaluations(run: RunReport, manifest_digest: str) -> list[EvaluateResult]:
    """Return the newest evaluation of a run's student on each split; a split that it was chosen on comes last.

    Evaluations on captions of one kind are left out: their recall is not that of the split.

    Args:
        manifest_digest: manifest digest of the report's cache; evaluations on other data are left out.
    """
    newest: dict[str, EvaluateResult] = {}
    for evaluation in run.evaluations:
        whole = evaluation.student is not None and evaluation.caption_kind is None
        if whole and not of_other_data(evaluation, manifest_digest):
            newest.setdefault(evaluation.split, evaluation)
    return sorted(newest.values(), key=lambda evaluation: evaluation.chosen_on == evaluation.split)


def _alone(chart: Chart) -> dict[str, Any]:
    """Return a chart's spec with a title, a fixed width and its data."""
    title = {"text": chart.alt, "subtitle": [], "offset": 12}
    return {"title": title, **chart.spec, "width": _PNG_WIDTH, "data": {"values": chart.records()}}


def _metric_rows(series: str, values: dict[str, Any], intervals: Any) -> list[tuple[Any, ...]]:
    """Return a row for the mean recall, and for each of the six recalls."""
    rows = [("mean recall", values["mean"], intervals.mean if intervals is not None else None)]
    for direction, words in _DIRECTIONS.items():
        for name in (f"R@{k}" for k in RECALL_KS):
            between = getattr(intervals, direction)[name] if intervals is not None else None
            rows.append((f"{words} {name}", values[direction].get(name), between))
    return [
        (metric, series, value, between.low if between else None, between.high if between else None)
        for metric, value, between in rows
    ]


def _recall_rows(
    series: str, recalls: dict[str, Any], intervals: Any, images: int, captions: int
) -> list[tuple[Any, ...]]:
    """Return the metric rows of a gallery's recalls, each with the value of chance."""
    known, chance = ({**values, "mean": mean_recall(values)} for values in (recalls, chance_recall(images, captions)))
    rows = zip(_metric_rows(series, known, intervals), _metric_rows(series, chance, None), strict=True)
    return [(*row, by_chance[2]) for row, by_chance in rows]


def _retention(data: ReportData) -> Chart | None:
    measured = [(run, result) for run in data.runs for result in newest_evaluations(run, data.info.manifest_digest)]
    if not measured:
        return None
    rows: list[tuple[Any, ...]] = []
    chosen = False
    for run, result in measured[:MOST_SERIES]:
        assert result.retention is not None  # there is a student
        mark = " *" if result.chosen_on == result.split else ""
        chosen = chosen or bool(mark)
        rows += _metric_rows(f"{run.name}, {result.split}{mark}", result.retention, result.retention_intervals)
    caption = (
        "Share of the teacher's recall that each student keeps, with its 95 % interval over images; at the dashed line "
        "student and teacher are even."
    )
    if chosen:
        caption += " * The checkpoint was chosen on this very split: no test result."
    if len(measured) > MOST_SERIES:
        caption += f" {MOST_SERIES} of {len(measured)} evaluations."
    return dots(
        "retention", "% of the teacher's", rows, "student", caption, "What the students keep of the teacher", True
    )


def _teacher_recall(data: ReportData) -> Chart | None:
    rows: list[tuple[Any, ...]] = []
    caption = (
        "Recall of the teacher's own embeddings in percent; any caption of an image counts. The upright dash is chance."
    )
    recall = data.recall
    if recall is not None:
        of = f"among {recall.images:,} images"
        recalls = recall.model_dump(include=set(_DIRECTIONS))
        rows += _recall_rows(of, recalls, None, recall.images, recall.captions)
        caption += f" {recall.images:,} images that were read and their {recall.captions:,} captions"
        caption += " are each other's gallery."
    seen: set[str] = set()
    for run in data.runs:
        for result in run.evaluations:
            # another digest means another teacher or other rows
            if result.split in seen or result.caption_kind is not None:
                continue
            if result.cache_manifest_digest == data.info.manifest_digest:
                if len(seen) + 1 < MOST_SERIES:
                    series = f"split {result.split}, {result.images:,} images"
                    rows += _recall_rows(
                        series, result.teacher, result.teacher_intervals, result.images, result.captions
                    )
                seen.add(result.split)
    if not rows:
        return None
    if seen:
        caption += " Splits are galleries of their own, with 95 % intervals over images; larger galleries are harder."
    return dots("teacher", "recall, %", rows, "gallery", caption, "The teacher's recall", False)


def _compared(data: ReportData) -> Chart | None:
    compared = data.compared
    if compared is None:
        return None
    rows: list[tuple[Any, ...]] = []
    for one in compared.teachers:
        rows.append((one.cache, "its students", one.student.value, one.student.low, one.student.high, compared.chance))
        rows.append((one.cache, "the teacher", one.recall, None, None, compared.chance))
    caption = (
        f"Mean recall of {compared.seeds} students of each teacher on {compared.images:,} images of "
        f"{compared.measured_split}, each {compared.student} after {compared.epochs} epochs over "
        f"{compared.learned_images:,} images, with the 95 % interval over images and seeds. The upright dash is "
        f"chance. Ahead: {compared.choice}"
    )
    caption += f", but not certainly better than {', '.join(compared.rivals)}." if compared.rivals else ", certainly."
    return dots("compared", "mean recall, %", rows, "model", caption, "Which teacher teaches best", False)


def _distributions(data: ReportData) -> list[Chart | None]:
    """Return the histograms: cosines of pairs, cosines within each tower, norms."""
    stats = data.stats
    if stats is None:
        return []
    apart = ""
    if stats.separation is not None:
        apart = f" A true pair has the greater cosine with probability {stats.separation:.4f}."
    return [
        histogram(
            "pairs",
            "cosine of image and caption",
            {"true pairs": stats.true_pairs, "random pairs": stats.random_pairs},
            f"Cosines of captions with their own image and with a random other one.{apart}",
            "Cosines of true and random pairs",
        ),
        histogram(
            "cosines",
            "cosine of two random rows",
            {"two images": stats.image.cosine, "two captions": stats.text.cosine},
            "How close two random rows of one tower are. What all embeddings share says nothing about a pair.",
            "Cosines within each tower",
        ),
        *(
            histogram(
                f"{tower}_norms",
                "norm before normalising",
                {of: norm},
                f"Length of the teacher's output for {of} before it was normalised. Outliers are worth a look.",
                f"Norms of {of}",
            )
            for tower, of, norm in (("image", "images", stats.image.norm), ("text", "captions", stats.text.norm))
        ),
    ]


def _map(data: ReportData) -> Chart | None:
    if data.row_map is None or not data.row_map.points:
        return None
    points = data.row_map.points
    images = sum(point.tower == "image" for point in points)
    by, groups = _groups(points)
    columns = (
        ("index", "point"),
        ("x", "x"),
        ("y", "y"),
        ("tower", "tower"),
        ("row", "row"),
        ("label", "caption or sample_id"),
        ("split", "split"),
        ("picture", "row of its image"),
        ("group", by),
    )
    rows = tuple(
        (at, round(p.x, 4), round(p.y, 4), _TOWERS[p.tower], p.row, p.label, p.split, p.image_row, groups[at])
        for at, p in enumerate(points)
    )
    names = sorted(set(groups), key=lambda name: (name == _OTHERS, -groups.count(name)))
    small = 26 if len(points) > 1500 else 48
    # emphasize hits of the search
    hit = "query != '' && indexof(lower(datum.label), query) >= 0"
    place: dict[str, Any] = {
        axis: channel(f"{axis}:Q", title=None, axis=None, scale=_whole([getattr(point, axis) for point in points]))
        for axis, channel in (("x", alt.X), ("y", alt.Y))
    }
    base = alt.Chart().encode(**place)
    window = alt.selection_interval(name="window", bind="scales", zoom="wheel![event.ctrlKey || event.shiftKey]")
    marks = (
        base.mark_point(filled=True)
        .encode(
            color=alt.Color("group:N", scale=alt.Scale(domain=names), sort=names),
            shape=series_shape(list(_TOWERS.values()), "tower"),
            opacity=alt.condition(f"query == '' || ({hit})", alt.value(0.75), alt.value(0.12)),
            size=alt.condition(hit, alt.value(3 * small), alt.value(small)),
        )
        .properties(name="points")
        .add_params(window)
    )
    ring = base.transform_filter("datum.index == chosen").mark_point(size=340, strokeWidth=2.5, shape="circle")
    settings = [alt.param(name=name, value=value) for name, value in _MAP_SETTINGS.items()]
    pair = base.transform_filter("datum.picture == linked").mark_line(strokeWidth=1.5)
    shown = alt.layer(pair, marks, ring).add_params(*settings)
    shown = shown.transform_filter("(split == '' || datum.split == split) && (tower == '' || datum.tower == tower)")
    spec = spec_of("map", shown, height=460)
    of = "" if images == data.row_map.images_of else f" of {data.row_map.images_of:,}"
    caption = (
        f"{images:,}{of} images and {len(points) - images:,} captions, coloured by {by}; a line joins the one pointed "
        f"at with the other half of its pair. {data.row_map.method}"
    )
    return Chart("map", caption, "Map of images and captions", spec, columns, rows, canvas=True)


def _groups(points: tuple[MapPoint, ...]) -> tuple[str, list[str]]:
    """Return what tells most of the points apart by colour, class, split or tower, and the group of each point."""
    choices = {
        "class": [point.class_name for point in points],
        "split": [point.split for point in points],
        "tower": [_TOWERS[point.tower] for point in points],
    }
    by = next((by for by, groups in choices.items() if len(set(groups)) > 1), "split")
    groups = choices[by]
    if len(set(groups)) > MOST_SERIES:
        largest = {name for name, _ in Counter(groups).most_common(MOST_SERIES - 1)}
        groups = [name if name in largest else _OTHERS for name in groups]
    return by, groups


def _whole(values: list[float]) -> alt.Scale:
    """Return a scale over all values with a margin, independent of filters."""
    least, greatest = min(values), max(values)
    room = 0.04 * (greatest - least) or 1.0
    return alt.Scale(domain=[least - room, greatest + room], nice=False, zero=False)


def _losses(data: ReportData) -> Chart | None:
    rows: list[tuple[Any, ...]] = []
    runs = [run for run in data.runs if run.steps]
    for run in runs[:MOST_SERIES]:
        for step in run.steps:
            values = {"total": step.loss, **step.parts}
            # JSON has no NaN
            finite = {part: value if math.isfinite(value) else None for part, value in values.items()}
            rows += [(run.name, part, step.step, step.epoch + 1, value) for part, value in finite.items()]
    # a loss that is never finite has no axis
    parts = list(dict.fromkeys(row[1] for row in rows if row[-1] is not None))
    rows = [row for row in rows if row[1] in parts]
    if not rows:
        return None
    columns = (("run", "student"), ("part", "loss"), ("step", "step"), ("epoch", "epoch"), ("value", "value"))
    names = [run.name for run in runs[:MOST_SERIES]]
    lines = (
        alt.Chart()
        .mark_line(strokeWidth=1.6)
        .encode(
            x=alt.X("step:Q", title="step", axis=_WHOLE_NUMBERS),
            y=alt.Y("value:Q", title="loss", scale=alt.Scale(type="linear", zero=False)),
            color=series_colour(names, "run"),
            strokeDash=alt.StrokeDash("run:N", **series_scale(names)),
            tooltip=tips(columns, {"value": ".4f"}),
        )
        .add_params(alt.param(name="part", value=parts[0]), alt.param(name="above0", value=False))
        .transform_filter("datum.part == part && (!above0 || datum.value > 0)")
    )
    spec = spec_of("losses", lines, height=220)
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
            epoch.epoch + 1,
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
    base = alt.Chart().encode(
        x=alt.X("epoch:Q", title="epoch", axis=_WHOLE_NUMBERS, scale=alt.Scale(zero=False)),
        y=alt.Y("recall:Q", title="mean recall, %", scale=alt.Scale(zero=False)),
        color=series_colour(names, "run"),
    )
    points = base.mark_point(filled=True, size=55, opacity=1).encode(
        shape=series_shape(names, "run"), tooltip=tips(columns, {"recall": ".1f"})
    )
    ring = base.transform_filter("datum.best == 'kept'").mark_point(
        size=260, strokeWidth=2, shape="circle", filled=False
    )
    layers = [base.mark_line(strokeWidth=1.4, opacity=0.7), points, ring]
    splits = ", ".join(dict.fromkeys(row[2] for row in rows))
    caption = (
        f"Mean of the six recalls after each epoch on split {splits}; the ring marks the checkpoint that was kept."
    )
    chances = {_chance(run.record.identity.dataset, row[2]) for run in runs for row in rows if row[0] == run.name}
    if len(chances) == 1 and (chance := chances.pop()) is not None:
        caption += f" Chance is {chance:.1f} %"
        near = 2 * chance > min(row[3] for row in rows)
        caption += ", the dashed line." if near else ", below this axis."
        if near:
            line = alt.Chart(alt.InlineData(values=[{"at": chance}]))
            layers.insert(0, line.mark_rule(strokeDash=[4, 3]).encode(y=alt.Y("at:Q")))
    spec = spec_of("selection", alt.layer(*layers), height=220)
    return Chart("selection", caption + _of_runs(len(runs)), "Recall by epoch", spec, columns, rows)


def _chance(dataset: DatasetIdentity, split: str) -> float | None:
    """Return the mean recall of a random order on a split, in percent, as if its images had as many captions as all."""
    images = dataset.splits.get(split)
    if not images:
        return None
    return mean_recall(chance_recall(images, round(images * dataset.captions / dataset.images)))


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
            mean = row.retention.mean if row.retention else None
            share = mean.share if mean else 100.0  # the teacher keeps all of itself
            between = mean.interval if mean else None
            ends = (between.low, between.high) if between else (None, None)
            rate = row.cost.images[max(row.cost.images)].per_second
            rows.append((name, rate, share, *ends, row.bytes / 1e6))
    if not rows:
        return None
    names = list(dict.fromkeys(row[0] for row in rows))[:MOST_SERIES]
    shown = tuple(row for row in rows if row[0] in names)
    base = alt.Chart().encode(
        x=alt.X("rate:Q", title="images/s, largest batch", axis=_WHOLE_NUMBERS, scale=alt.Scale(zero=True)),
        color=series_colour(names, "name"),
    )
    y: dict[str, Any] = {
        "title": "% of the teacher's mean recall",
        "axis": _WHOLE_NUMBERS,
        "scale": alt.Scale(zero=False),
    }
    intervals = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2, opacity=0.75)
    formats = {"rate": ",.0f", "kept": ".1f", "low": ".1f", "high": ".1f", "megabytes": ".1f"}
    points = base.mark_point(filled=True, opacity=1).encode(
        y=alt.Y("kept:Q", **y),
        shape=series_shape(names, "name"),
        size=alt.Size("megabytes:Q", title="MB", scale=alt.Scale(range=[50, 420]), legend=None),
        tooltip=tips(columns, formats),
    )
    spec = spec_of("shipped", alt.layer(intervals.encode(y=alt.Y("low:Q", **y), y2="high:Q"), points), height=250)
    caption = "Up and to the right is better, with 95 % intervals; larger marks are larger files."
    if len(shown) < len(rows):
        caption += f" {len(shown)} of {len(rows)} models."
    return Chart("shipped", caption, "Recall, speed and size of each model", spec, columns, shown)
