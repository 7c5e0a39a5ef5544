"""Zero-shot classification over the 27 datasets of CLIP's table (Radford et al. 2021, table 9), a folder for each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from pydantic import BaseModel, Field

from teacher_cache.pipeline.data.datasets.adapters.labelled import form_of
from teacher_cache.pipeline.evaluate.zero_shot.measure import Progress, ZeroShotResult, zero_shot
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.settings.evaluate import ZeroShotConfig
from teacher_cache.storage.errors import CacheError, UsageError
from teacher_cache.storage.observe.safe_text import printable

# prompt set -> torchvision's dataset, whose layout its folder may have; "" if torchvision has none
CLIP_DATASETS = {
    "birdsnap": "",
    "caltech101": "Caltech101",
    "cars": "StanfordCars",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "clevr_count_all": "",
    "country211": "Country211",
    "dtd": "DTD",
    "eurosat": "EuroSAT",
    "fer2013": "FER2013",
    "fgvc_aircraft": "FGVCAircraft",
    "flowers": "Flowers102",
    "food101": "Food101",
    "gtsrb": "GTSRB",
    "hateful_memes": "",
    "imagenet1k": "ImageNet",
    "kinetics700": "",
    "kitti_closest_vehicle_distance": "",
    "mnist": "MNIST",
    "pcam": "PCAM",
    "pets": "OxfordIIITPet",
    "renderedsst2": "RenderedSST2",
    "resisc45": "",
    "stl10": "STL10",
    "sun397": "SUN397",
    "ucf101": "",
    "voc2007": "",
}
# measures of table 9 other than top-1; its 11-point mAP of VOC2007 is not computed
_MEASURES = {
    **dict.fromkeys(("caltech101", "fgvc_aircraft", "flowers", "pets"), "mean per class"),
    "hateful_memes": "ROC AUC",
    "kinetics700": "mean of top-1 and top-5",
}
# whose table is of the validation images: the labels of the test images were withheld
_MEASURED_ON_VAL = ("imagenet1k", "kinetics700")


class DatasetRow(BaseModel, frozen=True):
    """One dataset in percent of its own measure, or the reason why it cannot be measured."""

    name: str
    measure: str
    teacher: float | None = None
    student: float | None = None
    share: float | None = Field(None, description="Student's measure in percent of the teacher's.")
    problem: str = Field("", description="Reason why it was not measured.")
    result: ZeroShotResult | None = None


class AllDatasets(BaseModel, frozen=True):
    """All datasets of a folder."""

    root: str
    rows: tuple[DatasetRow, ...]
    missing: tuple[str, ...] = Field(description="Datasets of CLIP's table without a folder.")
    other_folders: tuple[str, ...] = Field(description="Folders without the name of a dataset of the table.")
    mean: DatasetRow = Field(description="Means over the measured datasets, and the share of these two means.")

    @property
    def ok(self) -> bool:
        """Return whether all datasets with a folder were measured."""
        return not any(row.problem for row in self.rows)


def zero_shot_all(config: ZeroShotConfig, progress: Progress | None = None) -> AllDatasets:
    """Measure every dataset of CLIP's table that has a folder in ``config.dataset``, one after the other.

    A dataset that cannot be measured becomes a row with the reason. With ``config.cache``, a folder, the teacher's rows
    of each dataset are in ``NAME.cache`` in it.

    Raises:
        UsageError: no model is set, the run has no such checkpoint, the folder holds none of the datasets, or a setting
            is one of a single dataset.
    """
    config.require_model()
    config.require_root()
    if config.run is not None:
        RunFolder(config.run).load_checkpoint(config.checkpoint, lambda path: None)
    root = Path(config.dataset)
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    present = [name for name in CLIP_DATASETS if name in folders]
    if not present:
        raise UsageError(
            f"{root}: no folder of a dataset in it; it holds {printable(', '.join(folders[:12])) or 'no folders'}. "
            f"Name them {', '.join(CLIP_DATASETS)}"
        )
    rows = tuple(_measured(config, name, progress) for name in present)
    return AllDatasets(
        root=config.dataset,
        rows=rows,
        missing=tuple(name for name in CLIP_DATASETS if name not in folders),
        other_folders=tuple(name for name in folders if name not in CLIP_DATASETS),
        mean=_mean(rows),
    )


def _measured(config: ZeroShotConfig, name: str, progress: Progress | None) -> DatasetRow:
    """Return the row of one dataset."""
    measure = _MEASURES.get(name, "top-1")
    report = None if progress is None else partial(_of_dataset, progress, name)
    try:
        result = zero_shot(_config_of(config, name), report)
        return _row(name, measure, _value(result.teacher, measure), _value(result.student, measure), result)
    except (ValueError, FloatingPointError, CacheError, OSError) as error:
        return DatasetRow(name=name, measure=measure, problem=printable(str(error)))


def _of_dataset(progress: Callable[[str, int, int], None], name: str, stage: str, done: int, total: int) -> None:
    progress(f"{name}: {stage}", done, total)


def _config_of(config: ZeroShotConfig, name: str) -> ZeroShotConfig:
    """Return the settings of one dataset: its form, its published split and its cache."""
    root = Path(config.dataset, name)
    names = ("val", "test") if name in _MEASURED_ON_VAL else ("test", "val")
    own = {
        "all": False,
        "dataset": f"labelled:{root}",
        "prompts": name,
        "split": next((split for split in names if (root / split).is_dir()), ""),
        "cache": config.cache and f"{config.cache.rstrip('/')}/{name}.cache",
    }
    if form_of(str(root)) == "imagefolder" and CLIP_DATASETS[name]:
        from teacher_cache.pipeline.data.datasets.torchvision import has_layout

        if has_layout(str(root), CLIP_DATASETS[name]):
            own |= {"dataset": f"torchvision:{CLIP_DATASETS[name]}:{root}", "split": ""}
    return config.model_copy(update=own)


def _value(accuracies: dict[str, float] | None, measure: str) -> float | None:
    """Return a model's accuracy by a dataset's own measure.

    Raises:
        UsageError: it is not defined on these images.
    """
    if accuracies is None:
        return None
    if measure == "mean of top-1 and top-5":
        return (accuracies["top-1"] + accuracies["top-5"]) / 2
    if measure not in accuracies:
        raise UsageError(f"no {measure}: it needs images of both classes")
    return accuracies[measure]


def _row(
    name: str, measure: str, teacher: float | None, student: float | None, result: ZeroShotResult | None = None
) -> DatasetRow:
    share = 100 * student / teacher if teacher and student is not None else None
    return DatasetRow(name=name, measure=measure, teacher=teacher, student=student, share=share, result=result)


def _mean(rows: tuple[DatasetRow, ...]) -> DatasetRow:
    """Return the means over the measured datasets, as of a row; all of them have the same models."""
    teachers = [row.teacher for row in rows if row.teacher is not None]
    students = [row.student for row in rows if row.student is not None]
    means = [sum(values) / len(values) if values else None for values in (teachers, students)]
    return _row("mean", "", means[0], means[1])
