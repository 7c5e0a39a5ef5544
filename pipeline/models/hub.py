"""Hugging Face's hub: whether it answers, and the model config of a repository in open_clip's form. No torch."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants, errors, get_session, hf_hub_download

from teacher_cache.pipeline.settings.names import CHECKPOINT_CONFIG, HUB
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.safe_text import printable

# it writes its warnings itself and passes them on too: each would appear twice
logging.getLogger("huggingface_hub").handlers.clear()

_HUB_SECONDS = 4.0
# what open_clip, the hub's library and transformers say about a file that they could not get
_DOWNLOAD = re.compile("download|HF Hub|offline|connect|local cache", re.IGNORECASE)
_ADVICE: tuple[tuple[type[Exception], str], ...] = (
    (errors.GatedRepoError, "is gated. Accept its terms on its page, and log in by hf auth login"),
    (errors.RepositoryNotFoundError, "is not there, or is private. Check the name, or log in by hf auth login"),
    (errors.RemoteEntryNotFoundError, f"has no {CHECKPOINT_CONFIG}. Name a repository that open_clip can load"),
    (errors.HFValidationError, "is no name of a repository. Write hf-hub:ORG/NAME"),
)


def hub_config(name: str, what: str) -> dict[str, Any]:
    """Return the open_clip model config of ``hf-hub:ORG/NAME``, from the hub or its local copy.

    Raises:
        UsageError: there is no such config, or the hub cannot be reached. The message begins with ``what``.
    """
    repository, host = name.removeprefix(HUB), urlsplit(constants.ENDPOINT).netloc
    try:
        with hub_within_reach(what):
            config = json.loads(Path(hf_hub_download(repository, CHECKPOINT_CONFIG)).read_bytes())
        return dict(config.get("model_cfg", config))
    except UsageError:
        raise
    except Exception as error:  # of HTTP, the library or a file that is no config
        other = f"gives no {CHECKPOINT_CONFIG} ({printable(' '.join(str(error).split()))}). Try again, or name another"
        advice = next((advice for kind, advice in _ADVICE if isinstance(error, kind)), other)
        raise UsageError(f"{what}: {printable(repository)} on {host} {advice}") from error


@contextmanager
def hub_within_reach(what: str) -> Iterator[None]:
    """Let the block read models of Hugging Face's hub; if the hub does not answer, from local copies alone.

    The hub's library would try each file six times, for a minute in all.

    Raises:
        UsageError: a file has no local copy, and the hub does not answer or ``HF_HUB_OFFLINE`` is set.
    """
    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not hub_answers()
    try:
        yield
    except Exception as error:
        if not constants.HF_HUB_OFFLINE or not _DOWNLOAD.search(str(error)):
            raise
        reason = "HF_HUB_OFFLINE is set" if offline else f"{urlsplit(constants.ENDPOINT).netloc} cannot be reached"
        raise UsageError(
            f"{what}: {reason}, and there is no local copy. Offline: docs/howto/offline.md, or name a local folder"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def hub_answers() -> bool:
    """Return whether the hub, or the proxy to it, answers within some seconds, with whatever status."""
    answered: Queue[bool] = Queue()

    def ask() -> None:
        with suppress(Exception):  # each library of HTTP has its own errors
            get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
            answered.put(True)
        answered.put(False)

    # a thread: looking up a name has no timeout
    Thread(target=ask, daemon=True).start()
    with suppress(Empty):
        return answered.get(timeout=_HUB_SECONDS)
    return False
