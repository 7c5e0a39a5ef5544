"""Loading of models from untrusted files: no code in them is run, and an unusable file raises one UsageError.

Weights come from safetensors, or from a pickle that torch reads with ``weights_only=True``, which builds only tensors.
Tokenizers of ``transformers`` may come with Python code: it is never run, and a config that requires it is refused.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import open_clip
from open_clip.tokenizer import SimpleTokenizer

from teacher_cache.pipeline.data.tokens import PATTERN, ClipTokenizer
from teacher_cache.pipeline.models.hub import hub_within_reach
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.safe_text import printable

_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".npz", ".npy")


@contextmanager
def foreign_model(what: str) -> Iterator[None]:
    """Turn errors of open_clip, torch, timm or safetensors for unusable files into one line.

    Raises:
        UsageError: begins with ``what``.
    """
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except ImportError as error:
        raise UsageError(f"{what} needs a package that is not installed: {error}. Install it.") from error
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{what} cannot be loaded: its weights are a pickle of more than tensors, or a damaged one, and code in "
            "weights is never run. Ask for its safetensors file, or save its state_dict as one."
        ) from error
    # EOFError, KeyError, StopIteration, BadZipFile ...: each library has its own errors for a bad file
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{what} cannot be loaded: {printable(text)}") from error


@contextmanager
def quiet_root(level: int) -> Iterator[None]:
    """Drop what libraries log below a level through the root logger in the block: open_clip logs errors it raises."""
    before = logging.getLogger().level
    logging.getLogger().setLevel(level)
    try:
        yield
    finally:
        logging.getLogger().setLevel(before)


def require_plain_settings(config: Any, what: str) -> None:
    """Check that a model config lets ``transformers`` run no Python code of the model.

    open_clip passes ``tokenizer_kwargs`` on unchanged. This call also stops ``transformers`` from asking the user.

    Raises:
        UsageError: the config has a ``trust_remote_code`` that is not false, at any depth.
    """
    waiting = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if value.get("trust_remote_code", False) is not False:
                raise UsageError(f"{what}: its config asks for trust_remote_code, and code of a model is never run.")
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    text = config.get("text_cfg") if isinstance(config, dict) else None
    if isinstance(text, dict) and text.get("hf_model_name"):
        with suppress(ImportError):  # then open_clip names the missing package
            # open_clip has no option to refuse for a text tower, so transformers would ask on the terminal
            remote_code: Any = import_module("transformers.dynamic_module_utils")
            remote_code.TIME_OUT_REMOTE_CODE = 0


def require_plain_files(folder: Path, what: str) -> None:
    """Check that the weights in a model folder are no pipe or device, which may block for ever.

    Raises:
        UsageError: one is. The message names it.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in _WEIGHTS and not path.is_file():
            raise UsageError(f"{what}: {path} is no plain file; remove it")


def load_tokenizer(source: str, config: dict[str, Any]) -> Any:
    """Return the tokenizer of a model: CLIP's own without torch, any other from open_clip.

    Its context length is the config's, or 77: a text tower of transformers allows more than it has learned, or any.

    Tokenizers of ``transformers`` are loaded without running code. ``source`` is open_clip's name of the model.
    """
    text = config.get("text_cfg") or {}
    foreign = text.get("hf_tokenizer_name")
    refuse = {"trust_remote_code": False} if foreign else {}
    with hub_within_reach(f"tokenizer {foreign!r}") if foreign else nullcontext():
        return clip_tokenizer(open_clip.get_tokenizer(source, **refuse))


def clip_tokenizer(tokenizer: Any) -> Any:
    """Return a :class:`ClipTokenizer` with the same ids. Other and randomised tokenizers are returned unchanged."""
    if (
        type(tokenizer) is not SimpleTokenizer
        or tokenizer.reduction_fn is not None
        or tokenizer.pat.pattern != PATTERN
        or len(tokenizer.all_special_ids) != 2
    ):
        return tokenizer
    clean: Any = tokenizer.clean_fn.__name__.removeprefix("_clean_")
    return ClipTokenizer(list(tokenizer.bpe_ranks), clean, tokenizer.context_length)
