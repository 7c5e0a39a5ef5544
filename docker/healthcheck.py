#!/usr/bin/env python3
"""Is the service of this container well? ``healthcheck [server|worker]``: exit 0, or 1 with the reason.

Without a word it looks at what the container runs. Any command but these two is well as long as it runs: it ends when
it is done.
"""

from __future__ import annotations

import itertools
import os
import sys
import urllib.request
from pathlib import Path


def url(role: str) -> str:
    """What to ask: the server whether it reaches its database, the worker whether it still polls for runs."""
    if role == "server":
        return f"http://127.0.0.1:{os.environ.get('PREFECT_SERVER_API_PORT', '4200')}/api/ready"
    # served by `prefect worker start --with-healthcheck` alone
    return f"http://127.0.0.1:{os.environ.get('PREFECT_WORKER_WEBSERVER_PORT', '8080')}/health"


def role_of(command: list[str]) -> str | None:
    """``server`` or ``worker`` if a command starts one of Prefect's, else None."""
    for role in ("server", "worker"):
        if any(pair == (role, "start") for pair in itertools.pairwise(command)):
            return role
    return None


def main(arguments: list[str]) -> int:
    """Ask, and say what is wrong. A proxy of the environment is not asked: the service is in this container."""
    role = arguments[0] if arguments else role_of(Path("/proc/1/cmdline").read_text().split("\0"))
    if role is None:
        return 0
    if role not in ("server", "worker"):
        sys.stderr.write(f"{role!r} is neither server nor worker\n")
        return 2
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url(role), timeout=5) as answer:
            answer.read()
    except OSError as error:  # also 503, which is an OSError of urllib's
        sys.stderr.write(f"{url(role)}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
