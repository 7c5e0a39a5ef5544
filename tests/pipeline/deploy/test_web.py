"""``deploy --web``: what transformers and transformers.js make of ``web/`` is what the runtime computes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from PIL import Image

from teacher_cache.pipeline.deploy.formats.web import write_web
from teacher_cache.pipeline.deploy.record import Deployment
from teacher_cache.pipeline.deploy.runtime import StudentRuntime
from teacher_cache.storage.errors import UsageError
from tests.node_packages import npm_install
from tests.pipeline.deploy.deployed import deploy_tiny

TEXTS = ["A photo of a  DOG, running.", "two cats' 12 toys!", "blue", "the sea at night"]
NODE = """
const { env, AutoTokenizer, AutoProcessor, RawImage, CLIPTextModelWithProjection, CLIPVisionModelWithProjection } =
  require("@huggingface/transformers");
const [folder, picture, ...texts] = process.argv.slice(1);
env.allowRemoteModels = false; env.localModelPath = folder;
(async () => {
  const options = { dtype: "fp32" };
  const tokenizer = await AutoTokenizer.from_pretrained("web"), processor = await AutoProcessor.from_pretrained("web");
  const text = await CLIPTextModelWithProjection.from_pretrained("web", options);
  const vision = await CLIPVisionModelWithProjection.from_pretrained("web", options);
  const tokens = tokenizer(texts, { padding: true, truncation: true });
  const { text_embeds } = await text(tokens);
  const small = await CLIPVisionModelWithProjection.from_pretrained("web", { dtype: "q8" });
  const pixels = await processor(await RawImage.read(picture));
  const { image_embeds } = await vision(pixels), int8 = (await small(pixels)).image_embeds.tolist();
  const ids = tokens.input_ids.tolist().map(row => row.map(Number));
  console.log(JSON.stringify({ ids, text: text_embeds.tolist(), image: image_embeds.tolist(), int8 }));
})();
"""


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> StudentRuntime:
    folder = deploy_tiny(tmp_path_factory.mktemp("web"))
    write_web(folder, Deployment.read(folder))
    return StudentRuntime(folder)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    coarse = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    Image.fromarray(coarse).resize((96, 72), Image.Resampling.BICUBIC).save(path)
    return path


def without_end(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ids with 0 for the end token, which pads in ``web/``."""
    return np.where(ids == ids.max(), 0, ids)


def test_transformers_reads_the_folder_as_the_runtime_does(student: StudentRuntime, picture: Path) -> None:
    transformers = pytest.importorskip("transformers")
    web = student.folder / "web"
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(web)
    ids = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="np")["input_ids"].astype(np.int64)
    np.testing.assert_array_equal(without_end(ids), without_end(student.tokens(TEXTS)))
    session = onnxruntime.InferenceSession(web / "onnx" / "text_model.onnx")
    (text,) = session.run(["text_embeds"], {"input_ids": ids})
    np.testing.assert_allclose(text, student.embed_texts(TEXTS), atol=1e-5)

    processor = transformers.CLIPImageProcessor.from_pretrained(web)
    pixels = processor(Image.open(picture), return_tensors="np")["pixel_values"]
    for file, variant in (("vision_model", "fp32"), ("vision_model_quantized", "int8")):
        (image,) = onnxruntime.InferenceSession(web / "onnx" / f"{file}.onnx").run(None, {"pixel_values": pixels})
        artefact = student.deployment.towers[variant]["image"].file
        (wanted,) = onnxruntime.InferenceSession(student.folder / artefact).run(
            None, {"pixels": student.pixels(picture)[None]}
        )
        assert float((image * wanted).sum()) > 0.999


def test_transformers_js_ranks_captions_as_the_runtime_does(
    student: StudentRuntime, picture: Path, tmp_path: Path
) -> None:
    packages = npm_install(tmp_path, "@huggingface/transformers")
    done = subprocess.run(
        ["node", "-e", NODE, str(student.folder), str(picture), *TEXTS],
        env={**os.environ, "NODE_PATH": str(packages)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_array_equal(without_end(np.array(seen["ids"])), without_end(student.tokens(TEXTS)))
    text, image = student.embed_texts(TEXTS), student.embed_images([picture])
    np.testing.assert_allclose(seen["text"], text, atol=1e-5)
    scores, wanted = np.array(seen["image"]) @ np.array(seen["text"]).T, image @ text.T
    assert scores.argmax() == wanted.argmax()
    assert float((np.array(seen["image"]) * image).sum()) > 0.999
    int8 = StudentRuntime(student.folder, "int8").embed_images([picture])
    assert float((np.array(seen["int8"]) * int8).sum()) > 0.999


@pytest.mark.parametrize(
    ("preprocess", "tokens", "reason"),
    [
        ({"resize_mode": "longest"}, {}, "in resize mode longest"),
        ({}, {"clean": "canonicalize"}, "another tokenizer"),
        ({}, {"shortens": False}, "reads the padding"),
    ],
)
def test_what_it_would_see_differently_is_refused(
    student: StudentRuntime, preprocess: dict[str, Any], tokens: dict[str, Any], reason: str
) -> None:
    made = student.deployment
    tokenization = made.tokenization.model_copy(update=tokens)
    other = made.model_copy(update={"preprocess": made.preprocess | preprocess, "tokenization": tokenization})
    with pytest.raises(UsageError, match=f"web: tiny .*{reason}.* Leave --web out"):
        write_web(student.folder, other)
