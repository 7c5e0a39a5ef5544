"""A trained convolutional student at another image size, as a run of its own; no weight changes.

Random crops show things larger than the evaluation crop does, so that a student is often better at more pixels than it
learned from (Touvron et al. 2019, "Fixing the train-test resolution discrepancy"), for the price of their FLOPs. How
much better is to be measured, by ``evaluate``.
"""

from __future__ import annotations

import copy
from pathlib import Path

from pipeline.config import ResizeConfig
from pipeline.new_folder import new_folder, require_free
from pipeline.runs import ResizedRun, RunFolder, RunRecord, weights_file_sha256
from pipeline.student import Student, build_student, load_student, save_student
from storage.errors import UsageError

__all__ = ["resize", "resized"]


def resize(config: ResizeConfig) -> RunRecord:
    """Write the student of a finished run, at another image size, as a run to be measured, deployed or begun from.

    The folder appears whole or not at all. The run is left as it is; no cache is opened.

    Raises:
        UsageError: the run is not finished or has lost its checkpoint, its student takes no images of that size or has
            it already, or the output folder is there already.
    """
    out = Path(config.out)
    require_free(out)
    folder = RunFolder(Path(config.run).resolve())
    record = folder.read()
    folder.require_finished(record)
    checkpoint = folder.checkpoint_path()
    student, _ = load_student(checkpoint)
    made = resized(student, config.image_size)
    name = str(record.checkpoint)
    written = record.model_copy(
        update={
            "config": record.config.model_copy(update={"out": config.out}),
            "student_config": made.config,
            "best": None,
            "resized": ResizedRun(
                run=str(folder.path),
                checkpoint=name,
                weights_sha256=weights_file_sha256(checkpoint),
                image_size=student.preprocess.size,
            ),
        }
    )
    with new_folder(out) as partial:
        (partial / name).mkdir(parents=True)
        save_student(made, made.config, partial / name, {**written.origin(), "step": written.steps})
        RunFolder(partial).write(written)
    return written


def resized(student: Student, size: int) -> Student:
    """The same weights in a student of images of ``size`` x ``size`` pixels, in evaluation mode.

    Raises:
        UsageError: its image tower takes its own size alone, or has that size.
    """
    if student.preprocess.size == (size, size):
        raise UsageError(f"image_size {size}: the student has that size already. Choose another")
    student.require_takes(size, "image_size")
    config = copy.deepcopy(student.config)
    config["vision_cfg"]["image_size"] = size
    made = build_student(config, student.preprocess.to_config(), student.teacher_dim)
    try:
        made.load_state_dict(student.state_dict())
    except RuntimeError as error:
        raise UsageError(
            f"image_size {size}: this student's {type(student.model.visual).__name__} has weights that depend on its "
            f"image size: {error}. Train one of that size"
        ) from error
    return made.eval()
