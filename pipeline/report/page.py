"""A report as one self-contained HTML page, without network or server. No torch.

The page has text in its HTML, and one JSON block with the charts' rows and specs and the pictures, which the page's
script reads by name. Its Content-Security-Policy allows only its own scripts, by their hashes, and forbids loading, so
that captions and paths cannot inject code.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from teacher_cache.pipeline.deploy.table import cells, describe
from teacher_cache.pipeline.evaluate.intervals import Interval
from teacher_cache.pipeline.report.chart import PALETTES, Chart, vega_config
from teacher_cache.pipeline.report.charts import all_charts, newest_evaluations
from teacher_cache.pipeline.report.data import CoverageCell, CoverageMap, ReportData, as_utf8, of_other_data
from teacher_cache.storage.cli.app import byte_size, counted
from teacher_cache.storage.look.info import CacheInfo

_HERE = Path(__file__).parent
_TABS = ("Overview", "Coverage", "Distributions", "Map", "Retrieval", "Students", "Deployment", "Problems")


def render_report(data: ReportData) -> str:
    """Return the whole page, to be written as UTF-8."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    charts = all_charts(data)
    scripts = [(_HERE / "page.js").read_text(encoding="utf-8")]
    if charts:
        scripts.append(_libraries())
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        count=lambda value: "–" if value is None else f"{value:,}",
        decimal=lambda value, digits=1: "–" if value is None else f"{value:,.{digits}f}",
        counted=counted,
        quoted=shlex.quote,
    )
    page = environment.get_template("page.html").render(
        data=data,
        info=data.info,
        stats=data.stats,
        title=_name(data.location),
        policy=_policy(scripts),
        style=Markup(_variables() + (_HERE / "page.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        block=Markup(_block(data, charts)),
        charts=charts,
        tabs=[(name.lower(), name) for name in _TABS],
        badge=_badge(data.info),
        quarantined=_quarantined(data.info),
        unread=_unread(data.info),
        facts=_facts(data),
        identity=_identity(data),
        coverage=[_covered(part) for part in data.coverage],
        evaluations=_evaluations(data),
        losses=list(dict.fromkeys(row[1] for row in charts["losses"].rows)) if "losses" in charts else [],
        splits=sorted({point.split for point in data.row_map.points}) if data.row_map else [],
        reasons=_reasons(data).most_common(),
        deployments=[_turned(*cells(table)) for table in data.deployments],
        sentences=[describe(table).splitlines() for table in data.deployments],
    )
    return as_utf8(page)


@functools.cache
def _libraries() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, with their licences."""
    import vl_convert

    script = str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
    # these would end the script early, or change the hashed bytes
    if "</script" in script.lower() or "<!--" in script or "\r" in script:
        raise RuntimeError("the bundle of this vl-convert-python cannot be put into a page as it is")
    return f"/*\n{(_HERE / 'licences.txt').read_text(encoding='utf-8')}*/\n{script}"


def _policy(scripts: list[str]) -> str:
    """Return the Content-Security-Policy: only these scripts, inline styles and data URIs for pictures."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{item}'" for item in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _variables() -> str:
    """Return the palettes as CSS variables, selected by the system's setting or the page's switch."""
    light, dark = ("".join(f"--{name}:{value};" for name, value in PALETTES[theme].items()) for theme in PALETTES)
    return (
        f":root{{color-scheme:light;{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{dark}}}}}\n"
        f"@media screen{{:root[data-theme=dark]{{color-scheme:dark;{dark}}}}}\n"
    )


def _block(data: ReportData, charts: dict[str, Chart]) -> str:
    """Return the JSON block: specs, rows by chart, pictures by row, themes."""
    content = {
        "charts": {
            name: {
                "spec": chart.spec,
                "alt": chart.alt,
                "canvas": chart.canvas,
                "fields": [field for field, _ in chart.columns],
                "headings": [heading for _, heading in chart.columns],
                "rows": chart.rows,
            }
            for name, chart in charts.items()
        },
        "pictures": data.pictures,
        "themes": {theme: vega_config(theme) for theme in PALETTES},
    }
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # escaped, so that no text can end the block or begin a tag
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _name(location: str) -> str:
    return location.rstrip("/").rpartition("/")[2] or location


def _quarantined(info: CacheInfo) -> int | None:
    """Return the number of images without an embedding, from the commit records if they were read, else the seal."""
    if info.quarantine is None:
        return info.images_quarantined
    # damaged records name no images: then the seal has more
    return max(sum(info.quarantine.values()), info.images_quarantined or 0)


def _unread(info: CacheInfo) -> bool:
    """Return whether quarantined images are not counted: too many commit records, and no seal."""
    return info.quarantine is None and not info.sealed


def _badge(info: CacheInfo) -> str:
    """Return the number of dataset problems and quarantined images for the tab; empty if there are none."""
    known = sum(info.problems.values()) + (_quarantined(info) or 0)
    if _unread(info):
        return f"{known:,}+" if known else "?"
    return f"{known:,}" if known else ""


def _reasons(data: ReportData) -> Counter[str]:
    """Count the reasons of all quarantined images, or of the shown ones if the others are unknown."""
    if data.info.quarantine is not None:
        return Counter(data.info.quarantine)
    return Counter(lost.reason.partition(":")[0] for lost in data.lost)


def _facts(data: ReportData) -> list[tuple[str, str, str]]:
    """Return the main facts: (name, number, explanation)."""
    info, facts = data.info, []
    images = info.identity.dataset.images
    if info.images_encoded is None:
        done = 100 * info.chunks_committed / info.chunks if info.chunks else 100.0
        facts.append(("Committed", f"{done:.0f} %", f"{info.chunks_committed:,} of {info.chunks:,} chunks"))
        facts.append(("Images", f"{images:,}", "in the dataset"))
    else:
        facts.append(("Images", f"{info.images_encoded:,}", f"of {images:,} have an embedding"))
    facts.append(("Captions", f"{info.identity.dataset.captions:,}", f"{info.layout.embed_dim} dimensions each"))
    facts.append(("Targets", byte_size(info.target_bytes), counted(info.layout.views, "view") + " an image"))
    recall = data.recall
    if recall is not None:
        both = f"{recall.i2t['R@1']:.1f} / {recall.t2i['R@1']:.1f} %"
        facts.append(("Teacher's R@1", both, f"image → text / text → image, {recall.images:,} images"))
    shares = [
        (run, item, item.retention["mean"])
        for run in data.runs
        for item in newest_evaluations(run, info.manifest_digest)
        if item.retention and item.retention["mean"] is not None
    ]
    # prefer splits that the checkpoint was not chosen on
    shares = [one for one in shares if one[1].chosen_on != one[1].split] or shares
    if shares:
        run, item, share = max(shares, key=lambda one: one[2])
        between = item.retention_intervals.mean if item.retention_intervals else None
        interval = f" ({between.low:.1f} to {between.high:.1f})" if between else ""
        chosen = ", chosen on it" if item.chosen_on == item.split else ""
        facts.append(("Best student keeps", f"{share:.1f} %", f"{run.name} on {item.split}{chosen}{interval}"))
    lost = _quarantined(info)
    if _unread(info):
        words = "images, of those that are sealed" if lost is not None else "the commit records were not read"
    elif info.sealed:
        words = "images without an embedding" if lost else "every image is there"
    else:
        words = "images without an embedding so far"
    facts.append(("Quarantined", "–" if lost is None else f"{lost:,}", words))
    return facts


def _identity(data: ReportData) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the identity, field by field as other commands name them, and facts of the cache: groups of values."""
    info = data.info
    groups = [
        (name, [(field, _said(value)) for field, value in fields.items() if field not in ("architecture", "probe")])
        for name, fields in info.identity.model_dump(exclude_none=True).items()
    ]
    cache = {
        "location": data.location,
        "dataset": info.dataset,
        "identity": info.identity_digest,
        "manifest": info.manifest_digest,
        "format": f"{info.format_version}",
        "encoding took": f"{info.encode_seconds:,.0f} s",
        "images": _rate(info.images_per_second),
        "captions": _rate(info.captions_per_second),
        "left, by one process": ""
        if info.sealed or info.remaining_seconds is None
        else f"{info.remaining_seconds:,.0f} s",
        "made with": _said(info.made_with),
    }
    return [*groups, ("cache", [(name, value) for name, value in cache.items() if value])]


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _rate(rows_per_second: float | None) -> str:
    return "" if rows_per_second is None else f"{rows_per_second:,.1f} /s"


def _state(cell: CoverageCell) -> str:
    if cell.committed < cell.chunks:
        return "partly" if cell.committed else "pending"
    return "quarantined" if cell.quarantined else "committed"


def _covered(part: CoverageMap) -> dict[str, Any]:
    """Return the cells of a grid: state, place and what is said of it."""
    cells: list[tuple[str, str, str]] = []
    lost = [cell.quarantined for cell in part.cells if cell.quarantined is not None]
    for cell in part.cells:
        state = _state(cell)
        last = cell.first_chunk + cell.chunks - 1
        where = f"chunk {cell.first_chunk}" if cell.chunks == 1 else f"chunks {cell.first_chunk} to {last}"
        said = state if state != "quarantined" else "committed"
        if state == "partly":
            said += f", {cell.committed} of {cell.chunks}"
        if cell.quarantined:
            said += f", {counted(cell.quarantined, 'row')} quarantined"
        cells.append((state, where, said))
    return {
        "name": f"Images, view {part.view}" if part.tower == "image" else "Captions",
        "chunks": part.chunks,
        "committed": sum(cell.committed for cell in part.cells),
        "quarantined": sum(lost) if len(lost) == len(part.cells) else None,
        "per_cell": max((cell.chunks for cell in part.cells), default=1),
        "cells": cells,
        "rows": [cell[1:] for cell in cells],
    }


def _evaluations(data: ReportData) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the evaluations table. The teacher's row is above the students of its split."""
    metrics = [(direction, name) for direction in ("i2t", "t2i") for name in ("R@1", "R@5", "R@10")]
    headings = ["student", "split", "checkpoint", "keeps of the mean", *(f"{d} {n}" for d, n in metrics)]

    def values(recalls: Any, intervals: Any) -> list[str]:
        texts = []
        for direction, name in metrics:
            between = getattr(intervals, direction)[name] if intervals else None
            ends = f" ({between.low:.1f} to {between.high:.1f})" if between else ""
            texts.append(f"{recalls[direction][name]:.1f}{ends}")
        return texts

    rows: list[list[str]] = []
    teachers: set[tuple[str, str]] = set()
    for run in data.runs:
        for item in run.evaluations:
            on = f"{item.split}: {item.images:,} images, {item.captions:,} captions"
            if of_other_data(item, data.info.manifest_digest):
                on += f", of {as_utf8(item.cache)}"
            if (item.split, item.cache_manifest_digest) not in teachers:
                teachers.add((item.split, item.cache_manifest_digest))
                rows.append(["teacher", on, "–", "–", *values(item.teacher, item.teacher_intervals)])
            if item.student is None or item.retention is None:
                continue
            chosen = f", chosen on {item.chosen_on}" if item.chosen_on else ""
            if item.chosen_on == item.split:
                chosen += ": no test result"
            checkpoint = (item.checkpoint or "–").rpartition("/")[2] + chosen
            share = _share(item.retention, item.retention_intervals.mean if item.retention_intervals else None)
            rows.append([run.name, on, checkpoint, share, *values(item.student, item.student_intervals)])
            for which, tower in (item.towers or {}).items():
                alone = f"{run.name}, {which} tower by itself"
                rows.append([alone, on, checkpoint, _share(tower.retention), *values(tower.recall, None)])
    return headings, rows


def _share(retention: dict[str, Any], between: Interval | None = None) -> str:
    """Return the share of the teacher's mean recall, with its interval if there is one."""
    share = retention["mean"]
    ends = f" ({between.low:.1f} to {between.high:.1f})" if between else ""
    return ("–" if share is None else f"{share:.1f} %") + ends


def _turned(headings: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Return the table transposed, one column per model: a page has more lines than columns."""
    return [row[0] for row in rows], [
        [heading, *(row[at] for row in rows)] for at, heading in enumerate(headings) if at
    ]
