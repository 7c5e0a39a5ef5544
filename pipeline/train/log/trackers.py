"""Trackers that show a run's scalars: TensorBoard, Weights & Biases, MLflow, trackio. None is imported unasked."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from teacher_cache.storage.errors import MissingPackageError, UsageError
from teacher_cache.storage.observe.logs import logger

_LOG = logger("train")

PROJECT = "teacher-cache"
"""Project, or MLflow experiment, of all runs, unless the environment names another one as the tracker documents it."""

_FLUSH_SECONDS = 30
_WAIT_SECONDS = "20"
_ID_TAG = "teacher_cache.run"


@dataclass(frozen=True)
class TrackedRun:
    """Facts about a run that a tracker gets.

    Attributes:
        folder: folder of the run.
        id: random name, the same for a run that is resumed.
        first_step: last step before this process.
        settings: settings and facts that the tracker lists beside the curves.
    """

    folder: Path
    id: str
    first_step: int
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name that people see, and no other run has."""
        return f"{self.folder.resolve().name}-{self.id[:6]}"


class Tracker(Protocol):
    """A program that draws scalars over steps. After a resume, steps since the last checkpoint come again."""

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Add the scalars of a step; steps count from 1."""

    def flush(self) -> None:
        """Hand over all steps so far."""

    def close(self, finished: bool) -> None:
        """End the run there, as finished, or as stopped and perhaps resumed later."""


class _TensorBoard:
    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard drops later steps of an earlier process
        purged = run.first_step + 1 if run.first_step else None
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purged, flush_secs=_FLUSH_SECONDS)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run: TrackedRun) -> None:
        import wandb

        os.environ.setdefault("WANDB_INIT_TIMEOUT", _WAIT_SECONDS)
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        # of steps that come again wandb keeps the first
        self._run = wandb.init(
            project=project,
            dir=run.folder,
            id=run.id,
            name=run.name,
            config=dict(run.settings),
            resume="allow",
            settings=wandb.Settings(console="off"),  # else it keeps the progress bar
        )

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def flush(self) -> None:
        """Do nothing: a process of wandb's own writes each step."""

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class _MLflow:
    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        import mlflow

        self._mlflow = mlflow
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
            mlflow.set_experiment(PROJECT)
        begun: Any = mlflow.search_runs(filter_string=f"tags.`{_ID_TAG}` = '{run.id}'", output_format="list")
        if begun:
            mlflow.start_run(run_id=begun[0].info.run_id)
        else:
            mlflow.start_run(run_name=run.name, tags={_ID_TAG: run.id})
            mlflow.log_params(dict(run.settings))

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        # MLflow's names have no @
        metrics = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in scalars.items()}
        self._mlflow.log_metrics(metrics, step=step, synchronous=False)

    def flush(self) -> None:
        self._mlflow.flush_async_logging()

    def close(self, finished: bool) -> None:
        self.flush()
        self._mlflow.end_run("FINISHED" if finished else "KILLED")


class _Trackio:
    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self._trackio, project = trackio, os.environ.get("TRACKIO_PROJECT", PROJECT)
        trackio.init(project=project, name=run.name, config=dict(run.settings), resume="allow", embed=False)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(scalars), step=step)

    def flush(self) -> None:
        """Do nothing: a thread of trackio's own writes each step."""

    def close(self, finished: bool) -> None:
        self._trackio.finish()


_TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


def require_trackers(names: tuple[str, ...]) -> None:
    """Check that the packages of these trackers are installed. Imports none of them.

    Raises:
        MissingPackageError: one is not.
    """
    for name in names:
        if find_spec(name) is None:
            raise MissingPackageError(name, f"report_to {name}")


class Trackers:
    """All trackers of a run as one. One that fails while the run goes on is left out from then on, with a warning.

    Args:
        names: of the setting ``report_to``.

    Raises:
        MissingPackageError: the package of a tracker is not installed.
        UsageError: a tracker does not begin the run, for example as nobody is logged in there.
    """

    def __init__(self, names: tuple[str, ...], run: TrackedRun) -> None:
        require_trackers(names)
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            try:
                with redirect_stdout(sys.stderr):  # stdout is for the result
                    self._trackers[name] = _TRACKERS[name](run)
            except Exception as error:  # each tracker has exceptions of its own
                self.close(finished=False)
                raise UsageError(f"report_to {name}: {_said(error)}.{_ADVICE.get(name, '')}") from error

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Add the scalars of a step; steps count from 1."""
        self._each(lambda tracker: tracker.log(scalars, step))

    def flush(self) -> None:
        """Hand over all steps so far."""
        self._each(lambda tracker: tracker.flush())

    def close(self, finished: bool) -> None:
        """End the run in each tracker."""
        self._each(lambda tracker: tracker.close(finished))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                with redirect_stdout(sys.stderr):
                    call(tracker)
            except Exception as error:  # hours of training are worth more than a curve
                del self._trackers[name]
                _LOG.warning("report_to %s: %s. The run goes on without it; log.jsonl has all", name, _said(error))


_ADVICE = {
    "wandb": " Without an account or a network: WANDB_MODE=offline, and later wandb sync.",
    "mlflow": " MLFLOW_TRACKING_URI names the server, or a folder as file:mlruns.",
}


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('. ') if lines else 'no message'}"
