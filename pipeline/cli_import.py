"""The command that makes a cache of another tool's embeddings: ``import``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipeline.cli_flags import how_to_go_on, say, setting
from pipeline.foreign_rows import ImportConfig
from pipeline.run_file import load_config
from storage.cli import JsonFlag, app, counted, print_json
from storage.console import StageProgress

if TYPE_CHECKING:
    from pipeline.import_rows import ImportResult

__all__ = ["import_folder"]


@app.command("import")
def import_folder(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help=ImportConfig.model_fields["folder"].description)],
    dataset: Annotated[str | None, setting(ImportConfig, "dataset")] = None,
    teacher: Annotated[str | None, setting(ImportConfig, "teacher")] = None,
    pretrained: Annotated[str | None, setting(ImportConfig, "pretrained")] = None,
    cache: Annotated[str | None, setting(ImportConfig, "cache")] = None,
    sample: Annotated[int | None, setting(ImportConfig, "sample")] = None,
    seed: Annotated[int | None, setting(ImportConfig, "seed")] = None,
    threshold: Annotated[float | None, setting(ImportConfig, "threshold")] = None,
    device: Annotated[str | None, setting(ImportConfig, "device")] = None,
    precision: Annotated[str | None, setting(ImportConfig, "precision")] = None,
    dtype: Annotated[str | None, setting(ImportConfig, "dtype")] = None,
    batch_size: Annotated[int | None, setting(ImportConfig, "batch_size")] = None,
    chunk_rows: Annotated[int | None, setting(ImportConfig, "chunk_rows")] = None,
    json: JsonFlag = False,
) -> None:
    """Make a cache of embeddings that clip-retrieval wrote, once a sample of them is proven against the teacher.

    Images and captions that the folder lacks are encoded. Stop it at any time; run it again to go on.
    """
    flags = {
        "folder": folder,
        "dataset": dataset,
        "teacher": teacher,
        "pretrained": pretrained,
        "cache": cache,
        "sample": sample,
        "seed": seed,
        "threshold": threshold,
        "device": device,
        "precision": precision,
        "dtype": dtype,
        "batch_size": batch_size,
        "chunk_rows": chunk_rows,
    }
    config = load_config(ImportConfig, "import", None, flags)
    try:
        from pipeline.import_rows import import_rows  # takes seconds, in which it may be stopped

        with StageProgress() as progress:
            result = import_rows(config, progress)
    except KeyboardInterrupt:
        say(f"stopped: {how_to_go_on(config.cache)}")
        raise typer.Exit(1) from None
    except OSError as error:  # a full disk, a missing right, a share or a store that is away
        say(f"error: {str(error).rstrip('.')}. {how_to_go_on(config.cache)}")
        raise typer.Exit(1) from None
    if json:
        print_json(result)
        return
    console = Console(highlight=False)
    for line in _lines(result):
        console.print(line, markup=False, soft_wrap=True)


def _lines(result: ImportResult) -> list[str]:
    matched = result.matched
    least = "" if result.least_cosine is None else f", least cosine {result.least_cosine:.5f}"
    lines = [
        f"{result.cache}: {result.images:,} images and {result.captions:,} captions by {result.teacher}",
        f"images: {result.images_imported:,} imported, {result.images_encoded:,} encoded, {result.quarantined:,} "
        f"quarantined; captions: {result.captions_imported:,} imported, {result.captions_encoded:,} encoded",
        f"proven: {counted(result.images_proven, 'image')} and {counted(result.captions_proven, 'caption')} against "
        f"the live teacher{least}",
    ]
    left = {
        "of images that are not in the dataset": matched.strange,
        "ambiguous": matched.ambiguous,
        "not finite or zero": matched.unusable,
    }
    if any(left.values()):
        said = ", ".join(f"{count:,} {what}" for what, count in left.items() if count)
        lines.append(f"rows of the folder ({matched.folder_rows:,} in all) that were left aside: {said}")
    if result.problems:
        lines.append("problems: " + ", ".join(f"{kind} {count}" for kind, count in result.problems.items()))
    return [*lines, f"{result.chunks_written} of {result.chunks} chunks written in {result.seconds:,.1f} s"]
