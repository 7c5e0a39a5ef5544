"""Run a CLIP teacher once, keep its embeddings in a cache, distil every student from it.

These names are the public interface; everything below ``teacher_cache.storage``, ``.pipeline`` and ``.flows`` may move.
Each stage is a function of one settings object::

    from teacher_cache import Cache, PrecomputeConfig, TrainConfig, precompute, train

    precompute(PrecomputeConfig(dataset="scenes:caches/scenes", teacher="bundled:scenes", cache="scenes.cache"))
    train(TrainConfig(cache="scenes.cache", student="scenes-small", out="runs/a"))
    rows = Cache("scenes.cache").take("image", [0, 17, 4])

Importing this package loads nothing else: each name is loaded on first use. Only names that run a model need torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teacher_cache.pipeline.data.torch_datasets.streamed_targets import StreamedTargets as StreamedTargets
    from teacher_cache.pipeline.data.torch_datasets.target_dataset import TargetDataset as TargetDataset
    from teacher_cache.pipeline.deploy.run import deploy as deploy
    from teacher_cache.pipeline.deploy.runtime import StudentRuntime as StudentRuntime
    from teacher_cache.pipeline.evaluate.retrieval import evaluate as evaluate
    from teacher_cache.pipeline.evaluate.zero_shot.measure import zero_shot as zero_shot
    from teacher_cache.pipeline.precompute.repair import repair as repair
    from teacher_cache.pipeline.precompute.run import precompute as precompute
    from teacher_cache.pipeline.promote.gate import promote as promote
    from teacher_cache.pipeline.promote.retrain import retrain as retrain
    from teacher_cache.pipeline.settings.deploy import DeployConfig as DeployConfig
    from teacher_cache.pipeline.settings.evaluate import EvaluateConfig as EvaluateConfig
    from teacher_cache.pipeline.settings.evaluate import ZeroShotConfig as ZeroShotConfig
    from teacher_cache.pipeline.settings.precompute import PrecomputeConfig as PrecomputeConfig
    from teacher_cache.pipeline.settings.promote import PromoteConfig as PromoteConfig
    from teacher_cache.pipeline.settings.promote import RetrainConfig as RetrainConfig
    from teacher_cache.pipeline.settings.train import TrainConfig as TrainConfig
    from teacher_cache.pipeline.train.loop import train as train
    from teacher_cache.pipeline.train.open_clip_task import cached_distill_task as cached_distill_task
    from teacher_cache.storage.check.verify import verify_cache as verify_cache
    from teacher_cache.storage.errors import CacheAccessError as CacheAccessError
    from teacher_cache.storage.errors import CacheCorruptError as CacheCorruptError
    from teacher_cache.storage.errors import CacheError as CacheError
    from teacher_cache.storage.errors import CacheFormatError as CacheFormatError
    from teacher_cache.storage.errors import CacheIncompleteError as CacheIncompleteError
    from teacher_cache.storage.errors import CacheMismatchError as CacheMismatchError
    from teacher_cache.storage.errors import CacheNotFoundError as CacheNotFoundError
    from teacher_cache.storage.errors import CacheUnreachableError as CacheUnreachableError
    from teacher_cache.storage.errors import UsageError as UsageError
    from teacher_cache.storage.look.info import describe_cache as describe_cache
    from teacher_cache.storage.read.reader import EmbeddingReader as Cache  # noqa: F401

# name -> module, and the attribute if it has another name
_HOMES = {
    "Cache": "storage.read.reader:EmbeddingReader",
    "CacheAccessError": "storage.errors",
    "CacheCorruptError": "storage.errors",
    "CacheError": "storage.errors",
    "CacheFormatError": "storage.errors",
    "CacheIncompleteError": "storage.errors",
    "CacheMismatchError": "storage.errors",
    "CacheNotFoundError": "storage.errors",
    "CacheUnreachableError": "storage.errors",
    "DeployConfig": "pipeline.settings.deploy",
    "EvaluateConfig": "pipeline.settings.evaluate",
    "PrecomputeConfig": "pipeline.settings.precompute",
    "PromoteConfig": "pipeline.settings.promote",
    "RetrainConfig": "pipeline.settings.promote",
    "StreamedTargets": "pipeline.data.torch_datasets.streamed_targets",
    "StudentRuntime": "pipeline.deploy.runtime",
    "TargetDataset": "pipeline.data.torch_datasets.target_dataset",
    "TrainConfig": "pipeline.settings.train",
    "UsageError": "storage.errors",
    "ZeroShotConfig": "pipeline.settings.evaluate",
    "cached_distill_task": "pipeline.train.open_clip_task",
    "deploy": "pipeline.deploy.run",
    "describe_cache": "storage.look.info",
    "evaluate": "pipeline.evaluate.retrieval",
    "precompute": "pipeline.precompute.run",
    "promote": "pipeline.promote.gate",
    "repair": "pipeline.precompute.repair",
    "retrain": "pipeline.promote.retrain",
    "train": "pipeline.train.loop",
    "verify_cache": "storage.check.verify",
    "zero_shot": "pipeline.evaluate.zero_shot.measure",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), attribute or name)


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return [*globals(), *__all__]
