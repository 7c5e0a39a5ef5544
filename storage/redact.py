"""Credentials out of texts that people and logs get to see."""

from __future__ import annotations

import re

__all__ = ["redact"]

_HIDDEN = "***"

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
    """The text with user and password in URLs, and secret query parameters, replaced by ``***``."""
    text = _PASSWORD.sub(rf"\g<scheme>{_HIDDEN}@", text)
    text = _USER.sub(rf"\g<scheme>{_HIDDEN}@", text)
    return _PARAMETER.sub(rf"\g<name>{_HIDDEN}", text)
