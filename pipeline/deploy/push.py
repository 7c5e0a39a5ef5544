"""Upload of a student to Hugging Face's hub in open_clip's form: one commit, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from pydantic import BaseModel

from teacher_cache.pipeline.deploy.card import on_hub, run_card
from teacher_cache.pipeline.deploy.formats.openvino_ir import FOLDER as OPENVINO
from teacher_cache.pipeline.deploy.record import RECORD, Artefact, Deployment
from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult
from teacher_cache.pipeline.models.hub import hub_answers
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import (
    CHECKPOINT_WEIGHTS,
    RunRecord,
    checkpoint_image_size,
    open_clip_config,
    require_checkpoint,
)
from teacher_cache.pipeline.settings.deploy import PushConfig
from teacher_cache.pipeline.settings.names import CHECKPOINT_CONFIG
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.safe_text import printable

_CARD = "README.md"
_TABLE = ("table.json", "table.md", "table.png")
_NEXT = {
    401: "Log in again by hf auth login, with a token that may write",
    403: "Take a token that may write there, by hf auth login, or another --to",
}

_Files = dict[str, Path | bytes]


class PushResult(BaseModel, frozen=True):
    """The result of an upload."""

    repository: str
    url: str
    commit: str
    files: dict[str, int]
    """Bytes of each file by its name."""


def push(config: PushConfig) -> PushResult:
    """Upload a run's student: config, weights and model card, and with ``deployed`` the deployment's files.

    A second push replaces these files, the card too, and removes the files of an earlier deployment. Other files in
    the repository stay.

    Raises:
        UsageError: the run is unfinished or has no such checkpoint, ``deployed`` was not made of it, the user is not
            logged in or may not write, the repository is public against ``private``, or the hub cannot be reached.
        DeploymentError: a deployed file is missing or was changed.
        ConnectionError: the hub refused the upload, or was lost during it.
    """
    run = RunFolder(config.run)
    record = run.read()
    run.require_finished(record)
    checkpoint = run.checkpoint_path(config.checkpoint)
    require_checkpoint(checkpoint)
    files = _deployed(config, checkpoint) if config.deployed else _trained(run, record, checkpoint)
    card = files[_CARD]
    text = card.decode() if isinstance(card, bytes) else card.read_text()
    files[_CARD] = on_hub(text, config.to).encode()
    with _hub(config.to) as hub:
        url = hub.create_repo(config.to, private=config.private or None, exist_ok=True)
        if config.private and not hub.repo_info(config.to).private:
            raise UsageError(f"{config.to}: is there and public. Leave --private out, or choose a new name")
        before = set(hub.list_repo_files(config.to))
        stale = _deployment_files(before) - set(files) if RECORD in before else set()
        commit = hub.create_commit(
            config.to,
            [
                *(CommitOperationDelete(name) for name in sorted(stale)),
                *(CommitOperationAdd(name, source) for name, source in files.items()),
            ],
            commit_message=f"Student of {record.teacher}, by teacher-cache",
        )
    sizes = {
        name: len(source) if isinstance(source, bytes) else source.stat().st_size for name, source in files.items()
    }
    return PushResult(repository=config.to, url=str(url), commit=commit.oid, files=sizes)


def _trained(run: RunFolder, record: RunRecord, checkpoint: Path) -> _Files:
    name = f"{Path(record.config.student).stem}-{run.path.resolve().name}"
    evaluations = [EvaluateResult.model_validate_json(path.read_bytes()) for path in run.evaluation_files()]
    measured = [
        result
        for result in evaluations
        if Path(result.checkpoint or "").name == checkpoint.name
        and result.cache_manifest_digest == record.cache_manifest_digest
        and result.caption_kind is None
    ]
    return {
        CHECKPOINT_CONFIG: open_clip_config(checkpoint).encode(),
        CHECKPOINT_WEIGHTS: checkpoint / CHECKPOINT_WEIGHTS,
        _CARD: run_card(name, record, checkpoint_image_size(checkpoint), measured).encode(),
    }


def _deployed(config: PushConfig, checkpoint: Path) -> _Files:
    folder = Path(config.deployed or "")
    deployment = Deployment.read(folder)
    if deployment.weights != Artefact.of(checkpoint / CHECKPOINT_WEIGHTS):
        raise UsageError(
            f"{folder}: was deployed from {deployment.run}, {deployment.checkpoint}, which has other weights "
            f"than {checkpoint}, or by an earlier version. Deploy that checkpoint again, to another --out"
        )
    artefacts = [artefact.file for artefact in deployment.artefacts() if deployment.proven(folder, artefact)]
    return {name: folder / name for name in (*artefacts, CHECKPOINT_CONFIG, RECORD, *_TABLE, _CARD)}


def _deployment_files(names: set[str]) -> set[str]:
    made = (RECORD, "tokenizer.json", *_TABLE)
    return {name for name in names if name.endswith(".onnx") or name.startswith(f"{OPENVINO}/") or name in made}


@contextmanager
def _hub(repository: str) -> Iterator[HfApi]:
    """Yield the hub's client; its errors in the block become one line.

    Raises:
        UsageError: no token, no permission, or no hub.
        ConnectionError: any other error of the hub or on the way to it.
    """
    host = urlsplit(constants.ENDPOINT).netloc
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"{repository}: HF_HUB_OFFLINE is set, so that nothing can be uploaded. Unset it")
    if get_token() is None:
        raise UsageError(f"{repository}: not logged in to {host}. Log in by hf auth login, or set HF_TOKEN")
    if not hub_answers():
        raise UsageError(f"{repository}: {host} cannot be reached. Try again with a network, or see HF_ENDPOINT")
    try:
        yield HfApi(library_name="teacher-cache")
    except UsageError:
        raise
    # httpx's errors, the library's own, those of its Rust part, and RuntimeError for an upload
    except Exception as error:
        cause = error.__cause__ or error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        answer = printable(getattr(cause, "server_message", None) or str(cause).strip().partition("\n")[0])
        text = f"{repository}: {host} did not take it ({answer})."
        if status in _NEXT:
            raise UsageError(f"{text} {_NEXT[status]}") from error
        raise ConnectionError(f"{text} A push is one commit, so no file was replaced alone. Push again") from error
