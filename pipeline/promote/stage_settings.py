"""Settings of each stage of a retraining, made from one :class:`RetrainConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.settings.base import Checkpoint
from teacher_cache.pipeline.settings.deploy import DeployConfig
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.promote import PromoteConfig, RetrainConfig
from teacher_cache.pipeline.settings.run_file import check_config
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.storage.errors import UsageError

_SET_HERE = {
    "precompute": {
        *("dataset", "teacher", "pretrained", "precision", "dtype", "decoder", "views", "cache", "reuse", "device")
    },
    "train": {"cache", "student", "out", "init", "device"},
    "deploy": {"run", "out", "checkpoint", "cache", "split", "teacher", "pretrained"},
}


@dataclass(frozen=True)
class StageSettings:
    """The settings of a retraining's stages, as their commands take them.

    Attributes:
        config: settings of the retraining.
    """

    config: RetrainConfig

    def check(self) -> TrainConfig:
        """Check the settings of every stage, and return the training settings. Called before hours of work.

        Raises:
            UsageError: a setting cannot be used, or retraining sets it itself.
        """
        config = self.config
        for stage, names in (("precompute", config.precompute), ("train", config.train), ("deploy", config.deploy)):
            if taken := sorted(set(names) & _SET_HERE[stage]):
                raise UsageError(f"{stage}: {', '.join(taken)}: set by retraining itself; leave it out")
        self.deployment("run", "out", "last")
        self.encoding({})
        return self.training("cache", "out", "champion")

    def encoding(self, stored: dict[str, Any], crops: dict[str, Any] | None = None) -> PrecomputeConfig:
        """Return the settings of precompute.

        Args:
            stored: location and storage settings of the cache.
            crops: random crop settings of the previous cache; the user's settings take precedence.
        """
        names = ("dataset", "teacher", "pretrained", "precision", "device")
        fixed = {"cache": "cache", **{name: getattr(self.config, name) for name in names}, **stored}
        defaults = {"max_problems": f"{self.config.max_removed}%", **(crops or {})}
        return check_config(PrecomputeConfig, defaults | self.config.precompute | fixed, "precompute")

    def training(self, cache: str, out: str, init: str | None) -> TrainConfig:
        """Return the settings of train.

        Args:
            init: checkpoint to start from; None for random weights, with no locked layers.
        """
        config = self.config
        fixed: dict[str, Any] = {"cache": cache, "student": config.student, "out": out, "device": config.device}
        if init is None:
            fixed["lock_image_unlocked_groups"] = None
        return check_config(TrainConfig, config.train | fixed | {"init": init}, "train")

    def comparison(self, run: str, registry: str) -> PromoteConfig:
        """Return the settings of promote."""
        shared = self.config.model_dump(include={"split", "margin", "min_retention", "device"})
        # the dataset of a home may lose images, up to max_removed
        accept = ("dataset",)
        return PromoteConfig(
            run=run,
            registry=registry,
            checkpoint=self.checkpoint(run),
            accept_mismatch=accept,
            accept_learned=True,  # the splits are the user's, and refusing now would cost the training
            **shared,
        )

    def deployment(self, run: str, out: str, checkpoint: Checkpoint) -> DeployConfig:
        """Return the settings of deploy."""
        config = self.config
        fixed = {"run": run, "out": out, "checkpoint": checkpoint, "split": config.split}
        teacher = {"teacher": config.teacher, "pretrained": config.pretrained}
        return check_config(DeployConfig, config.deploy | fixed | teacher, "deploy")

    def checkpoint(self, run: str) -> Checkpoint:
        """Return "best", or "last" if the best was chosen on the comparison split or there is no select split."""
        return "last" if RunFolder(run).read().config.select_split in (None, self.config.split) else "best"
