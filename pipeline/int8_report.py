"""What of an int8 tower really is int8. No onnx: a table of students can be read without it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

__all__ = ["Int8Report"]


class Int8Report(BaseModel, frozen=True):
    """What a quantised tower really is, read from its file and from the graph that ONNX Runtime makes of it."""

    method: Literal["static", "dynamic"]
    parameters: int = Field(description="Of the float tower; batch norms are folded away.")
    parameters_int8: int = Field(description="Of these, how many are stored as int8.")
    share_int8: float = Field(description="parameters_int8 / parameters.")
    bytes: int
    float_bytes: int = Field(description="Of the float file.")
    calibration_images: int = Field(description="0 if dynamic.")
    int8_operators: dict[str, int] = Field(
        description="By kind: operators that multiply in int8 as ONNX Runtime runs it."
    )
    float_operators: dict[str, int] = Field(
        description="By kind: operators that multiply in float, those of two activations as in attention among them."
    )
    kept_float: dict[str, str] = Field(description="By operator: how many parameters it keeps in float, and why.")
