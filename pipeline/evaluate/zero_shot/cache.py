"""A cache of the teacher's rows of labelled images and of their classes' prompts.

With it a second evaluation runs no teacher. The cache's digests check that images and prompts are the same, and the
teacher's files that the teacher is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.pipeline.data.images.decoders import PILLOW
from teacher_cache.pipeline.evaluate.zero_shot.labelled_images import LabelledDataset
from teacher_cache.pipeline.models.teacher import is_surely, load_teacher
from teacher_cache.pipeline.precompute.plan import Progress, dataset_identity, dataset_tables
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.evaluate import ZeroShotConfig
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.errors import CacheIncompleteError, CacheNotFoundError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.manifest_file import read_manifest
from teacher_cache.storage.look.nearest import unit_rows
from teacher_cache.storage.read.reader import EmbeddingReader

_WAY_OUT = "Name another --cache, or ask for what this one holds (teacher-cache info shows it)."


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's rows of a labelled dataset.

    Attributes:
        image: (images, dim) float32 unit rows; zeros for images in ``lost``.
        prompts: (prompts of all classes, dim) float32 unit rows, ordered by class.
        lost: reason by number of each image without a row.
        teacher: name of the teacher.
        manifest_digest: manifest digest of the cache.
        encoded: True if the teacher ran in this call.
    """

    image: NDArray[np.float32]
    prompts: NDArray[np.float32]
    lost: dict[int, str]
    teacher: str
    manifest_digest: str
    encoded: bool


def teacher_rows(config: ZeroShotConfig, dataset: LabelledDataset, progress: Progress | None = None) -> TeacherRows:
    """Read the rows of the cache. If it is missing or incomplete and a teacher is set, make or finish it first.

    An incomplete cache is finished with the batch size, decoder, precision and compression that it began with;
    ``batch_size`` is ignored. A new one is made in fp32.

    Raises:
        CacheNotFoundError, CacheIncompleteError: the cache is missing or incomplete, and no teacher is set.
        CacheMismatchError: images, prompts or teacher differ; the message says which.
    """
    assert config.cache is not None
    spec, encoded = dataset.spec, False
    try:
        reader = EmbeddingReader(config.cache)
    except (CacheNotFoundError, CacheIncompleteError) as error:
        if config.teacher is None:
            raise
        begun: dict[str, Any] = {"batch_size": config.batch_size}
        if isinstance(error, CacheIncompleteError):
            have = read_manifest(open_files(config.cache))
            begun = {
                "decoder": have.identity.preprocess.decoder or PILLOW,
                "precision": have.identity.teacher.precision,
                "compress": have.layout.compressor is not None,
            }
        shared = config.model_dump(include={"teacher", "pretrained", "cache", "device"})
        encoded = precompute(PrecomputeConfig(dataset=str(spec), **shared, **begun), progress).chunks_encoded > 0
        reader = EmbeddingReader(config.cache)
    dataset_now = dataset_identity(spec, dataset_tables(dataset.samples, dataset.digests))
    reader.identity.require(reader.identity.model_copy(update={"dataset": dataset_now}), config.cache, _WAY_OUT)
    if not encoded and config.teacher is not None and not is_surely(config.teacher, config.pretrained, reader.identity):
        precision, decoder = reader.identity.teacher.precision, reader.identity.preprocess.decoder
        load_teacher(config.teacher, config.pretrained, config.device, precision, decoder).require(
            reader.identity, config.cache
        )
    rows = reader.image_rows()
    image = np.zeros((reader.manifest.layout.image_rows, reader.embed_dim), np.float32)
    image[rows] = unit_rows(reader.take("image", rows))
    return TeacherRows(
        image,
        unit_rows(reader.take("text", np.arange(reader.manifest.layout.text_rows))),
        {item.row: f"{item.sample_id}: {item.detail}" for item in reader.quarantined},
        reader.identity.teacher.name,
        reader.manifest.digest,
        encoded,
    )
