"""Dataset files as somebody would write them who wants to do harm: made of a seed, in the published forms."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_NAMES = [
    "a.png", "b.png", "./a.png", "a\nb.png", "../a.png", "/etc/passwd", "a\x00.png", "\udcff.png", "é.png", "", ".",
    "a", "..", "a.b.png", "x" * 5000 + ".png", "https://u:p@h/x.png?X-Amz-Signature=1", "file:///etc/passwd",
    "a.png#b/0", "\u202egnp.a", "A.PNG", "a.png/", "//a.png", "~/a.png", "{a,b}.png", "*.png", "CON.png", "-rf.png",
    "a.png::b",
]  # fmt: skip
_TEXTS = [
    "A.",
    "",
    "  ",
    "a\nb",
    "\ud83d",
    "\x1b[31mred",
    "x" * 20_000,
    "<end_of_text>",
    "\ufeff",
    '"',
    "B \U0001f600.",
]
_VALUES = [None, True, -1, 0.5, float("nan"), float("inf"), 2**63, 10**400, [], {}, [[["a"]]], {"a": None}]
_DEEP = b"[" * 20_000 + b"]" * 20_000


def _any(rng: random.Random, likely: list[str]) -> Any:
    return rng.choice(likely if rng.random() < 0.7 else [*_NAMES, *_TEXTS, *_VALUES])


def broken(rng: random.Random, data: bytes, always: bool = False) -> bytes:
    """Cut, change or repeat some bytes of a file; of one in eight, if not always."""
    at, how = rng.randrange(len(data) + 1), rng.randrange(3 if always else 24)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + rng.randbytes(4) + data[at + 4 :]
    return data[:at] + data[max(0, at - 512) :] if how == 2 else data


def _json(rng: random.Random, value: Any, key: bytes) -> bytes:
    """JSON in which a key may come twice, hold a deep nest, or hold bytes that are not UTF-8."""
    data = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    start = b'{"' + key + b'": '
    if rng.random() < 0.1:
        data = data.replace(b"{", start + rng.choice([b"[]", b"1e999", _DEEP]) + b", ", 1)
    return broken(rng, data.replace(b"A.", b"\xff\xfe") if rng.random() < 0.2 else data)


def _coco(rng: random.Random) -> bytes:
    ids = [*"23456789", "1"]
    images = [{"id": _any(rng, ids), "file_name": _any(rng, _NAMES)} for _ in range(rng.randrange(6))]
    images.insert(0, {"id": "1", "file_name": "a.png"})
    texts = [{"image_id": _any(rng, ids), "caption": _any(rng, _TEXTS)} for _ in range(rng.randrange(9))]
    texts.insert(0, {"image_id": "1", "caption": "A."})
    odd = [rng.choice(_VALUES)] * (rng.random() < 0.3)
    return _json(rng, {"images": [*images, *odd], "annotations": [*texts, *odd]}, b"images")


def _karpathy(rng: random.Random) -> bytes:
    def image() -> dict[str, Any]:
        sentences = [{"raw": _any(rng, _TEXTS)} for _ in range(rng.randrange(4))]
        entry = {"filename": _any(rng, _NAMES), "filepath": _any(rng, ["images", "val"]), "split": _any(rng, ["train"])}
        return entry | {"sentences": sentences if rng.random() < 0.9 else rng.choice(_VALUES)}

    sound = {"filename": "a.png", "split": "train", "sentences": [{"raw": "A."}]}
    odd = [rng.choice(_VALUES)] * (rng.random() < 0.3)
    return _json(rng, {"dataset": "x", "images": [sound, *(image() for _ in range(rng.randrange(6))), *odd]}, b"images")


def _tar(rng: random.Random) -> bytes:
    kinds = [tarfile.REGTYPE] * 12 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
    kinds += [tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE, b"?"]
    format = rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    sink = io.BytesIO()
    for name, data in (("good.png", b"\x89PNG"), ("good.txt", b"A.")):
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        sink.write(entry.tobuf() + data + bytes(tarfile.BLOCKSIZE - len(data)))
    for _ in range(rng.randrange(12)):
        name = rng.choice(_NAMES).replace("\0", "")
        if rng.random() < 0.5:
            name = name.rpartition(".")[0] + rng.choice([".txt", ".json", ".jpg", ".JPEG", ".cls", ".seg.png"])
        data = rng.choice([b"A.", b"", b'{"caption": "A."}', b'{"caption": [1]}', "\u00e9".encode(), b"\x89PNG", _DEEP])
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = rng.choice(kinds), rng.choice(["", "a.png", "/etc/passwd", "../../x"])
        entry.size = len(data) if entry.type in (tarfile.REGTYPE, tarfile.CONTTYPE, b"?") else 0
        if format == tarfile.PAX_FORMAT and rng.random() < 0.2:
            entry.pax_headers = {
                rng.choice(["path", "size", "mtime", "hdrcharset"]): rng.choice(["-1", "9" * 30, "a\nb"])
            }
        sink.write(entry.tobuf(format, "utf-8", "surrogateescape"))
        sink.write((data if entry.size else b"") + bytes(-entry.size % tarfile.BLOCKSIZE))
    return broken(rng, sink.getvalue() + bytes(2 * tarfile.BLOCKSIZE))


def _csv(rng: random.Random) -> bytes:
    line = rng.choice(["\n", "\r\n", "\r"])
    header = rng.choice([["path", "caption"], ["caption", "path", "split"], ["id", "path", "caption", "path"]])
    rows = [header, [{"path": "a.png", "caption": "A."}.get(name, "x") for name in header]]
    for _ in range(rng.randrange(6)):
        rows.append([str(_any(rng, _NAMES if name == "path" else _TEXTS)) for name in header])
        rows[-1] = rows[-1][rng.random() < 0.1 :]
    quote = rng.choice(['"', '"', ""])
    mark = rng.choice([",", "\t", ";", "|"])
    text = line.join(mark.join(f"{quote}{cell}{quote}" for cell in row) for row in rows)
    errors = rng.choice(["surrogatepass", "replace", "replace", "replace"])
    return broken(rng, text.encode(rng.choice(["utf-8"] * 5 + ["utf-16"]), errors))


def _parquet(rng: random.Random) -> bytes:
    def column(rows: int) -> pa.Array:
        cells: list[Any] = rng.choice(
            [
                [name.encode("utf-8", "surrogatepass").decode("utf-8", "replace") for name in _NAMES],
                ["A.", "", None],
                [b"\0\xff", b"", None],
                [1, -1, 2**62],
                [float("nan"), 1e300],
                [["A.", None], [], None],
                [{"bytes": b"\x89PNG", "path": "../a.png"}, {"bytes": None, "path": None}, None],
                [{"path": "a.png"}],
                [True, None],
                [None],
            ]
        )
        return pa.array([rng.choice(cells) for _ in range(rows)])

    rows = rng.randrange(1, 9)
    columns = {
        name: column(rows) for name in rng.sample(["path", "caption", "split", "id", "é\n"], rng.randrange(1, 5))
    }
    for name, sound in (("path", "a.png"), ("caption", "A.")):
        if rng.random() < 0.7:
            columns[name] = pa.array([sound, *(rng.choice([sound, "", "../x", None]) for _ in range(rows - 1))])
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, row_group_size=2)
    return broken(rng, sink.getvalue())


HOSTILE: dict[str, Callable[[random.Random], bytes]] = {
    "coco": _coco,
    "karpathy": _karpathy,
    "webdataset": _tar,
    "table": _csv,
    "parquet": _parquet,
}
"""Maker of a file by target of ``tests/fuzz_targets.py``."""
