"""What a run writes down of each step: ``log.jsonl`` with what repeats itself, TensorBoard with the timings too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import EpochRecord
from teacher_cache.pipeline.train.step import StepValues

__all__ = ["FOLDER", "StepLog"]

FOLDER = "tensorboard"
_FLUSH_SECONDS = 30


class StepLog:
    """Both logs of one run; only the process of rank 0 has one.

    Args:
        first_step: the step after which this process goes on; TensorBoard drops what an earlier process wrote beyond.
    """

    def __init__(self, run: RunFolder, first_step: int = 0) -> None:
        self._run = run
        self._writer = SummaryWriter(
            str(Path(run.path) / FOLDER), purge_step=first_step + 1 if first_step else None, flush_secs=_FLUSH_SECONDS
        )

    def step(
        self, step: int, epoch: int, values: StepValues, samples_per_second: float, data_wait_share: float
    ) -> None:
        """Write down one step; steps count from 1."""
        self._run.log(
            {
                "step": step,
                "epoch": epoch,
                "loss": values.loss,
                **values.parts,
                "learning_rate": values.learning_rate,
                "grad_norm": values.grad_norm,
                "logit_scale": values.logit_scale,
            }
        )
        scalars: dict[str, Any] = {
            "loss": values.loss,
            **{f"loss/{name}": value for name, value in values.parts.items()},
            "learning_rate": values.learning_rate,
            "grad_norm": values.grad_norm,
            "logit_scale": values.logit_scale,
            "samples_per_second": samples_per_second,
            "data_wait_share": data_wait_share,
        }
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def epoch(self, step: int, record: EpochRecord) -> None:
        """Write down the means of an epoch, and what was measured behind it, at its last step."""
        self._writer.add_scalar("epoch/loss", record.loss, step)
        if record.selection is not None:
            self._writer.add_scalar("select/mean_recall", record.selection.mean_recall, step)
            for direction, recalls in record.selection.recalls.items():
                for name, value in recalls.items():
                    self._writer.add_scalar(f"select/{direction}_{name}", value, step)

    def flush(self) -> None:
        """Have all steps on disk, so that what a resume point knows is in both logs."""
        self._writer.flush()
        self._run.sync_log()

    def close(self) -> None:
        """Write what is left; the log takes no more."""
        self._writer.close()
