"""Texts for people and logs, with credentials hidden."""

from __future__ import annotations

import re
from html import escape

_HIDDEN = "***"
# not printable to Python, and part of names: no-break and ideographic space, joiners of Persian, Hindi and emoji
_HARMLESS = "\n\u00a0\u3000\u200c\u200d"

# `s3://KEY:SECRET@bucket`: AWS secrets may hold slashes, so everything up to an @ belongs to it, unless what
# follows the colon is a port (`http://host:9000/me@example`) or the colon is one of an ARN's
_PASSWORD = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*://)(?!arn:)[^\s/@:]*:(?!\d{1,5}(?:[/?#\s]|$))[^\s@]*@(?:[^\s/?#@]*@)*", re.I
)
# `https://TOKEN@host`; in other schemes the part before a lone @ is a user or a container (`abfs://container@account`)
_USER = re.compile(r"(?P<scheme>https?://)[^\s/@?#]+@", re.I)
# `?X-Amz-Signature=...`, also where the URL is itself a quoted parameter
_PARAMETER = re.compile(
    r"(?P<name>(?:[?&;#]|%3F|%26)(?:[\w.-]*(?:signature|credential|token|secret|passw|pwd|api[-_]?key|access[-_]?key)"
    r"[\w.-]*|sig|sas|auth|authorization|key|key[-_]?id)(?:=|%3D))(?!%26)[^&;#\s\"'<>)]+?(?=[&;#\s\"'<>)]|%26|$)",
    re.I,
)


def redact(text: str) -> str:
    """Return the text with passwords, users and secret parameters in URLs replaced by ``***``."""
    text = _PASSWORD.sub(rf"\g<scheme>{_HIDDEN}@", text)
    text = _USER.sub(rf"\g<scheme>{_HIDDEN}@", text)
    return _PARAMETER.sub(rf"\g<name>{_HIDDEN}", text)


# lone surrogates: from surrogateescape of bytes that are not UTF-8, or from half a pair in JSON
NOT_TEXT = re.compile("[\ud800-\udfff]")
# line ends and escapes would forge lines of a log or drive a terminal; no file name needs them
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# bidirectional marks show the text around them in another order
_CONTROL_OR_BIDI = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
MAX_NAME_CHARACTERS = 4096  # PATH_MAX of Linux; no server takes a longer URL
_SHOWN_CHARACTERS = 300


def printable(text: str) -> str:
    """Return a text for a message: on one line, valid UTF-8, at most 300 characters, without secrets.

    Passwords and signatures in URLs are hidden, control characters are escaped, and invalid UTF-8 becomes U+FFFD.
    """
    # cut before anything is searched: an error may quote a megabyte
    shown = redact(NOT_TEXT.sub("\ufffd", text[:MAX_NAME_CHARACTERS]))
    shown = CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), shown)
    is_cut = len(text) > MAX_NAME_CHARACTERS or len(shown) > _SHOWN_CHARACTERS
    return f"{shown[:_SHOWN_CHARACTERS]}..." if is_cut else shown


def unmarked(text: str) -> str:
    """Return a text for Markdown that is shown as a web page: without line ends, links, HTML and bidi controls."""
    return re.sub(r"[\\\[|]", r"\\\g<0>", escape(shown(" ".join(text.split())), quote=False))


def escaped_json(line: str) -> str:
    """Escape what JSON allows in texts and a terminal obeys: control characters and bidirectional marks."""
    return _CONTROL_OR_BIDI.sub(lambda match: f"\\u{ord(match[0]):04x}", line)


def shown(text: str) -> str:
    """Replace characters that are not printable, such as terminal escapes. Line ends, spaces and joiners stay."""
    return "".join(char if char.isprintable() or char in _HARMLESS else "\N{REPLACEMENT CHARACTER}" for char in text)
