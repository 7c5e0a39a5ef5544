"""Manifests of format versions 1 and 2, which keep one seal in a list of generations.

Version 1 holds float16 rows and version 2 int8 rows. Both differ from version 3 in this list only. Older versions could
add views to a cache as a second generation. No such cache exists now, and only caches of one generation are read.
"""

from __future__ import annotations

from typing import Any

from teacher_cache.storage.errors import CacheFormatError

__all__ = ["newer_fields", "older_fields"]


def newer_fields(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert the fields of an older manifest to version 3.

    Raises:
        CacheFormatError: it has several generations, or its one generation does not hold all rows.
    """
    generations: Any = fields.get("generations")
    if isinstance(generations, list) and len(generations) > 1:
        raise CacheFormatError(
            f"{where}: has {len(generations)} generations (views were added to a finished cache), and this version "
            "reads caches of one. Precompute a new cache with this version; the version that wrote this one can export "
            "its rows."
        )
    lifted: dict[str, Any] = {name: value for name, value in fields.items() if name != "generations"}
    try:
        (only,) = generations
        lifted |= {name: only[name] for name in ("lost_images", "problems", "seal") if name in only}
        same = older_fields(lifted)["generations"] == generations
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise CacheFormatError(f"{where}: generations do not hold the rows of the layout, each once")
    return lifted


def older_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Convert the fields of a manifest to versions 1 and 2, in their order."""
    names = ("format", "format_version", "identity_digest", "identity", "layout", "source", "files")
    generation: dict[str, Any] = {
        "number": 0,
        "image_rows": [0, fields["layout"]["image_rows"]],
        "text_rows": [0, fields["layout"]["text_rows"]],
        **{name: fields[name] for name in ("lost_images", "problems", "seal") if name in fields},
    }
    older = {name: fields[name] for name in names}
    return older | {"generations": [generation], "made_with": fields["made_with"]}
