"""The int8 report and the table of a deployed student. No onnx: reading a table does not need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, Field

from teacher_cache.pipeline.evaluate.cost.results import ModelCost, SpeedRatios
from teacher_cache.pipeline.evaluate.intervals import Interval
from teacher_cache.pipeline.evaluate.learned import learned_words
from teacher_cache.pipeline.evaluate.recall import chance_recall, mean_recall
from teacher_cache.storage.cli.tables import Table
from teacher_cache.storage.observe.quantities import counted
from teacher_cache.storage.observe.safe_text import unmarked


class Int8Report(BaseModel, frozen=True):
    """The int8 parts of a quantised tower, read from its file and from ONNX Runtime's graph."""

    method: Literal["static", "dynamic"]
    parameters: int = Field(description="Number of parameters of the float tower, batch norms folded in.")
    parameters_int8: int = Field(description="Number of parameters stored as int8.")
    share_int8: float = Field(description="parameters_int8 / parameters.")
    bytes: int
    float_bytes: int = Field(description="Size of the float file in bytes.")
    calibration_images: int = Field(description="Number of calibration images; 0 for the dynamic method.")
    int8_operators: dict[str, int] = Field(description="Number of operators that multiply in int8, by kind.")
    float_operators: dict[str, int] = Field(
        description="Number of operators that multiply in float, by kind, products of two activations included."
    )
    kept_float: dict[str, str] = Field(description="Number of parameters kept in float and the reason, by operator.")


Recalls = dict[str, dict[str, float]]


class Cosine(BaseModel, frozen=True):
    """Cosines between this file's features and the torch student's, over the rows of the split."""

    mean: float
    least: float


class Retained(BaseModel, frozen=True):
    """A share of the teacher's number, in percent, with its 95 % interval over images."""

    share: float | None = Field(description="Share in percent. None if the teacher's number is 0.")
    interval: Interval | None


class Retention(BaseModel, frozen=True):
    """The retained share of each recall, and of the mean of all six."""

    i2t: dict[str, Retained]
    t2i: dict[str, Retained]
    mean: Retained


class TableRow(BaseModel, frozen=True):
    """A model: teacher fp32, student fp32, ONNX fp32 or ONNX int8."""

    name: str
    engine: str
    bytes: int = Field(description="Size of the files with weights in bytes.")
    parameters: int
    int8_share: float | None = Field(None, description="Share of the parameters stored as int8, for int8 rows.")
    cost: ModelCost
    speed: SpeedRatios | None = Field(description="Speed against the teacher, by round. None for the teacher itself.")
    recalls: Recalls
    mean_recall: float
    cosine: dict[str, Cosine] | None = Field(None, description="Cosines by tower. None for teacher and torch student.")
    retention: Retention | None = Field(None, description="Shares of the teacher's recalls. None for the teacher.")
    zero_shot: dict[str, float] | None = None
    zero_shot_retention: Retained | None = Field(None, description="Share of the teacher's top-1 accuracy.")


class Gate(BaseModel, frozen=True):
    """A check that a file passed before it was shipped."""

    name: str
    found: float
    wanted: str


class StudentTable(BaseModel, frozen=True):
    """All rows, with the data and machine of the measurement."""

    student: str
    teacher: str
    run: str
    checkpoint: str
    chosen_on: str | None = Field(description="Split that the checkpoint was chosen on, if any.")
    cache_manifest_digest: str
    split: str
    images: int
    captions: int
    quarantined: int = Field(description="Number of the split's images without an embedding, which are left out.")
    learned_images: int | None = Field(
        None, description="Number of these images that the student learned from; None where its cache cannot be read."
    )
    teacher_precision: str = Field(description="Precision of the teacher's cached embeddings.")
    zero_shot_dataset: str | None = None
    zero_shot_images: int | None = None
    zero_shot_lost: int = Field(0, description="Number of labelled images that at least one model could not use.")
    zero_shot_classes: int | None = None
    zero_shot_prompts: tuple[str, ...] = Field((), description="Prompts of the first class.")
    rounds: dict[int, int] = Field(description="Number of rounds, by images or captions per call.")
    threads: int
    date: str
    hardware: str
    versions: dict[str, str]
    rows: tuple[TableRow, ...]
    gates: tuple[Gate, ...]
    int8: dict[str, Int8Report] = Field(description="Reports of int8 files, by tower.")


_WIDEST = 3.0
"""Greatest ratio of the ends of a speed's interval: a wider one says that other work disturbed the measurement."""

_Cell = Callable[[TableRow], str]


def _cell(value: Callable[[TableRow], Any], show: Callable[[Any], str]) -> _Cell:
    """Return the function that gives the cell of a row: a dash without a value."""

    def cell(row: TableRow) -> str:
        number = value(row)
        return "-" if number is None else show(number)

    return cell


def _latency(tower: str, batch: int) -> _Cell:
    return _cell(lambda row: getattr(row.cost, tower)[batch], lambda time: f"{time.p50_ms:.1f} / {time.p95_ms:.1f}")


def _rate(tower: str, batch: int) -> _Cell:
    return _cell(lambda row: getattr(row.cost, tower)[batch], lambda time: f"{time.per_second:,.0f}")


def _ratio(tower: str, batch: int) -> _Cell:
    return _cell(
        lambda row: row.speed and getattr(row.speed, tower)[batch],
        lambda ratio: (
            f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
            if ratio.high <= _WIDEST * ratio.low
            else "not measurable"
        ),
    )


def _flops(part: str) -> _Cell:
    return _cell(lambda row: row.cost.facts.flops, lambda flops: f"{getattr(flops, part) / 1e9:.2f}")


def _recall(direction: str, name: str) -> _Cell:
    return lambda row: f"{row.recalls[direction][name]:.1f}"


def _cosine(tower: str) -> _Cell:
    return _cell(
        lambda row: row.cosine and row.cosine[tower], lambda cosine: f"{cosine.mean:.5f} (least {cosine.least:.5f})"
    )


def _retained(value: Callable[[TableRow], Retained | None]) -> _Cell:
    def show(retained: Retained) -> str:
        if retained.share is None:
            return "-"
        between = "" if retained.interval is None else f" ({retained.interval.low:.1f} to {retained.interval.high:.1f})"
        return f"{retained.share:.1f} %{between}"

    return _cell(value, show)


def _columns(table: StudentTable) -> list[tuple[str, _Cell]]:
    """Return each column in order: its heading, and the function that gives its cell of a row."""
    first = table.rows[0]
    chance = chance_recall(table.images, table.captions)

    columns: list[tuple[str, _Cell]] = [
        ("retention (95 %)", _retained(lambda row: row.retention.mean if row.retention else None)),
        (f"mean recall (chance {mean_recall(chance):.1f})", lambda row: f"{row.mean_recall:.1f}"),
    ]
    columns += [
        (f"{direction} {name} (chance {chance[direction][name]:.1f})", _recall(direction, name))
        for direction, recalls in first.recalls.items()
        for name in recalls
    ]
    if table.zero_shot_dataset is not None:
        top_1 = _cell(lambda row: row.zero_shot, lambda accuracy: f"{accuracy['top-1']:.1f}")
        columns += [
            (f"zero-shot top-1 (chance {100 / (table.zero_shot_classes or 1):.1f})", top_1),
            ("top-1 retention (95 %)", _retained(lambda row: row.zero_shot_retention)),
        ]
    columns += [
        ("MB", lambda row: f"{row.bytes / 1e6:.1f}"),
        ("parameters", lambda row: f"{row.parameters / 1e6:.1f}M"),
        ("stored as int8", _cell(lambda row: row.int8_share, "{:.0%}".format)),
    ]
    tokens = [row.cost.facts.flops.caption_tokens for row in table.rows if row.cost.facts.flops is not None]
    if tokens:
        columns += [
            ("GFLOPs of an image", _flops("image")),
            (f"GFLOPs of a caption, {' or '.join(map(str, dict.fromkeys(tokens)))} tokens", _flops("caption")),
        ]
    for tower, single, many in (("images", "image", "images"), ("texts", "caption", "captions")):
        for batch in getattr(first.cost, tower):
            if batch == 1:
                columns.append((f"{single}, ms (p50 / p95)", _latency(tower, 1)))
            else:
                columns.append((f"{many}/s, batch {batch}", _rate(tower, batch)))
            columns.append((f"{many} by {batch}, x teacher", _ratio(tower, batch)))
    columns.append(
        ("peak memory, MB", _cell(lambda row: row.cost.memory, lambda memory: f"{memory.peak_bytes / 1e6:,.0f}"))
    )
    columns += [("cosine to fp32, image", _cosine("image")), ("cosine to fp32, text", _cosine("text"))]
    return columns


def to_markdown(table: StudentTable) -> str:
    """Return the table in Markdown, a row per model, with the conditions of the measurement below it."""
    headings, rows = cells(table)
    lines = [["model", *headings[1:]], ["---", *["---:"] * (len(headings) - 1)], *(map(unmarked, row) for row in rows)]
    described = map(unmarked, describe(table).splitlines())
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", *described]) + "\n"


def describe(table: StudentTable) -> str:
    """Return sentences on what the numbers mean and how they were measured, one a line."""
    chosen = f", chosen on {table.chosen_on}" if table.chosen_on else ""
    rounds = " and ".join(f"{count} rounds at batch {batch}" for batch, count in table.rounds.items())
    parts = [
        "MB: of the weights; of torch models as they are in memory, in float32.",
        f"Recall in percent, any caption of an image counts: {_measured(table)}; the teacher's from its cached "
        f"embeddings, made in {table.teacher_precision}.",
        "Retention: share of the teacher's mean of the six recalls, with the interval of 2,000 paired bootstrap "
        "resamples of images.",
        f"Speed: {rounds} in turns on {counted(table.threads, 'thread')}, decoding and tokenizing left out. x teacher: "
        "multiple of the teacher's speed; in parentheses the 5th and 95th percentile of the rounds' ratios, not "
        f"measurable if they differ by more than a factor of {_WIDEST:g}. Peak memory: of a process of its own, "
        "libraries and all.",
    ]
    if table.learned_images:
        learned = learned_words(table.learned_images, f"these {counted(table.images, 'image')}")
        parts.append(f"{learned[0].upper()}{learned[1:]}, so that recall and retention say little about others.")
    if table.quarantined:
        parts.append(f"Left out: {table.quarantined:,} quarantined images of the split.")
    if table.zero_shot_dataset is not None:
        count = len(table.zero_shot_prompts)
        parts.append(
            f"Zero-shot: {table.zero_shot_dataset}, {table.zero_shot_images:,} images of {table.zero_shot_classes} "
            f"classes, {count} prompt{'' if count == 1 else 's'} a class, such as {table.zero_shot_prompts[0]!r}."
        )
        if table.zero_shot_lost:
            parts.append(f"Left out: {table.zero_shot_lost:,} of its images, which not all models could use.")
    parts.append(
        f"Checkpoint {table.checkpoint} of {table.run}{chosen}. Measured {table.date} on {table.hardware} with "
        + ", ".join(f"{name} {version}" for name, version in table.versions.items())
        + "."
    )
    return "\n".join(parts)


def _measured(table: StudentTable) -> str:
    split = f"split {table.split}, " if table.split else ""
    return f"{split}{counted(table.images, 'image')}, {counted(table.captions, 'caption')}"


def cells(table: StudentTable) -> tuple[list[str], list[list[str]]]:
    """Return the headings, and the cells of each model; the first cell is its name."""
    columns = _columns(table)
    return ["", *(heading for heading, _ in columns)], [
        [row.name, *(cell(row) for _, cell in columns)] for row in table.rows
    ]


def terminal_table(table: StudentTable) -> Table:
    """Return the table transposed, a column per model: a terminal has more lines than columns."""
    headings, rows = cells(table)
    title = f"{table.student}: {_measured(table)}"
    shown = Table(title, [""])
    for row in rows:
        shown.add_column(row[0], right=True)
    for index, heading in enumerate(headings[1:], start=1):
        shown.add_row(heading, *(row[index].replace(" (", "\n(") for row in rows))
    return shown
