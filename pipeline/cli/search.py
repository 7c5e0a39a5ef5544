"""The commands ``index`` and ``search``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import click

from teacher_cache.storage.cli.app import (
    Argument,
    cache_argument,
    command,
    complete_cache,
    json_flag,
    of_kind,
    option,
    print_lines,
    print_result,
    refuse_unused,
)
from teacher_cache.storage.cli.tables import Part, Table
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.places import CACHE, DEPLOYED, INDEX
from teacher_cache.storage.observe.logs import hint, suggest_next
from teacher_cache.storage.observe.progress import StageProgress
from teacher_cache.storage.observe.quantities import byte_size

if TYPE_CHECKING:
    from teacher_cache.pipeline.search.query import Answer, QueryEncoder, SearchIndex
    from teacher_cache.pipeline.search.record import IndexRecord


def _points(ctx: click.Context, param: click.Parameter, typed: str) -> float:
    """Return the points in ``1pt``, ``0.5pt`` or ``0.5``."""
    number = re.fullmatch(r"(\d{1,2}(?:\.\d+)?)(?:pt)?", typed)
    if number is None:
        raise UsageError(f"--within {typed}: points of R@10 are wanted, from 0 to below 100, such as 1pt or 0.5pt")
    return float(number[1])


@command("index", example="index coco.cache --within 1pt --out coco.index")
@cache_argument()
@option("--within", "Points of R@10 that each direction may lose to exact search.", "1pt", callback=_points)
@option("--out", "Folder to write the index to.", required=True)
@option("--factory", "FAISS's factory string of the index, such as IVF1024,Flat.", "HNSW32")
@json_flag
def index(cache: str, within: float, out: str, factory: str, as_json: bool) -> None:
    """One index of the images, one of their captions, each measured in the direction that it answers.

    More effort is tried until the loss is certain. An index that loses more is refused, and nothing is written.
    """
    from teacher_cache.pipeline.search.build import build_index

    with StageProgress() as progress:
        record = build_index(cache, out, within, factory, progress)
    print_result(record, as_json, lambda _: _certificate(record, out))
    if not as_json:
        suggest_next("search", out, "a dog in the snow")


@command("search", example="search coco.index 'a dog in the snow' --student deployed/a")
@click.argument("index", cls=Argument, callback=of_kind(INDEX), described="Folder that teacher-cache index wrote.")
@click.argument(
    "query",
    cls=Argument,
    required=False,
    described="Text, which finds images; or an image file, which finds captions. Not with --serve.",
)
@option(
    "--student", "Folder of a deployed student that embeds the query. Default: the teacher.", callback=of_kind(DEPLOYED)
)
@option("--teacher", "The teacher, if it lies elsewhere than the cache says.")
@option("--pretrained", "Tag or weights file of the teacher.")
@option("--cache", "The cache, if it was moved.", callback=of_kind(CACHE), shell_complete=complete_cache)
@option("--count", "Number of answers.", 10, least=1)
@json_flag
@click.option("--serve", is_flag=True, help="Answer on a web page of this machine, with the pictures, until Ctrl-C.")
@option("--port", "Port of the page; 0 takes any free one.", 8800, least=0)
@option("--host", "Address to listen on. Any other one shows captions and pictures to the network.", "127.0.0.1")
@option("--image-root", "Folder or URL of the page's images, if they moved. Default: the recorded place.")
def search(index: str, query: str | None, count: int, as_json: bool, serve: bool, **options: Any) -> None:
    """Order the answers by exact cosine. Nothing is written."""
    if serve:
        if query is not None or as_json:
            raise UsageError("--serve takes queries on its page; leave QUERY and --json out")
        _serve(index, count, options)
        return
    refuse_unused(("port", "host", "image_root"), "without --serve")
    if query is None:
        raise UsageError("QUERY is missing: a text, or an image file; or --serve, for a web page")
    if not query.strip():
        raise UsageError("the query is empty: write a text, or name an image file")
    from teacher_cache.pipeline.data.datasets.files import require_there
    from teacher_cache.pipeline.search.query import SearchIndex, ask, is_picture

    if is_picture(query):
        require_there(query)  # before a model is loaded
    opened = SearchIndex(index, options["cache"])
    answer = ask(opened, _encoder(opened, options), query, count)
    print_result(answer, as_json, lambda _: _answers(answer))


def _serve(folder: str, count: int, options: dict[str, Any]) -> None:
    from teacher_cache.pipeline.search.page import SearchPage
    from teacher_cache.pipeline.search.query import SearchIndex
    from teacher_cache.pipeline.search.serve import SearchServer

    index = SearchIndex(folder, options["cache"])
    page = SearchPage(index, _encoder(index, options), options["image_root"], count)
    with SearchServer(page, options["host"], options["port"]) as server, suppress(KeyboardInterrupt):
        if not ip_address(server.address).is_loopback:
            hint(f"warning: whoever reaches {server.address} sees captions and pictures, without a password")
        print_lines(f"http://{server.address}:{server.server_port}/ answers from {folder}; Ctrl-C ends it")
        server.serve_forever()


def _encoder(index: SearchIndex, options: dict[str, Any]) -> QueryEncoder:
    from teacher_cache.pipeline.search.query import student_queries, teacher_queries

    if options["student"] is None:
        return teacher_queries(index, options["teacher"], options["pretrained"])
    refuse_unused(("teacher", "pretrained"), "with --student")
    from teacher_cache.pipeline.deploy.runtime import StudentRuntime

    return student_queries(StudentRuntime(options["student"]), index)


def _answers(answer: Answer) -> Iterator[Part]:
    what = "images" if answer.answers == "image" else "captions"
    table = Table(f"{what} nearest to {answer.query}, by {answer.model}")
    table.add_column("cosine", right=True)
    table.add_column("row", right=True)
    for name in ("image", "caption"):
        table.add_column(name)
    for match in answer.matches:
        table.add_row(f"{match.cosine:.3f}", f"{match.row}", match.sample_id, match.caption)
    yield table


def _certificate(record: IndexRecord, out: str) -> Iterator[Part]:
    table = Table(f"{out}: {record.factory} over {record.cache}")
    table.add_column("")
    for name in ("rows", "queries", "exact\nR@10", "index\nR@10", "lost at\nmost", "products\na query", "times\nfewer"):
        table.add_column(name, right=True)
    for direction, tower in (("image to text", record.text), ("text to image", record.image)):
        numbers = f"{tower.rows:,}", f"{tower.queries:,}", f"{tower.exact:.2f}", f"{tower.found:.2f}"
        cost = f"{tower.lost_at_most:.2f}", f"{tower.products:,.0f}", f"{tower.times_fewer:.1f}"
        table.add_row(direction, *numbers, *cost)
    yield table
    sampled = [tower for tower in (record.image, record.text) if tower.sampled]
    basis = f"upper bounds at {record.level:.0%} confidence" if sampled else "exact, since all queries were measured"
    if len(sampled) == 1:
        basis += "; exact where all queries were measured"
    yield f"points of R@10 lost: {basis}"
    yield f"{byte_size(record.image.bytes + record.text.bytes)}, {record.seconds:.0f} s, {record.made_with}"
