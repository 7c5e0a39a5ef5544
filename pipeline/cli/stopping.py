"""Messages of a stopped command: the state that is saved, and how to continue."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from teacher_cache.storage.errors import CacheError, CacheNotFoundError, CacheUnreachableError
from teacher_cache.storage.observe.logs import say

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def resumable(state: Callable[[], str], errors: bool = True) -> Iterator[None]:
    """Exit 1 with one line when the block is interrupted.

    Args:
        state: returns what is saved and how to continue. Called only after an interruption.
        errors: also handle other errors of files than a full disk.
    """
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped: {state()}")
        sys.exit(1)
    except CacheUnreachableError as error:  # names the remedy; asking the store for the state would time out too
        say(f"error: {str(error).rstrip('.')}. What is committed stays.")
        sys.exit(1)
    except OSError as error:  # a full disk, a missing permission, a missing share
        if not errors and error.errno not in _FULL:
            raise
        say(f"error: {str(error).rstrip('.')}. {state()}")
        sys.exit(1)


def chunks_committed(cache: str) -> Callable[[], str]:
    """Return a function that counts the committed chunks of a cache."""

    def state() -> str:
        from teacher_cache.storage.look.info import count_committed  # no torch: its import may have been interrupted

        try:
            done, total = count_committed(cache)
            committed = f"{done} of {total} chunks are committed"
        except CacheNotFoundError:
            committed = "nothing is committed yet"
        except (CacheError, OSError):
            committed = "what is committed stays"
        return f"{committed}. Run the same command again to go on."

    return state
