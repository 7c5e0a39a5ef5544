"""Samples that a dataset loses when it is read: too many are refused, others are told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from teacher_cache.pipeline.data.datasets.records import Problem, SampleSet
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.errors import CacheError
from teacher_cache.storage.observe.logs import hint
from teacher_cache.storage.observe.quantities import counted

_PROBLEMS_NAMED = 5


def require_few_problems(config: PrecomputeConfig, spec: DatasetSpec, dataset: SampleSet) -> None:
    """Check that a dataset loses no more images, and no more captions, than the settings allow.

    The list that a part is cut from is checked for each part, so that all parts are encoded or none.

    Raises:
        CacheError: it does, or a file of samples is broken. The message names the first problems.
    """
    own = dataset.problems
    if dataset.whole is not None and spec.part is not None:
        _require_few(config, spec, *dataset.whole)
        own = own[len(dataset.whole.problems) :] if spec.part.number == 1 else own
    _require_few(config, spec, len(dataset.samples), dataset.num_captions, own)


def _require_few(
    config: PrecomputeConfig, spec: DatasetSpec, usable: int, captions: int, problems: Sequence[Problem]
) -> None:
    broken = [problem for problem in problems if problem.kind == "broken-file"]
    if broken and config.max_problems is None:
        raise CacheError(
            f"{config.dataset}: {counted(len(broken), 'file')} of samples cannot be read to the end. The first: "
            f"{'; '.join(map(str, broken[:_PROBLEMS_NAMED]))}. Nothing was written. Mend them, or name a dataset "
            "without them; --max-problems 10% caches what can be read"
        )
    _require_few_lost_captions(config, captions, problems)
    drops = dict(spec.options).get("uncaptioned") == "drop"
    lost = [one for one in problems if one.lost_image and not (drops and one.kind == "no-caption")]
    images = usable + len(lost)
    if len(lost) <= (allowed := config.allowed_problems(images)):
        return
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in Counter(problem.kind for problem in lost).items())
    first = "; ".join(map(str, lost[:_PROBLEMS_NAMED]))
    raise CacheError(
        f"{config.dataset}: {len(lost):,} of {counted(images, 'image')} cannot be used ({kinds}), "
        f"at most {allowed:,} are allowed. The first: {first}. Nothing was "
        f"written. Mend the dataset, or leave them out: --max-problems {len(lost)}"
        + "; ?uncaptioned=keep behind the dataset caches images without captions"
        * ("no-caption" in kinds)
    )


def _require_few_lost_captions(config: PrecomputeConfig, usable: int, problems: Sequence[Problem]) -> None:
    losing = [problem for problem in problems if problem.lost_captions]
    lost = sum(problem.lost_captions for problem in losing)
    captions = usable + lost
    if lost > (allowed := config.allowed_problems(captions)):
        raise CacheError(
            f"{config.dataset}: {lost:,} of {counted(captions, 'caption')} would be left out, at most {allowed:,} are "
            f"allowed. The first: {'; '.join(map(str, losing[:_PROBLEMS_NAMED]))}. Nothing was written. Mend the "
            f"dataset, or leave them out: --max-problems {lost}"
        )


def hint_at_gaps(spec: DatasetSpec, dataset: SampleSet) -> None:
    """Say what training or measuring will miss: a held-out part, or captions of some images."""
    if spec.kind != "labelled" and not any(sample.split for sample in dataset.samples):
        hint("nothing is held out to measure on: ?holdout=10% behind the dataset sets a part aside")
    bare = sum(not sample.captions for sample in dataset.samples)
    if spec.kind != "labelled" and 0 < bare < len(dataset.samples):
        hint(
            f"{bare:,} of {counted(len(dataset.samples), 'image')} have no caption: ?uncaptioned=drop leaves them "
            "out; to learn from images alone train with --set captions_per_image=0"
        )
