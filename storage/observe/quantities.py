"""Counts, rates, bytes and times as people read them."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return the number and the noun, in the plural unless the number is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def rates(images: float | None, captions: float | None) -> str:
    """Return the known rates of the teacher as text."""
    known = ((images, "images/s"), (captions, "captions/s"))
    return ", ".join(f"{rate:,.0f} {unit}" for rate, unit in known if rate is not None) or "no rate recorded"


def byte_size(nbytes: float) -> str:
    """Format a number of bytes: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:,.0f} B" if unit == "B" else f"{nbytes:,.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.1f} TB"


def duration(seconds: float) -> str:
    """Format a time in a fitting unit: 0.3 s, 45 s, 12 min, 3.5 h, 2.1 days."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    for unit, size, longest in (("s", 1, 120), ("min", 60, 7_200), ("h", 3_600, 172_800)):
        if seconds < longest:
            return f"{seconds / size:.{1 if unit == 'h' else 0}f} {unit}"
    return f"{seconds / 86_400:,.1f} days"
