"""Resizing of a trained student to another image size, as a run of its own. Only a transformer's positions change.

Random crops show objects larger than the evaluation crop does. So a convolutional student is often better at more
pixels than in training (Touvron et al. 2019, "Fixing the train-test resolution discrepancy"), at the cost of FLOPs. A
transformer has a position for each patch. For another size they are interpolated, and need some training steps (Li
et al. 2023, CLIPA: most of the training at few tokens, the end at all of them). Measure the gain with ``evaluate``.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from open_clip.model import resize_pos_embed

from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import ResizedRun, RunRecord, weights_file_sha256
from teacher_cache.pipeline.models.student import Student, build_student, checkpoint_origin, load_student, save_run
from teacher_cache.pipeline.settings.student import ResizeConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.new_files import require_free


def resize(config: ResizeConfig) -> RunRecord:
    """Write the student of a finished run, at another image size, as a run to be measured, deployed or started from.

    The folder is created atomically. The old run stays unchanged; no cache is opened.

    Raises:
        UsageError: the run is unfinished or has no such checkpoint, its student cannot take that size or has it
            already, or the output folder exists.
    """
    require_free(Path(config.out))
    folder = RunFolder(Path(config.run).resolve())
    record = folder.read()
    folder.require_finished(record)
    checkpoint = folder.checkpoint_path(config.checkpoint)
    student, _ = load_student(checkpoint)
    made, interpolated = resized(student, config.image_size)
    name = checkpoint.relative_to(folder.path).as_posix()
    written = record.model_copy(
        update={
            "config": record.config.model_copy(update={"out": config.out}),
            "student_config": made.config,
            "student_parameters": made.num_parameters,
            "checkpoint": name,
            "best": None,
            "resized": ResizedRun(
                run=str(folder.path),
                checkpoint=name,
                weights_sha256=weights_file_sha256(checkpoint),
                image_size=student.preprocess.size,
                interpolated=interpolated,
                chosen_on=record.chosen_on(config.checkpoint),
            ),
        }
    )
    # also keep how the best checkpoint was chosen
    stays = {key: value for key, value in checkpoint_origin(checkpoint).items() if key in ("step", "chosen")}
    save_run(made, written, Path(config.out), stays)
    return written


def resized(student: Student, size: int) -> tuple[Student, tuple[str, ...]]:
    """Return a student for images of ``size`` x ``size`` pixels and the names of the weights that were interpolated.

    The student is in evaluation mode. Only the positions of open_clip's VisionTransformer change, interpolated as in
    open_clip: bicubic, antialiased, with the class token's unchanged.

    Raises:
        UsageError: the image tower only takes its own size, or already has that size; or the size is no multiple of a
            transformer's patch size.
    """
    if student.preprocess.size == (size, size):
        raise UsageError(f"image_size {size}: the student has that size already. Choose another")
    if hasattr(student.model.visual, "grid_size"):
        _require_patches(student, size)
    else:
        student.require_takes(size, "image_size", "Choose another, or train one of that size")
    config = copy.deepcopy(student.config)
    config["vision_cfg"]["image_size"] = size
    made = build_student(config, student.preprocess.to_config(), student.teacher_dim)
    before = student.model.state_dict()
    state: dict[str, Any] = dict(before)
    resize_pos_embed(state, made.model)
    try:
        made.model.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(
            f"image_size {size}: this student's {type(student.model.visual).__name__} has weights that depend on its "
            f"image size: {error}. Train one of that size"
        ) from error
    made.load_projections(student.projections())
    return made.eval(), tuple(name for name, value in state.items() if value is not before[name])


def _require_patches(student: Student, size: int) -> None:
    """Check that a transformer's own grid is square and that its patches fill an image of this size."""
    visual: Any = student.model.visual
    if visual.grid_size[0] != visual.grid_size[1] or visual.patch_size[0] != visual.patch_size[1]:
        of = " of ".join(f"{height} x {width}" for height, width in (student.preprocess.size, visual.patch_size))
        raise UsageError(
            f"image_size {size}: this student's own images are {of} pixels a patch, and square ones of square patches "
            "are wanted. Train one of that size"
        )
    patch = visual.patch_size[0]
    if size % patch:
        near = [edge * patch for edge in (size // patch, size // patch + 1) if edge not in (0, visual.grid_size[0])]
        raise UsageError(
            f"image_size {size}: no multiple of this student's patches of {patch} pixels. Choose "
            f"{' or '.join(map(str, near))}"
        )
