#!/usr/bin/env python3
"""Check the service of this container: ``healthcheck [server|worker]`` exits with 0, or with 1 and the reason.

Without an argument it checks the service that the container runs. Any other command is healthy while it runs.
"""

from __future__ import annotations

import itertools
import os
import sys
import urllib.request
from pathlib import Path


def url(role: str) -> str:
    """Return the URL that tells whether the server reaches its database, or the worker still polls for runs."""
    if role == "server":
        return f"http://127.0.0.1:{os.environ.get('PREFECT_SERVER_API_PORT', '4200')}/api/ready"
    # served by `prefect worker start --with-healthcheck` alone
    return f"http://127.0.0.1:{os.environ.get('PREFECT_WORKER_WEBSERVER_PORT', '8080')}/health"


def role_of(command: list[str]) -> str | None:
    """Return ``server`` or ``worker`` if a command starts one of Prefect's, else None."""
    for role in ("server", "worker"):
        if any(pair == (role, "start") for pair in itertools.pairwise(command)):
            return role
    return None


def main(arguments: list[str]) -> int:
    """Ask the service, past any proxy, and print what is wrong."""
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
