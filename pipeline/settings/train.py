"""Settings of training and of the pixels that it can read instead of images."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from teacher_cache.pipeline.settings.base import (
    AcceptMismatch,
    CachesConfig,
    Device,
    ImageRoot,
    LearnedSplit,
    LoaderWorkers,
    Seed,
    StageConfig,
    StudentName,
    comma_separated,
    learned_split,
)
from teacher_cache.pipeline.settings.recipes import DEFAULT, IMAGE_LOSSES, LOSS_NAMES, RECIPE_SETTINGS, RECIPES
from teacher_cache.pipeline.settings.run_file import check_config
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.quantities import counted

_FOR_IMAGES = " and ".join(IMAGE_LOSSES)


IMAGES_ALONE = "To learn from the images alone: --set captions_per_image=0."
"""Advice where training images have no caption."""


def _tracker_names(value: Any) -> Any:
    return () if value == "none" else comma_separated(value)


ReportTo = Annotated[
    tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...],
    BeforeValidator(_tracker_names),
    Field(description="Trackers that show each step: tensorboard, wandb, mlflow, trackio; or none."),
]


Exclude = Annotated[str | None, Field(description="File of twins --out: images to leave out. Default: none.")]


class TrainConfig(CachesConfig):
    """Train a student from the finished caches of one teacher or several. No teacher is loaded.

    A recipe (``teacher_cache.pipeline.settings.recipes``) fills the settings of ``RECIPE_SETTINGS`` that are absent
    or None. A config therefore always holds the numbers: explicit settings first, then the recipe's.
    """

    cache: str = Field(description="Folder or URL of a finished cache; again for other_caches.")
    student: StudentName
    out: str = Field(description="Folder to write the run into.")
    init: str | None = Field(
        None,
        description="Checkpoint, folder of student inherit, or hf-hub:ORG/NAME whose weights to start from, of "
        "the same architecture. Default: random.",
    )
    lock_image_unlocked_groups: int | None = Field(
        None,
        ge=0,
        description="Number of layer groups at the end of the image tower that are trained, as in open_clip. The "
        "groups before them keep the weights of init. Default: all are trained.",
    )
    train_image_size: int | None = Field(
        None,
        gt=0,
        description="Side in pixels of the training images of a convolutional student, often 4/5 of its image_size. "
        "It is still measured and shipped at its own image_size. Default: the student's own.",
    )
    split: LearnedSplit = "train"
    image_root: ImageRoot = None
    pixels: str | None = Field(None, description="Folder of student pixels. Default: decode the images in each epoch.")
    expect: str | None = Field(
        None,
        description="Cache, run, or file of info --json whose teacher, preprocessing, tokenizer, views, targets and "
        "dataset this cache must have. Default: no check.",
    )
    accept_mismatch: AcceptMismatch = ()
    recipe: str = Field(
        "default",
        description=f"Named set of losses and optimizer settings: {', '.join(RECIPES)}. Explicit settings win.",
    )
    views: int | None = Field(
        None, gt=0, description="Number of the cache's views to train on, from the first. Default: all."
    )
    exclude: Exclude = None
    captions_per_image: int = Field(
        1,
        ge=0,
        description="Number of captions per image in a step. The losses are averaged over them. 0: images alone, with "
        f"{_FOR_IMAGES}; the text tower keeps its weights. Default: 1, or 0 if no image has a caption.",
    )
    caption_kinds: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="Weight of each kind of captions, for example real and synthetic: an image draws a kind among "
        "those that it has, then captions of this kind. Default: all captions alike.",
    )
    teacher_weights: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (),
        description="Weight of each teacher's losses, in the order of the caches; the losses are averaged by them. "
        "Default: equal.",
    )
    unmatched: Literal["refuse", "drop"] = Field(
        "refuse",
        description="Images that another teacher's cache lacks, or lacks a caption of: refuse the run, or drop them.",
    )
    epochs: int = Field(10, gt=0, description="Number of passes over the split, with captions at random.")
    batch_size: int = Field(256, gt=1, description="Number of images per step, over all devices; at most the split's.")
    micro_batch: int | None = Field(
        None,
        gt=0,
        description="Number of images per forward pass and device. Saves memory and costs a third more time; the loss "
        "still compares the whole batch. Default: the whole batch at once.",
    )
    learning_rate: float = Field(
        DEFAULT.learning_rate,
        gt=0,
        description="Peak learning rate, before cosine decay to 0. Default: the recipe's.",
    )
    weight_decay: float = Field(
        DEFAULT.weight_decay,
        ge=0,
        description="Weight decay of AdamW, except on biases, norms and logit_scale. Default: the recipe's.",
    )
    warmup_fraction: float = Field(
        DEFAULT.warmup_fraction,
        ge=0,
        lt=1,
        description="Share of all steps in which the learning rate rises. Default: the recipe's.",
    )
    clip_grad_norm: float = Field(1.0, gt=0, description="Maximum norm of the gradient.")
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay of a moving average of the weights, which is then measured and saved. 0 disables it.",
    )
    losses: dict[str, float] = Field(
        default=DEFAULT.losses,
        description=f"Weight of each loss by name: {', '.join(LOSS_NAMES)}. Losses without a weight are not computed. "
        "Default: the recipe's.",
    )
    label_smoothing: float = Field(
        DEFAULT.label_smoothing,
        ge=0,
        lt=1,
        description="Label smoothing of the contrastive loss. Default: the recipe's.",
    )
    temperature: float = Field(
        DEFAULT.temperature,
        gt=0,
        description="Temperature of both softmaxes of the relational_mse loss. Default: the recipe's.",
    )
    queue_rows: int = Field(
        0,
        ge=0,
        validate_default=True,
        description="Number of recent teacher rows that the queue loss compares with. An image takes one row per "
        "caption. 0 disables the queue.",
    )
    window_chunks: int = Field(16, gt=0, description="Number of chunks that are shuffled together.")
    seed: Seed = Field(0, description="Seed of initial weights, order and choice of captions.")
    device: Device = "auto"
    devices: int = Field(1, gt=0, description="Number of devices of this machine that share each batch.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Precision of the forward pass; losses are float32.")
    compile: bool = Field(
        False, description="Compile both towers: takes minutes at the start, then steps are faster on a GPU."
    )
    deterministic: bool = Field(
        False,
        description="Use only kernels that repeat their bits on a GPU, which are slower; a layer without one ends the "
        "run. On a CPU a run repeats anyway.",
    )
    workers: LoaderWorkers = None
    checkpoint_seconds: float = Field(
        300.0, gt=0, description="Maximum time in seconds between points from which --resume continues."
    )
    checkpoint_steps: int | None = Field(
        None, gt=0, description="Maximum number of steps between such points. Default: no limit."
    )
    rank_timeout_seconds: float = Field(
        4 * 3600.0,
        gt=0,
        le=30 * 86400,
        description="Time in seconds that a device waits for the others before the run ends: more than rank 0 takes to "
        "measure the select split or to save. Default: 4 hours.",
    )
    select_split: str | None = Field(
        None,
        description="Split on which each epoch is measured; the best epoch becomes checkpoint best. Default: none.",
    )
    select_every: int = Field(1, gt=0, description="Number of epochs between these measurements.")
    report_to: ReportTo = ("tensorboard",)

    @property
    def caches(self) -> tuple[str, ...]:
        """Locations of all caches, the first one first."""
        return (self.cache, *self.other_caches)

    @property
    def teacher_shares(self) -> tuple[float, ...]:
        """Share of each teacher in the loss, in the order of the caches; their sum is 1."""
        weights = self.teacher_weights or (1.0,) * len(self.caches)
        return tuple(weight / sum(weights) for weight in weights)

    def fitted(self, splits: Collection[str], count: Callable[[str], int]) -> TrainConfig:
        """Return the settings for a cache: its only split if none is set, and batches no larger than the split.

        Args:
            splits: splits of the cache.
            count: function that returns the number of images of a split that have an embedding.

        Raises:
            UsageError: the split has too few images for one batch, or is ``select_split``.
        """
        split = learned_split(self, splits)
        images = count(split)
        batch_size = min(self.batch_size, images - images % self.devices)
        if batch_size < 2:
            where = f"{self.cache}: split {split!r}" if split else self.cache
            raise UsageError(f"{where} has {counted(images, 'image')}; training needs {max(2, self.devices)}")
        if (split, batch_size) == (self.split, self.batch_size):
            return self
        return check_config(TrainConfig, self.model_dump() | {"split": split, "batch_size": batch_size}, "train")

    @model_validator(mode="after")
    def _check_settings_agree(self) -> TrainConfig:
        if self.batch_size % self.devices:
            raise ValueError(f"batch_size {self.batch_size} cannot be shared evenly by {self.devices} devices")
        if self.lock_image_unlocked_groups is not None and self.init is None:
            raise ValueError("lock_image_unlocked_groups keeps the weights of init, and none is given: name one")
        if self.teacher_weights and len(self.teacher_weights) != len(self.caches):
            raise ValueError(
                f"teacher_weights has {counted(len(self.teacher_weights), 'weight')} for "
                f"{counted(len(self.caches), 'cache')}: give one for each"
            )
        if self.select_split == self.split:
            raise ValueError(f"select_split {self.select_split!r} is the split to train on; name one it never sees")
        if self.caption_kinds and not self.captions_per_image:
            raise ValueError("caption_kinds draws captions, and captions_per_image is 0: leave one of them out")
        if self.captions_per_image == 0:
            self._check_images_alone()
        pairs = self.batch_size * self.captions_per_image
        if 0 < self.queue_rows < pairs and self.losses.get("queue", 0) > 0:
            raise ValueError(
                f"queue_rows {self.queue_rows} cannot hold the {pairs} pairs of one batch, so some would have no "
                "match among the queued rows; set it to some 10 batches"
            )
        return self

    def _check_images_alone(self) -> None:
        paired = [name for name, weight in self.losses.items() if weight > 0 and name not in IMAGE_LOSSES]
        if paired:
            raise ValueError(
                f"losses {', '.join(paired)} compare images with captions, and this run has no captions; for images "
                f"alone there are {_FOR_IMAGES}"
            )
        if self.select_split is not None:
            raise ValueError("select_split is measured by recall, which needs captions; leave it out")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_recipe(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        derived = {*RECIPE_SETTINGS, "split"}
        explicit = {name: value for name, value in settings.items() if name not in derived or value is not None}
        name = explicit.get("recipe", "default")
        if not isinstance(name, str) or name not in RECIPES:
            return explicit  # _check_recipe refuses it by name
        recipe = asdict(RECIPES[name])
        if explicit.get("captions_per_image") in (0, "0"):
            recipe["losses"] = {loss: weight for loss, weight in recipe["losses"].items() if loss in IMAGE_LOSSES}
            if not recipe["losses"] and not explicit.get("losses"):
                raise ValueError(f"recipe {name} has no loss for images alone; set losses of {_FOR_IMAGES}")
        return recipe | explicit

    @field_validator("pixels", mode="before")
    @classmethod
    def _read_empty_as_none(cls, pixels: Any) -> Any:
        return pixels or None  # --set pixels= resumes a run whose folder of pixels is gone

    @field_validator("recipe")
    @classmethod
    def _check_recipe(cls, recipe: str) -> str:
        if recipe not in RECIPES:
            raise ValueError(f"recipe {recipe!r} is not known; there are {', '.join(RECIPES)}")
        return recipe

    @field_validator("losses")
    @classmethod
    def _check_losses(cls, losses: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(losses) - set(LOSS_NAMES))
        if unknown:
            raise ValueError(f"losses {', '.join(unknown)} are not known; there are {', '.join(LOSS_NAMES)}")
        if not any(weight > 0 for weight in losses.values()) or min(losses.values()) < 0:
            raise ValueError(f"weights must be >= 0 and one of them > 0, found {losses}")
        return losses

    @field_validator("queue_rows")
    @classmethod
    def _check_queue(cls, queue_rows: int, info: ValidationInfo) -> int:
        if not queue_rows and info.data.get("losses", {}).get("queue", 0) > 0:
            raise ValueError("the queue loss has a weight and no queue; set queue_rows to some 10 batches, or more")
        return queue_rows


class PixelsConfig(StageConfig):
    """Decode the images of a split once, for all runs of students with one image size."""

    cache: str = Field(description="Folder or URL of a finished cache.")
    student: StudentName
    out: str = Field(description="Local folder to write, near the trainer. An unfinished one is continued.")
    train_image_size: int | None = Field(
        None, gt=0, description="Side in pixels of the training images, as for train. Default: the student's own."
    )
    split: LearnedSplit = "train"
    exclude: Exclude = None
    views: int | None = Field(None, gt=0, description="Number of the cache's views, from the first. Default: all.")
    image_root: ImageRoot = None
    threads: int | None = Field(None, gt=0, description="Number of threads that decode. Default: one per core.")


class OpenClipTrainConfig(StageConfig):
    """Train with open_clip's own trainer, with a cache in the place of its ``--distill-model``."""

    cache: str = Field(description="Folder or URL of a finished cache that holds every pair of --train-data.")
    arguments: tuple[str, ...] = Field(description="Arguments of open_clip_train, behind --.")
    views: int | None = Field(
        None, gt=0, description="Number of the cache's views to show, from the first. Default: all, drawn at random."
    )
    exclude: str | None = Field(
        None, description="File of twins --out: a pair of one of its images is refused. Default: none."
    )

    @field_validator("arguments")
    @classmethod
    def _check_teacher(cls, arguments: tuple[str, ...]) -> tuple[str, ...]:
        if distill_options := [word for word in arguments if word.startswith("--distill")]:
            raise ValueError(f"{distill_options[0]} names a teacher, and here the cache is the teacher; leave it out")
        return arguments
