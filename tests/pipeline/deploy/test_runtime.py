"""A deployed student without torch gives what open_clip gives of the same weights, and says what is wrong."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import onnx
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from teacher_cache.pipeline.data.images.decode import UndecodableImageError
from teacher_cache.pipeline.deploy import tokens as clip_tokens
from teacher_cache.pipeline.deploy.record import DeploymentError
from teacher_cache.pipeline.deploy.runtime import StudentRuntime
from teacher_cache.storage.errors import UsageError
from tests.conftest import write_photos
from tests.pipeline.data.odd_images import ODD_IMAGES

TEXTS = [
    "a photo of a cat",
    "",
    "two dogs, which run through the snow; " * 9,
    "Caf\u00e9 &amp; <end_of_text> 12",
    "cat",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Seven photographs of different sizes."""
    return sorted((write_photos(tmp_path_factory.mktemp("photos") / "a", 7) / "images").iterdir())


@pytest.fixture(scope="module")
def runtime(tiny_deployment: Path) -> StudentRuntime:
    return StudentRuntime(tiny_deployment)


@pytest.fixture(scope="module")
def theirs(tiny_deployment: Path) -> Any:
    """The deployed weights in open_clip, with its own preprocessing and tokenizer."""
    source = f"local-dir:{tiny_deployment.parent / 'student'}"
    model, transform = open_clip.create_model_from_pretrained(source)
    model.eval()
    tokenizer = open_clip.get_tokenizer(source)

    class Theirs:
        def images(self, paths: list[Path]) -> np.ndarray[Any, Any]:
            with torch.inference_mode():
                batch = torch.stack([transform(Image.open(path)) for path in paths])  # type: ignore[operator]
                return F.normalize(model.encode_image(batch), dim=-1).numpy()  # type: ignore[operator]

        def texts(self, texts: list[str]) -> np.ndarray[Any, Any]:
            with torch.inference_mode():
                return F.normalize(model.encode_text(tokenizer(texts)), dim=-1).numpy()  # type: ignore[operator]

    return Theirs()


def test_features_are_open_clips(runtime: StudentRuntime, theirs: Any, photos: list[Path]) -> None:
    images, texts = runtime.embed_images(photos), runtime.embed_texts(TEXTS)
    assert images.dtype == texts.dtype == np.float32
    assert images.shape == (7, 16)
    assert texts.shape == (5, 16)
    assert np.abs(images - theirs.images(photos)).max() < 1e-5
    assert np.abs(texts - theirs.texts(TEXTS)).max() < 1e-5


def test_batches_change_nothing(tiny_deployment: Path, runtime: StudentRuntime, photos: list[Path]) -> None:
    for batch_size, threads in ((1, 1), (3, 2)):
        other = StudentRuntime(tiny_deployment, threads=threads, batch_size=batch_size)
        assert np.abs(other.embed_images(photos) - runtime.embed_images(photos)).max() < 1e-6
        assert np.abs(other.embed_texts(TEXTS) - runtime.embed_texts(TEXTS)).max() < 1e-6


def test_images_may_be_paths_bytes_or_pillows(runtime: StudentRuntime, photos: list[Path]) -> None:
    with Image.open(photos[0]) as opened:
        features = runtime.embed_images([photos[0], str(photos[0]), photos[0].read_bytes(), opened])
    assert all(np.array_equal(features[0], row) for row in features[1:])


def test_sixteen_bits_are_seen_alike_in_a_file_and_in_memory(runtime: StudentRuntime) -> None:
    [odd] = [odd for odd in ODD_IMAGES if odd.name == "16-bit.png"]
    with Image.open(io.BytesIO(odd.data)) as opened:
        assert np.array_equal(runtime.pixels(odd.data), runtime.pixels(opened))
    assert odd.like is not None
    assert np.array_equal(runtime.pixels(odd.data), runtime.pixels(odd.like))


def test_nothing_gives_nothing(runtime: StudentRuntime) -> None:
    assert runtime.embed_images([]).shape == (0, 16)
    assert runtime.embed_texts([]).shape == (0, 16)
    assert runtime.classify([], ["a cat"]).shape == (0, 1)


def test_classify_is_a_softmax_of_scaled_cosines(runtime: StudentRuntime, theirs: Any, photos: list[Path]) -> None:
    found = runtime.classify(photos, TEXTS, scale=100)
    logits = 100 * torch.from_numpy(theirs.images(photos)).double() @ torch.from_numpy(theirs.texts(TEXTS)).double().T
    assert found.dtype == np.float32
    assert np.abs(found - logits.softmax(dim=1).numpy()).max() < 2e-4
    assert np.abs(found.sum(axis=1) - 1).max() < 1e-6
    softer = runtime.classify(photos, TEXTS)  # by its own logit scale, 14.3
    assert np.abs(softer - (logits * 0.143).softmax(dim=1).numpy()).max() < 2e-4
    assert np.isfinite(runtime.classify(photos, TEXTS, scale=1e9)).all()


def test_a_student_of_a_sigmoid_loss_classifies_each_query_by_itself(
    tiny_deployment: Path, runtime: StudentRuntime, photos: list[Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_deployment, tmp_path / "copy")
    record = json.loads((folder / "deploy.json").read_text()) | {"logit_bias": -9.5}
    (folder / "deploy.json").write_text(json.dumps(record))
    found = StudentRuntime(folder).classify(photos, TEXTS)
    cosines = runtime.embed_images(photos).astype(float) @ runtime.embed_texts(TEXTS).astype(float).T
    np.testing.assert_allclose(found, 1 / (1 + np.exp(9.5 - 14.3 * cosines)), rtol=1e-5)
    assert found.dtype == np.float32
    np.testing.assert_allclose(StudentRuntime(folder).classify(photos, TEXTS[1:2]), found[:, 1:2], rtol=1e-4)
    assert np.isfinite(StudentRuntime(folder).classify(photos, TEXTS, scale=1e9)).all()


def test_search_gives_the_nearest_rows(runtime: StudentRuntime, theirs: Any, photos: list[Path]) -> None:
    features = runtime.embed_images(photos)
    index = faiss.IndexFlatIP(16)
    index.add(features)  # type: ignore[call-arg]
    cosines = theirs.images(photos) @ theirs.texts(["a cat"])[0]
    wanted = np.argsort(-cosines)
    for searched in (features, index, features.astype(np.float16)):
        found = runtime.search(searched, "a cat", k=3)
        assert [row for row, _ in found] == wanted[:3].tolist()
        assert np.abs(np.array([score for _, score in found]) - cosines[wanted[:3]]).max() < 2e-3
    # more than there are
    assert [row for row, _ in runtime.search(features, "a cat", k=50)] == wanted.tolist()
    assert [row for row, _ in runtime.search(index, "a cat", k=50)] == wanted.tolist()


@pytest.mark.parametrize("index", [np.zeros((3, 8), np.float32), np.zeros(16, np.float32), faiss.IndexFlatIP(8)])
def test_an_index_of_another_width_is_refused(runtime: StudentRuntime, index: Any) -> None:
    with pytest.raises(ValueError, match=r"the index has (shape|width) .*the student's features have width 16"):
        runtime.search(index, "a cat")


def test_wrong_arguments_are_refused(tiny_deployment: Path, runtime: StudentRuntime, photos: list[Path]) -> None:
    with pytest.raises(TypeError, match="texts: one str found, a list wanted"):
        runtime.embed_texts("a cat")
    with pytest.raises(TypeError, match="images: one PosixPath found, a list wanted"):
        runtime.embed_images(photos[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one query or more"):
        runtime.classify(photos, [])
    with pytest.raises(ValueError, match="scale: nan found"):
        runtime.classify(photos, TEXTS, scale=float("nan"))
    with pytest.raises(ValueError, match="k: 0 found"):
        runtime.search(np.zeros((3, 16)), "a cat", k=0)
    with pytest.raises(UsageError, match="variant 'fp16' is not known; there are fp32, int8"):
        StudentRuntime(tiny_deployment, "fp16")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="threads: 0 found"):
        StudentRuntime(tiny_deployment, threads=0)
    with pytest.raises(UsageError, match="batch_size: 0 found"):
        StudentRuntime(tiny_deployment, batch_size=0)
    with pytest.raises(UsageError, match=r"no deployed student here \(deploy\.json not found\)"):
        StudentRuntime(photos[0].parent)


def test_an_undecodable_image_is_named(runtime: StudentRuntime, photos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(UndecodableImageError, match=rf"^image 1: {tmp_path}/bad\.jpg: not an image, damaged"):
        runtime.embed_images([photos[0], tmp_path / "bad.jpg"])
    with pytest.raises(UndecodableImageError, match=r"^image 0: not an image, damaged"):
        runtime.embed_images([b"no image"])
    with pytest.raises(UndecodableImageError, match=r"^image 2: 32-bit floats"):
        runtime.embed_images([*photos[:2], Image.new("F", (9, 9))])
    with pytest.raises(UndecodableImageError, match=r"^image 0: .*would be resized to"):
        runtime.embed_images([Image.new("1", (1, 6_000_000))])
    with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
        runtime.embed_images([tmp_path / "none.jpg"])


@pytest.mark.parametrize("odd", ODD_IMAGES, ids=lambda odd: odd.name)
def test_odd_images_end_as_in_training(runtime: StudentRuntime, odd: Any) -> None:
    if odd.lost:
        with pytest.raises(UndecodableImageError) as caught:
            runtime.pixels(odd.data)
        assert odd.lost in str(caught.value)
    else:
        assert runtime.pixels(odd.data).shape == (3, 32, 32)


def test_int8_is_used_where_there_is_some(tiny_deployment: Path, runtime: StudentRuntime, photos: list[Path]) -> None:
    int8 = StudentRuntime(tiny_deployment, "int8", batch_size=1)
    found, wanted = int8.embed_images(photos), runtime.embed_images(photos)
    assert not np.array_equal(found, wanted)
    assert (found * wanted).sum(axis=1).min() > 0.99
    alone = np.concatenate([int8.embed_images([photo]) for photo in photos])
    assert np.array_equal(alone, found)  # batches of one: a function of the image alone
    with pytest.raises(UsageError, match=r"no int8 file of the text tower: its features lose too much\. Use fp32"):
        int8.embed_texts(["a cat"])


@pytest.mark.parametrize("name", ["image.onnx", "text.onnx", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_file_is_refused_when_it_is_used(
    tiny_deployment: Path, photos: list[Path], tmp_path: Path, name: str, damage: str
) -> None:
    folder = shutil.copytree(tiny_deployment, tmp_path / "copy")
    if damage == "missing":
        (folder / name).unlink()
    else:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
    runtime = StudentRuntime(folder)
    reason = "missing" if damage == "missing" else "not the file that was deployed"
    with pytest.raises(DeploymentError, match=rf"{name}: {reason}"):
        runtime.embed_images(photos) if name == "image.onnx" else runtime.embed_texts(["a cat"])
    # what needs the other files only still works
    assert len(runtime.embed_texts(["a cat"]) if name == "image.onnx" else runtime.embed_images(photos[:1])) == 1


def test_a_file_that_onnxruntime_cannot_load_names_both_versions(tiny_deployment: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_deployment, tmp_path / "copy")
    record = json.loads((folder / "deploy.json").read_text())
    record["towers"]["fp32"]["image"] = record["tokenization"]["artefact"]  # sound, and no graph
    (folder / "deploy.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"cannot load the image tower.*the deployment was made with onnxruntime 1\.0"):
        StudentRuntime(folder).embed_images([Image.new("RGB", (9, 9))])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"mean": None}, "its preprocess cannot be used"), ({"resize_mode": "fit"}, "resize_mode 'fit' is none of short")],
)
def test_a_record_that_is_not_understood_is_refused(
    tiny_deployment: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    record = json.loads((tiny_deployment / "deploy.json").read_text())
    record["preprocess"].update(change)
    (tmp_path / "deploy.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=rf"^deploy\.json: {message}"):
        StudentRuntime(tmp_path)


def test_each_tower_is_read_when_it_is_first_used(tiny_deployment: Path, tmp_path: Path, photos: list[Path]) -> None:
    folder = shutil.copytree(tiny_deployment, tmp_path / "copy")
    runtime = StudentRuntime(folder)
    first = runtime.embed_images(photos)
    for name in ("image.onnx", "image.int8.onnx", "text.onnx", "open_clip_model.safetensors"):
        (folder / name).unlink()
    assert np.array_equal(runtime.embed_images(photos), first)  # not read again
    with pytest.raises(DeploymentError, match=r"text\.onnx: missing"):
        runtime.embed_texts(["a cat"])


def test_threads_may_share_it(tiny_deployment: Path, runtime: StudentRuntime, photos: list[Path]) -> None:
    shared, wanted = StudentRuntime(tiny_deployment), runtime.classify(photos, TEXTS)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: shared.classify(photos, TEXTS), range(8)))
    assert all(np.abs(each - wanted).max() < 1e-5 for each in found)


@pytest.mark.parametrize("name", ["onnxruntime", "regex", "ftfy"])
def test_a_missing_package_is_named_with_its_remedy(
    tiny_deployment: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    with pytest.raises(UsageError, match=rf"not installed: {name}.*pip install .*\[runtime\]"):
        StudentRuntime(tiny_deployment).embed_texts(["a cat"])
    assert clip_tokens.runtime_package("json") is json


def test_a_package_that_is_stopped_while_it_is_imported_is_not_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """pybind11 makes an ImportError of whatever ends the first lines of its module."""

    def stopped(name: str) -> None:
        raise ImportError("initialization failed") from KeyboardInterrupt()

    monkeypatch.setattr(clip_tokens, "import_module", stopped)
    with pytest.raises(KeyboardInterrupt):
        clip_tokens.runtime_package("onnxruntime")


BLOCKED = ("torch", "torchvision", "open_clip", "timm", "transformers", "onnx", "faiss", "pyarrow", "zarr")

_WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ImportError(f"{name} was asked for")

sys.meta_path.insert(0, Blocked())
import numpy as np
from teacher_cache.pipeline.deploy.runtime import StudentRuntime

student = StudentRuntime(sys.argv[2])
np.save(sys.argv[4], student.classify([sys.argv[3]], ["a cat", "a dog"]))
assert student.search(student.embed_images([sys.argv[3]]), "a cat", 1)[0][0] == 0
assert not set(sys.argv[1].split(",")) & set(sys.modules)
"""


def test_runs_where_torch_is_not_installed(
    tiny_deployment: Path, runtime: StudentRuntime, photos: list[Path], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    given = [str(tiny_deployment), str(photos[0]), str(tmp_path / "found.npy")]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _WITHOUT_TORCH, ",".join(BLOCKED), *given],
        env={"PYTHONPATH": str(Path(__file__).parents[3]), "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    wanted = runtime.classify([photos[0]], ["a cat", "a dog"])
    assert np.abs(np.load(tmp_path / "found.npy") - wanted).max() < 1e-5
    assert list(home.rglob("*")) == []  # onnxruntime left to itself keeps an id there


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd", "openvino/../../x", ".env"])
def test_a_record_names_files_of_its_own_folder_alone(tiny_deployment: Path, tmp_path: Path, file: str) -> None:
    fields = json.loads((tiny_deployment / "deploy.json").read_text())
    fields["weights"]["file"] = file
    (tmp_path / "deploy.json").write_text(json.dumps(fields))
    with pytest.raises(UsageError, match=r"weights\.file"):
        StudentRuntime(tmp_path)


@pytest.mark.parametrize("location", ["/{outside}/secret", "../secret", "secret"])
def test_a_graph_takes_no_numbers_from_other_files(
    tiny_deployment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    """The graph is given as bytes, digest right: files of the user never become weights, wherever the process runs."""
    folder = shutil.copytree(tiny_deployment, tmp_path / "copy")
    graph = onnx.load(folder / "image.onnx")
    tensor = max(graph.graph.initializer, key=lambda one: len(one.raw_data))
    for place in (tmp_path, folder):
        (place / "secret").write_bytes(tensor.raw_data)
    onnx.external_data_helper.set_external_data(tensor, location.format(outside=str(tmp_path).lstrip("/")))
    tensor.ClearField("raw_data")
    data = graph.SerializeToString()
    (folder / "image.onnx").write_bytes(data)
    fields = json.loads((folder / "deploy.json").read_text())
    fields["towers"]["fp32"]["image"] |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "deploy.json").write_text(json.dumps(fields))
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match="cannot load the image tower"):
        StudentRuntime(folder).embed_images([Image.new("RGB", (9, 9))])
