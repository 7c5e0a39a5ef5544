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
from teacher_cache.pipeline.evaluate.intervals import Interval, RecallIntervals
from teacher_cache.pipeline.evaluate.learned import learned_words
from teacher_cache.pipeline.evaluate.recall import RECALL_KS, Recalls, mean_recall
from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult
from teacher_cache.pipeline.report.chart import PALETTES, Chart, vega_config
from teacher_cache.pipeline.report.charts import all_charts
from teacher_cache.pipeline.report.data import ReportData, as_utf8, of_other_data
from teacher_cache.pipeline.report.summary import about, facts, quarantined, unread, verdict
from teacher_cache.storage.look.info import CacheInfo
from teacher_cache.storage.observe.quantities import counted

_HERE = Path(__file__).parent
_TABS = ("Overview", "Students", "Deployment", "Retrieval", "Map", "Distributions", "Problems")
_METRICS = [(direction, f"R@{k}") for direction in ("i2t", "t2i") for k in RECALL_KS]
_EACH = [f"{direction} {name}" for direction, name in _METRICS]
_EVALUATED = ["model", "keeps", "mean recall", *_EACH]
_BESIDE = ["teacher", "mean recall", *_EACH, "true above random", "rank: images", "captions"]


def render_report(data: ReportData) -> str:
    """Return the whole page, to be written as UTF-8."""
    from markupsafe import Markup

    charts = all_charts(data)
    scripts = [(_HERE / "page.js").read_text(encoding="utf-8")]
    if charts:
        scripts.append(_libraries())
    page = (
        environment()
        .get_template("page.html")
        .render(
            data=data,
            info=data.info,
            stats=data.stats,
            title=name_of(data.location),
            policy=_policy(scripts),
            style=style(),
            scripts=[Markup(script) for script in scripts],
            block=Markup(_block(data, charts)),
            charts=charts,
            tabs=[(name.lower(), name) for name in _TABS],
            badge=_badge(data.info),
            quarantined=quarantined(data.info),
            unread=unread(data.info),
            verdict=verdict(data),
            facts=facts(data),
            about=about(data),
            identity=_identity(data),
            teachers=_teachers(data),
            beside=_BESIDE,
            evaluated=_EVALUATED,
            evaluations=_evaluations(data),
            losses=list(dict.fromkeys(row[1] for row in charts["losses"].rows)) if "losses" in charts else [],
            splits=sorted({point.split for point in data.row_map.points}) if data.row_map else [],
            reasons=_reasons(data).most_common(),
            deployments=[_turned(*cells(table)) for table in data.deployments],
            sentences=[describe(table).splitlines() for table in data.deployments],
        )
    )
    return as_utf8(page)


def environment() -> Any:
    """Return the environment of the pages' templates, with their filters. Every value is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters.update(
        count=lambda value: "–" if value is None else f"{value:,}",
        decimal=lambda value, digits=1: "–" if value is None else f"{value:,.{digits}f}",
        counted=counted,
        quoted=shlex.quote,
    )
    return made


def style() -> Any:
    """Return the pages' style sheet, not to be escaped."""
    from markupsafe import Markup

    return Markup(_variables() + (_HERE / "page.css").read_text(encoding="utf-8"))


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


def name_of(location: str) -> str:
    """Return the last name of a location."""
    return location.rstrip("/").rpartition("/")[2] or location


def _badge(info: CacheInfo) -> str:
    """Return the number of dataset problems and quarantined images for the tab; empty if there are none."""
    known = sum(info.problems.values()) + (quarantined(info) or 0)
    if unread(info):
        return f"{known:,}+" if known else "?"
    return f"{known:,}" if known else ""


def _reasons(data: ReportData) -> Counter[str]:
    """Count the reasons of all quarantined images, or of the shown ones if the others are unknown."""
    if data.info.quarantine is not None:
        return Counter(data.info.quarantine)
    return Counter(lost.reason.partition(":")[0] for lost in data.lost)


def _identity(data: ReportData) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the identity, field by field as other commands name them, and the manifest: groups of values."""
    info = data.info
    groups = [
        (name, [(field, _said(value)) for field, value in fields.items() if field not in ("architecture", "probe")])
        for name, fields in info.identity.model_dump(exclude_none=True).items()
    ]
    file = {
        "identity": info.identity_digest,
        "digest": info.manifest_digest,
        "format": str(info.format_version),
        "made with": _said(info.made_with),
    }
    return [*groups, ("manifest", list(file.items()))]


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _evaluations(data: ReportData) -> list[tuple[str, list[list[str]]]]:
    """Return a table for each split: what it was measured on, and its rows, the teacher's first."""
    tables: dict[tuple[str, str], list[list[str]]] = {}
    for run in data.runs:
        for item in run.evaluations:
            kind = "" if item.caption_kind is None else f" of kind {item.caption_kind}"
            on = f"{item.split}: {item.images:,} images, {item.captions:,} captions{kind}"
            if of_other_data(item, data.info.manifest_digest):
                on += f", of {as_utf8(item.cache)}"
            teacher = ["teacher", "–", *_recalls(item.teacher, item.teacher_intervals)]
            rows = tables.setdefault((on, item.cache_manifest_digest), [teacher])
            rows += [row for row in _further(item) if row not in rows]
            if item.student is None or item.retention is None:
                continue
            chosen = f", chosen on {item.chosen_on}" if item.chosen_on else ""
            if item.chosen_on == item.split:
                chosen += ": no test result"
            if item.learned_images:
                chosen += f"; {learned_words(item.learned_images, 'them')}"
            checkpoint = (item.checkpoint or "–").rpartition("/")[2] + chosen
            share = _percent(item.retention["mean"], _mean(item.retention_intervals), " %")
            rows.append([f"{run.name}\n{checkpoint}", share, *_recalls(item.student, item.student_intervals)])
            for which, tower in (item.towers or {}).items():
                share = _percent(tower.retention["mean"], None, " %")
                rows.append([f"{run.name}, {which} tower by itself", share, *_recalls(tower.recall, None)])
    return [(on, rows) for (on, _), rows in tables.items()]


def _further(item: EvaluateResult) -> list[list[str]]:
    """Return the rows of further teachers, and of all together."""
    rows = [[f"teacher of {as_utf8(one.cache)}", "–", *_recalls(one.recall, None)] for one in item.other_teachers]
    return rows if item.together is None else [*rows, ["all teachers together", "–", *_recalls(item.together, None)]]


def _teachers(data: ReportData) -> list[list[str]]:
    """Return a row for each of several teachers, measured on the same images."""
    return [
        [
            f"{one.teacher}\n{one.location}",
            *(["–"] * (1 + len(_EACH)) if one.recall is None else _recalls(one.recall.by_direction, None)),
            "–" if one.separation is None else f"{100 * one.separation:.2f} %",
            *("–" if rank is None else f"{rank:.1f}" for rank in (one.image_rank, one.text_rank)),
        ]
        for one in data.teachers
    ]


def _recalls(recalls: Recalls, intervals: RecallIntervals | None) -> list[str]:
    """Return the mean recall and the six recalls, each with its interval if there is one."""
    texts = [_percent(mean_recall(recalls), _mean(intervals))]
    for direction, name in _METRICS:
        between = getattr(intervals, direction)[name] if intervals else None
        texts.append(_percent(recalls[direction][name], between))
    return texts


def _mean(intervals: RecallIntervals | None) -> Interval | None:
    return intervals.mean if intervals else None


def _percent(value: float | None, between: Interval | None, unit: str = "") -> str:
    ends = f" ({between.low:.1f} to {between.high:.1f})" if between else ""
    return ("–" if value is None else f"{value:.1f}{unit}") + ends


def _turned(headings: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Return the table transposed, one column per model: a page has more lines than columns."""
    return [row[0] for row in rows], [
        [heading, *(row[at] for row in rows)] for at, heading in enumerate(headings) if at
    ]
