"""Make a bucket if it is not there: ``bucket.py NAME``, with the store in the standard AWS environment.

A store may answer before it can make anything; so a failure is tried again for a while, then it is the end.
"""

from __future__ import annotations

import sys
import time

import s3fs

_SECONDS = 60.0


def make_bucket(name: str) -> None:
    """Return when there is a bucket of that name. Raises what the store last said if there is none after a minute."""
    store = s3fs.S3FileSystem(skip_instance_cache=True)
    until = time.monotonic() + _SECONDS
    while True:
        try:
            store.call_s3("head_bucket", Bucket=name)
            return
        except FileNotFoundError:
            pass
        except OSError:
            if time.monotonic() > until:
                raise
        try:
            store.call_s3("create_bucket", Bucket=name)
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(1)


if __name__ == "__main__":
    make_bucket(sys.argv[1])
