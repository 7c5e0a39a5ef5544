"""WebDataset tars: members that share a key are one sample, and the images are read in place.

    shards/train/000.tar
      000000012.jpg    the image: jpg, jpeg, png or webp
      000000012.txt    its caption, the whole text; or
      000000012.json   a text or a list of texts as "caption" or "captions", where there is no .txt
      000000012.syn.json   with ``?syn=syn_text``: further captions, as in DataCompDR

Captions of several kinds: ``?caption=real:caption,synthetic:recaption`` (keys of the .json, ``.txt`` for that file),
with ``&syn=synthetic:syn_text`` for those of the ``.syn.json``. The captions of an image are then sorted by kind.

The root is a folder (every ``*.tar`` below it), one tar, or a pattern such as ``shards/{000..003}.tar`` or
``shards/*.tar``. A tar or a pattern with braces may be a URL. The key is the member's path up to the first dot of its
name, and is the ``sample_id``. Tars come in the order of the pattern or of their paths, samples in the order of their
key's first appearance. Nothing is unpacked: a sample holds the position of its image's bytes in the tar.

A member that is no regular file (a link, a device, a sparse member) is a problem and never followed. ``../`` in a name
is just part of the key.

The split is the first word that names one in the tar's name (``cc3m-train-0003.tar``), else in its folders, from the
nearest up to the root. ``?split=`` overrides it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import fsspec

from teacher_cache.pipeline.data.datasets.files import (
    as_text,
    contents,
    data_folder,
    open_regular,
    require_there,
    require_utf8,
    say_several_lines,
    split_in_name,
)
from teacher_cache.pipeline.data.datasets.records import (
    Problem,
    ProblemKind,
    Record,
    Uncaptioned,
    kinds_and_places,
    require_few_kinds,
    sample_or_problem,
)
from teacher_cache.pipeline.data.datasets.tar_names import tar_names
from teacher_cache.storage.errors import CacheAccessError, UsageError
from teacher_cache.storage.files.transient import is_transient
from teacher_cache.storage.observe.quantities import counted
from teacher_cache.storage.observe.safe_text import printable

_IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
SYNTHETIC = "syn.json"
_PACKED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}
_MOST_TEXT_BYTES = 16 * 1024 * 1024  # for a .txt or .json: a header can claim any length
# for an extended header (long name and attributes): tarfile searches it in quadratic time
_MOST_HEADER_BYTES = 32 * 1024
_EXTENDED_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class _Entry(tarfile.TarInfo):
    """Header that refuses a size that would make tarfile go back or read for ever."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Entry:
        entry = super().frombuf(buf, encoding, errors)
        most = _MOST_HEADER_BYTES if entry.type in _EXTENDED_HEADERS else math.inf
        if not 0 <= entry.size <= most:
            raise tarfile.ReadError(f"a header says that {entry.size} bytes follow")
        return entry


@dataclass
class _Member:
    """Members of a tar with the same key, while the tar is read."""

    offset: int = -1  # of the image
    length: int = -1
    sha256: str = ""
    texts: dict[str, list[str]] = field(default_factory=dict)  # captions or label, by ending
    by_kind: dict[str, list[str]] = field(default_factory=dict)  # captions of the .json, if kinds are named
    others: list[str] = field(default_factory=list)  # endings that are neither image nor text
    passed_over: str = ""  # member with an image ending, but not at the first dot

    def captions(self) -> list[str]:
        """Return the captions of the .txt, or of the .json beside an empty one, and the further ones."""
        texts = [self.texts[ending] for ending in ("txt", "json") if ending in self.texts]
        own = next((own for own in texts if any(map(str.strip, own))), texts[0] if texts else [])
        return [*own, *self.texts.get(SYNTHETIC, ())]

    def captions_by_kind(self, kinds: Mapping[str, str]) -> dict[str, list[str]]:
        """Return the captions by kind; ``kinds`` as in :class:`_Texts`."""
        files = {kind: self.texts.get(place[1:], []) for kind, place in kinds.items() if place.startswith(".")}
        return files | self.by_kind

    def lost(self, uri: str) -> Problem | None:
        """Return the problem of an image that no other message names."""
        if self.offset >= 0 or not self.passed_over:
            return None
        ending = PurePosixPath(self.passed_over).name.partition(".")[2]
        detail = f"a key ends at the first dot, so that its ending is {printable(ending)!r} and no image's; rename it"
        return Problem("bad-record", f"{uri}/{self.passed_over}", detail, lost_image=True)


@dataclass(frozen=True)
class _Texts:
    """How texts beside images are read: their endings, whether each line is one, and their encoding."""

    endings: tuple[str, ...] = ("txt", "json")
    lines: bool = False
    encoding: str = ""
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"json": ("caption", "captions")})
    """Keys of the texts in a JSON, by its ending."""
    beside: tuple[str, ...] = _IMAGE_ENDINGS
    """Endings of the member whose position is kept: the image, or the rows of DataCompDR."""
    digests: bool = False
    """Whether that member is digested: a distant tar is read whole anyway, in large requests."""
    kinds: Mapping[str, str] = field(default_factory=dict)
    """Where captions are, by kind: a key of the .json, or an ending with its dot."""


def read(
    root: str,
    *,
    split: str = "",
    txt: str = "whole",
    ids: str = "key",
    encoding: str = "",
    caption: str = "",
    syn: str = "",
) -> Iterator[Record]:
    """Read the samples of all tars.

    Args:
        root: a folder, a tar, or a pattern.
        split: split of every sample. Default: from the names of tar and folder.
        txt: ``whole`` if a .txt is one caption, ``lines`` if each line is one (CLIP_benchmark's retrieval sets).
        ids: ``key``, or ``tar`` for ``path/of.tar/key`` if several tars have the same keys.
        encoding: encoding of captions, for example ``cp1252``. Default: UTF-8 without broken characters.
        caption: key of the captions in the .json, which is then read in place of the .txt, or ``KIND:KEY,KIND:KEY``.
            Default: ``caption``, else ``captions``.
        syn: key, or ``KIND:KEY``, of the list of captions in ``KEY.syn.json`` that follow the image's own.
            DataCompDR's is ``syn_text``.

    Raises:
        UsageError: no tar, an option with another value, or a caption of another encoding.
    """
    _check_options(txt, ids)
    glued = 0
    how = _texts_to_read(txt == "lines", encoding, caption, syn)
    for uri, tar_split, key, member in _members(root, split, how):
        sample_id = f"{uri}/{key}" if ids == "tar" else key
        if isinstance(member, Problem):
            yield member
        elif member.offset >= 0:
            glued += txt == "whole" and any("\n" in text.strip() for text in member.texts.get("txt", ()))
            captions = member.captions_by_kind(how.kinds) if how.kinds else member.captions()
            position = member.offset, member.length, member.sha256
            for record in sample_or_problem(sample_id, uri, tar_split, captions, *position):
                if isinstance(record, Uncaptioned) and not member.texts:
                    record = replace(record, detail=record.detail + _instead(member.others))  # noqa: PLW2901
                yield record
        elif member.texts:
            others = f" and {', '.join(member.others)}, which is not read" if member.others else ""
            detail = f"{uri}: there is no image beside {', '.join(member.texts)}{others}"
            yield Problem("no-image", sample_id, detail, lost_image=False, lost_captions=1)
    say_several_lines(root, glued)


def _texts_to_read(lines: bool, encoding: str, caption: str, syn: str) -> _Texts:
    """Return which texts hold captions, by the options of :func:`read`."""
    how = _Texts(lines=lines, encoding=encoding)
    if kinds := _kinds(caption, syn):
        json_keys = tuple(place for place in kinds.values() if not place.startswith("."))
        own = (*["txt"] * (".txt" in kinds.values()), *["json"] * bool(json_keys))
        how, syn = replace(how, endings=own, keys={"json": json_keys}, kinds=kinds), syn.partition(":")[2]
    elif caption:
        how = replace(how, endings=("json",), keys={"json": (caption,)})
    if syn:
        # DataCompDR's .json holds ids, no captions
        own = how.endings if kinds or caption else ("txt",)
        how = replace(how, endings=(*own, SYNTHETIC), keys={**how.keys, SYNTHETIC: (syn,)})
    return how


def _instead(endings: list[str]) -> str:
    """Return what lies beside an image without captions, and what reads it."""
    if "cls" in endings:
        return "; beside it lies .cls, the number of a class: write labelled: for webdataset:"
    beside = ", ".join(f".{printable(ending)}" for ending in endings)
    return f"; beside it lies {beside}, and captions are read from .txt and .json" if endings else ""


def _kinds(caption: str, syn: str) -> dict[str, str]:
    """Return where the captions of each kind are, as :class:`_Texts` has it; {} if no kinds are named."""
    kinds, of_syn = kinds_and_places(caption), kinds_and_places(syn)
    if len(of_syn) > 1 or (bool(kinds) != bool(of_syn) and syn) or kinds.keys() & of_syn:
        raise UsageError(
            f"caption={printable(caption)!r} and syn={printable(syn)!r}: name a kind for both, each once, as in "
            "?caption=real:.txt&syn=synthetic:syn_text"
        )
    if unknown := [place for place in kinds.values() if place.startswith(".") and place != ".txt"]:
        raise UsageError(f"caption={printable(caption)!r}: {unknown[0]} is not read; write .txt, or a key of the .json")
    places = kinds | dict.fromkeys(of_syn, f".{SYNTHETIC}")
    require_few_kinds("caption=", places)
    return places


def check(root: str, *, txt: str = "whole", ids: str = "key", caption: str = "", syn: str = "", **_: str) -> None:
    """Check the options and the form of the root, and that a local folder or pattern has a tar."""
    _check_options(txt, ids)
    _kinds(caption, syn)
    tars = tar_names(root)
    if "://" not in root and not any(Path(tar).exists() for tar in tars):
        folder = Path(tars[0]).parent
        if len(tars) > 1 and folder.is_dir():
            names = f"none of {Path(tars[0]).name} to {Path(tars[-1]).name} is there"
            raise UsageError(f"{root}: {names}; {folder} holds {contents(folder)}")
        require_there(tars[0])


def _check_options(txt: str, ids: str) -> None:
    for option, value, known in (("txt", txt, ("whole", "lines")), ("ids", ids, ("key", "tar"))):
        if value not in known:
            raise UsageError(f"webdataset option {option}={value!r} is not known; it is one of {', '.join(known)}")


def read_labels(root: str) -> Iterator[tuple[Record, str | None, str]]:
    """Read images with ``.cls`` members, as clip-benchmark and webdataset write classification sets.

    Yields:
        (sample, split, label): the label is the number of the class, from 0, as text without leading zeros, and also
        the sample's caption. For an image without a label (problem, split, ``""``); for a problem of a whole tar the
        split is None.
    """
    for uri, split, key, member in _members(root, texts=_Texts(("cls",))):
        if isinstance(member, Problem):
            yield member, None if member.where == printable(uri) else split, ""
            continue
        # the tars of each split count from s0000000 on
        sample_id = f"{uri}/{key}"
        label = " ".join(member.texts.get("cls", [])).strip()
        if member.offset < 0:
            continue
        if not (label.isascii() and label.isdigit()):
            label_text = f"the label {printable(label)!r}" if label else "no label"
            detail = f"{label_text} in KEY.cls beside the image; the number of its class is wanted"
            yield Problem("bad-record", sample_id, detail, lost_image=True), split, ""
            continue
        for record in sample_or_problem(sample_id, uri, split, [label], member.offset, member.length, member.sha256):
            yield record, split, "" if isinstance(record, Problem) else str(int(label))


@dataclass(frozen=True)
class Reinforced:
    """Sample of DataCompDR, with the position of its rows (``KEY.npz``) in the tar.

    Attributes:
        captions: the image's own, None without a ``KEY.txt``, then the synthetic ones: the order of ``text_emb``.
        augmentations: JSON of a list, for each row of ``image_emb`` the crop (top, left, height, width) and the list of
            RandAugment's (number of the operation, magnitude).
    """

    tar: str
    key: str
    captions: tuple[str | None, ...]
    augmentations: str
    offset: int
    length: int


def read_reinforced(root: str, progress: Callable[[int, int], None] | None = None) -> Iterator[Reinforced]:
    """Read the samples of DataCompDR's shards: ``KEY.npz``, ``KEY.syn.json``, ``KEY.paug.json``, and any ``KEY.txt``.

    Args:
        progress: called with (tars read, tars in all).

    Raises:
        UsageError: there is no tar, one is cut short, or a sample lacks a member or its key; the message names it.
    """
    keys = {SYNTHETIC: ("syn_text",), "paug.json": ("param_aug",)}
    # another encoding of the image's own caption costs its row, as it then matches none
    texts = _Texts(("txt", *keys), False, "utf-8", keys, ("npz",))
    for uri, _, key, member in _members(root, texts=texts, progress=progress):
        tar = f"{data_folder(root)}/{uri}"
        if isinstance(member, Problem):
            raise UsageError(f"{tar}: {member}. Download it again")
        has = [*member.texts, *(["npz"] * (member.offset >= 0))]
        if missing := [ending for ending in ("npz", *keys) if ending not in has]:
            raise UsageError(
                f"{tar}: the sample {printable(key)!r} has no .{' and no .'.join(missing)}, only "
                f"{printable(', '.join([*has, *member.others]))}. Each sample of DataCompDR's shards has KEY.npz "
                "(image_emb, text_emb), KEY.syn.json (syn_text) and KEY.paug.json (param_aug)"
                + "; here are tars, as export --sidecar writes them: export without --sidecar"
                * (has == ["npz"])
            )
        own = " ".join(member.texts.get("txt", [])) or None
        captions = (own, *member.texts[SYNTHETIC])
        yield Reinforced(tar, key, captions, member.texts["paug.json"][0], member.offset, member.length)


def _members(
    root: str, split: str = "", texts: _Texts = _Texts(), progress: Callable[[int, int], None] | None = None
) -> Iterator[tuple[str, str, str, _Member | Problem]]:
    """Yield uri and split of the tar, key and members of each sample. Problems come in place of members."""
    folder = data_folder(root)
    tars = tar_names(root)
    for number, tar in enumerate(tars):
        uri = tar.removeprefix(f"{folder.rstrip('/')}/")
        tar_split = split or split_in_name(uri, folder)
        members: dict[str, _Member] = {}
        for problem in _read_tar(tar, uri, members, texts):
            yield uri, tar_split, "", problem
        for key, member in members.items():
            yield uri, tar_split, key, member.lost(uri) or member
        if progress is not None:
            progress(number + 1, len(tars))


def _read_tar(tar: str, uri: str, members: dict[str, _Member], texts: _Texts) -> Iterator[Problem]:
    """Fill ``members`` from one tar. Members before a broken place stay."""
    try:
        with fsspec.open(tar, "rb") if "://" in tar else open_regular(tar) as file:
            yield from _read_members(file, uri, members, replace(texts, digests="://" in tar))
    except FileNotFoundError as error:
        yield Problem("broken-file", uri, f"{tar} does not exist{_reason_behind(error)}", lost_image=False)
    except Exception as error:  # fsspec and tarfile raise many types
        if is_transient(error) or isinstance(error, UsageError | CacheAccessError):
            raise
        images = sum(member.offset >= 0 for member in members.values())
        reason = str(error) or type(error).__name__
        detail = f"broken or cut short after {counted(images, 'image')}, the rest is not read: {reason}"
        if not members and reason in ("empty file", "invalid header", "truncated header", "bad checksum"):
            detail = f"no tar, but {_beginning(tar)}"
        if packer := _packer(tar):
            detail = f"compressed by {packer}, and tars are read in place; unpack it"
        # the number of images in the rest is unknown, so none is counted as lost
        yield Problem("broken-file", uri, detail, lost_image=False)


def _reason_behind(error: Exception) -> str:
    """Return why a server did not answer: fsspec calls that a missing file."""
    return f" or its server does not answer ({error.__cause__})" if error.__cause__ is not None else ""


def _beginning(tar: str) -> str:
    with fsspec.open(tar, "rb") as file:
        start = file.read(20)
    return f"a file that begins with {start!r}" if start else "a file of 0 bytes"


def _packer(tar: str) -> str:
    """Return the program that compressed a local tar, or an empty text."""
    with contextlib.suppress(OSError):
        if "://" not in tar:
            with open_regular(tar) as file:
                start = file.read(6)
            return next((name for mark, name in _PACKED.items() if start.startswith(mark)), "")
    return ""


def _read_members(file: IO[bytes], uri: str, members: dict[str, _Member], texts: _Texts) -> Iterator[Problem]:
    # "r:": plain tars only, since members of a compressed one cannot be read in place
    how = {"encoding": "utf-8", "errors": "surrogateescape", "tarinfo": _Entry}
    with tarfile.open(fileobj=file, mode="r:", **how) as archive:  # type: ignore[call-overload]
        for entry in archive:
            # an extended header may override the size that was checked
            if entry.size < 0:
                raise tarfile.ReadError(f"the member {printable(entry.name)!r} says that {entry.size} bytes follow")
            key, ending = _key_of(entry.name)
            if entry.isdir() or not key:
                continue  # extended attributes
            if ending not in texts.beside and ending not in texts.endings:
                # a mask beside its image, an image with a dot in its name, a class label
                member = members.setdefault(key, _Member())
                member.others.append(ending)
                if ending.rpartition(".")[2] in texts.beside:
                    member.passed_over = entry.name
                continue
            problem = _add_member(archive, entry, key, ending, members, texts, f"{uri}/{entry.name}")
            if problem is not None:
                kind, detail = problem
                lost_image = ending in texts.beside
                yield Problem(kind, f"{uri}/{entry.name}", detail, lost_image)
        # tarfile takes a broken header for the end; a complete tar ends in a block of zeros
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"no end mark at byte {archive.offset}")


def _key_of(name: str) -> tuple[str, str]:
    """Split a member's path at the first dot of its name: key and ending. The key may be empty."""
    place, dot, ending = PurePosixPath(name).name.partition(".")
    if not dot or not place:
        return "", ""
    parent = name.removeprefix("./").rpartition("/")[0]
    return f"{parent}/{place}" if parent else place, ending.lower()


def _add_member(
    archive: tarfile.TarFile,
    entry: tarfile.TarInfo,
    key: str,
    ending: str,
    members: dict[str, _Member],
    texts: _Texts,
    where: str,
) -> tuple[ProblemKind, str] | None:
    """Add an image or a text to its key. Return kind and detail of a problem, or None.

    Raises:
        UsageError: a text is of another encoding.
    """
    image = ending in texts.beside
    if not entry.isreg() or entry.issparse():
        return "bad-record", "a link or a sparse member, not a plain file; its bytes are not in one piece here"
    member = members.setdefault(key, _Member())
    if (image and member.offset >= 0) or ending in member.texts:
        what = "image" if image and ending in _IMAGE_ENDINGS else ending
        return "duplicate-id", f"the key {printable(key)!r} has its {what} already; the first stays"
    if image:
        member.offset, member.length = entry.offset_data, entry.size
        if texts.digests:
            with cast(io.BufferedReader, archive.extractfile(entry)) as picture:
                member.sha256 = hashlib.file_digest(picture, "sha256").hexdigest()
        return None
    if entry.size > _MOST_TEXT_BYTES:
        return "bad-record", f"{entry.size:,} bytes of text, the most is {_MOST_TEXT_BYTES:,}"
    content = archive.extractfile(entry)
    assert content is not None  # a regular member
    return _add_text(member, content, ending, texts, where)


def _add_text(
    member: _Member, content: IO[bytes], ending: str, texts: _Texts, where: str
) -> tuple[ProblemKind, str] | None:
    """Add a text to its key, as :func:`_add_member` does."""
    text = as_text(content, texts.encoding or "utf-8").read()
    if not texts.encoding:
        require_utf8(text, printable(where))
    if ending not in texts.keys:
        member.texts[ending] = text.splitlines() if texts.lines else [text]
        return None
    keys = texts.keys[ending]
    record = _json_object(text)
    if isinstance(record, str):
        captions: list[str] | str = record
    elif texts.kinds and ending == "json":
        captions = _captions_by_kind(record, texts.kinds, member)
    else:
        captions = _captions_under(record, keys)
    if isinstance(captions, str):
        wanted_as = f"its captions are wanted as {' or '.join(keys)}, or by ?caption=KEY"
        return "bad-record", f"{captions}; {wanted_as if ending == 'json' else f'{keys[0]} is wanted'}"
    member.texts[ending] = captions
    return None


def _captions_by_kind(record: dict[str, Any], kinds: Mapping[str, str], member: _Member) -> list[str] | str:
    """Add the captions of a JSON object to a member by kind. Return them, or what it is if it has none of the keys."""
    read = {kind: _captions_under(record, (key,)) for kind, key in kinds.items() if not key.startswith(".")}
    member.by_kind = {kind: captions for kind, captions in read.items() if isinstance(captions, list)}
    return [text for own in member.by_kind.values() for text in own] if member.by_kind else next(iter(read.values()))


def _json_object(text: str) -> dict[str, Any] | str:
    """Return a JSON object, or what the text is instead."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return "not JSON"
    return content if isinstance(content, dict) else f"a JSON {type(content).__name__}"


def _captions_under(record: dict[str, Any], keys: tuple[str, ...]) -> list[str] | str:
    """Return a text, or a list of texts, under one of the keys, or what the record is if it has none."""
    for key in keys:
        captions = [record[key]] if isinstance(record.get(key), str) else record.get(key)
        if isinstance(captions, list) and all(isinstance(one, str) for one in captions):
            return captions
    return f"a JSON object with the keys {', '.join(map(str, record)) or 'none'}"
