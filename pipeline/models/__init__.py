"""Teachers, students and the folders of runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.lazy_names import lazy_names

if TYPE_CHECKING:
    from teacher_cache.pipeline.models.run_folder import RunFolder as RunFolder
    from teacher_cache.pipeline.models.run_record import RunRecord as RunRecord
    from teacher_cache.pipeline.models.student import Student as Student
    from teacher_cache.pipeline.models.student import build_student as build_student
    from teacher_cache.pipeline.models.student import load_student as load_student
    from teacher_cache.pipeline.models.student import student_config as student_config
    from teacher_cache.pipeline.models.teacher import LiveTeacher as LiveTeacher
    from teacher_cache.pipeline.models.teacher import load_teacher as load_teacher

__all__ = [
    "LiveTeacher",
    "RunFolder",
    "RunRecord",
    "Student",
    "build_student",
    "load_student",
    "load_teacher",
    "student_config",
]

_HOMES = {
    "LiveTeacher": "teacher",
    "RunFolder": "run_folder",
    "RunRecord": "run_record",
    "Student": "student",
    "build_student": "student",
    "load_student": "student",
    "load_teacher": "teacher",
    "student_config": "student",
}

__getattr__ = lazy_names(__name__, _HOMES)
