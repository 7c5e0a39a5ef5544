"""The transform without torch equals open_clip's own, bit for bit, whatever the image and the settings."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from teacher_cache.pipeline.data.images.model_input import ModelInput

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MODES = ("RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "I;16")


def picture(width: int, height: int, mode: str) -> Image.Image:
    """Noise of one size in one of Pillow's modes."""
    noise = np.random.default_rng([width, height]).integers(0, 256, (height, width, 4), np.uint8)
    if mode == "I;16":
        return Image.fromarray(noise[:, :, 0].astype(np.uint16) << 8)
    if mode == "RGBA":
        return Image.fromarray(noise)
    if mode in ("P", "PA"):
        return Image.fromarray(noise[:, :, :3]).quantize(40).convert(mode)
    if mode == "HSV" or mode == "LAB":
        return Image.frombytes(mode, (width, height), noise[:, :, :3].tobytes())
    return Image.fromarray(noise[:, :, :3]).convert(mode)


def open_clips(image: Image.Image, config: dict[str, Any]) -> np.ndarray[Any, Any]:
    """What open_clip's own code makes of it, none of ours between."""
    transform = image_transform_v2(PreprocessCfg(**{**config, "size": tuple(config["size"])}), is_train=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: np.ndarray[Any, Any] = transform(image).numpy()
    return found


def equal(image: Image.Image, seen: ModelInput) -> None:
    """The same float32 numbers, or the same refusal."""
    try:
        wanted = open_clips(image, seen.to_config())
    except Exception as error:
        with pytest.raises(type(error)):
            seen.pixels(image)
        return
    found = seen.pixels(image)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert found.shape == wanted.shape == (3, *seen.size)
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("mode", MODES)
def test_equals_open_clips_in_every_mode(mode: str, resize_mode: str) -> None:
    for width, height in ((61, 40), (33, 97), (32, 32), (7, 9)):
        for size in ((32, 32), (24, 37)):
            for fill in (0, 200):
                seen = ModelInput(size, MEAN, STD, "bicubic", resize_mode, fill)
                equal(picture(width, height, mode), seen)


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(1, 150), st.integers(1, 150)),
    st.tuples(st.integers(2, 40), st.integers(2, 40)) | st.integers(2, 40).map(lambda side: (side, side)),
    st.sampled_from(["shortest", "longest", "squash"]),
    st.sampled_from(["bicubic", "bilinear", "random"]),
    st.sampled_from(["RGB", "RGBA", "L", "P", "CMYK"]),
    st.integers(0, 255),
)
def test_equals_open_clips_at_every_size(
    sides: tuple[int, int], size: tuple[int, int], resize_mode: str, interpolation: str, mode: str, fill: int
) -> None:
    equal(picture(*sides, mode), ModelInput(size, MEAN, STD, interpolation, resize_mode, fill))


def test_neither_module_imports_torch() -> None:
    code = (
        "import sys, teacher_cache.pipeline.data.images.decode, teacher_cache.pipeline.data.images.model_input; "
        "assert not {'torch', 'torchvision', 'open_clip'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
