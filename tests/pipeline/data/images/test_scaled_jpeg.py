"""The decoder jpeg-scaled: Pillow's geometry and verdicts, nearly Pillow's pixels, and a cache that says so."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from open_clip.transform import center_crop_or_pad
from PIL import Image

from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.data.batches.cached_samples import CachedSamples
from teacher_cache.pipeline.data.batches.student_images import StudentImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images import scaled_jpeg
from teacher_cache.pipeline.data.images.decode import UndecodableImageError
from teacher_cache.pipeline.data.images.decoders import open_image
from teacher_cache.pipeline.data.images.preprocess import Preprocess
from teacher_cache.pipeline.data.images.ready_pixels import ReadyPixels
from teacher_cache.pipeline.data.images.scaled_jpeg import ScaledJpeg
from teacher_cache.pipeline.data.images.views import Crop, crop_shown
from teacher_cache.pipeline.deploy.run import _teacher
from teacher_cache.pipeline.evaluate.split import open_split
from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.pipeline.precompute.encode import encode_chunks
from teacher_cache.pipeline.precompute.plan import plan_precompute
from teacher_cache.pipeline.precompute.repair import repair
from teacher_cache.pipeline.precompute.run import precompute, seal_and_summarize
from teacher_cache.pipeline.precompute.sample_proof import prove_sample
from teacher_cache.pipeline.settings.deploy import DeployConfig
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig, ProofConfig
from teacher_cache.pipeline.settings.train import PixelsConfig, TrainConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.pipeline.train.make_pixels import make_pixels, plan_pixels
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.manifest_file import read_manifest
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import cache_digest, shared, write_photos
from tests.pipeline.data.odd_images import ODD_IMAGES, OddImage

simplejpeg = pytest.importorskip("simplejpeg", reason="the extra fastjpeg is not installed")

PILLOW = Preprocess((32, 32), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
SCALED = PILLOW.decoded_by("jpeg-scaled")
VIEWS = 3
STUDENT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 48, "layers": 1, "width": 16, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


def jpeg(image: Image.Image, **how: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "JPEG", **{"quality": 95, **how})
    return sink.getvalue()


def ramp(width: int, height: int) -> Image.Image:
    """Red tells the place from left to right, green from top to bottom: a crop that is off is of another colour."""
    x, y = np.meshgrid(np.linspace(20, 235, width), np.linspace(20, 235, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], axis=-1).round().astype(np.uint8))


def levels(one: torch.Tensor | Image.Image, other: torch.Tensor | Image.Image) -> Any:
    """Differences in levels of 0 ... 255, of images or of model input."""
    if isinstance(one, torch.Tensor):
        return ((one - other) * torch.tensor(PILLOW.std).reshape(3, 1, 1) * 255).abs().numpy()  # type: ignore[operator]
    return np.abs(np.asarray(one, np.int64) - np.asarray(other, np.int64))


@pytest.mark.parametrize(
    ("mode", "size"),
    [("shortest", (32, 32)), ("shortest", (24, 40)), ("longest", (32, 32)), ("squash", (32, 32))],
)
def test_it_sees_the_very_region_of_pillow(mode: str, size: tuple[int, int]) -> None:
    """Of odd sizes, at each scale: a shift by a quarter of a pixel would be two levels, everywhere."""
    pillow = Preprocess(size, PILLOW.mean, PILLOW.std, resize_mode=mode)
    scaled = pillow.decoded_by("jpeg-scaled")
    for width, height in ((45, 33), (101, 127), (227, 301), (443, 331), (517, 1031), (1213, 905)):
        data = jpeg(ramp(width, height), subsampling=0)
        found, wanted = (
            scaled.shown(open_image(data, scaled.decoder)),
            pillow.shown(open_image(data, pillow.decoder)),
        )
        assert found.shape == wanted.shape == (*size, 3)
        differ = levels(found, wanted)
        inside = differ[2:-2, 2:-2]  # where padding begins, the ramp of a scaled image ends less sharply
        assert inside.max() <= 2, (width, height)
        assert inside.mean() < 0.5, (width, height)


def test_crops_are_the_very_region_too() -> None:
    for width, height in ((101, 127), (443, 331), (517, 1031)):
        data = jpeg(ramp(width, height), subsampling=0)
        for top, left, share, flip in (
            (0, 0, 1.0, False),
            (3, 7, 0.5, True),
            (13, 1, 0.7, False),
            (29, 30, 0.63, True),
        ):
            crop = Crop(top, left, int((height - top) * share), int((width - left) * share), flip)
            found, wanted = (crop_shown(open_image(data, each.decoder), crop, each) for each in (SCALED, PILLOW))
            assert levels(found, wanted).max() <= 3, (width, height, crop)
    with pytest.raises(ValueError, match="reaches beyond the 517 x 1031 pixels"):
        crop_shown(open_image(data, SCALED.decoder), Crop(0, 0, 1032, 10, False), SCALED)


def test_whole_scales_are_decoded_once_and_no_smaller_than_the_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def decode(data: bytes, *how: Any, **sizes: Any) -> Any:
        pixels = simplejpeg.decode_jpeg(data, *how, **sizes)
        asked.append(pixels.shape[:2])
        return pixels

    monkeypatch.setattr(scaled_jpeg, "_decode_jpeg", lambda: decode)
    margin = scaled_jpeg.MARGIN
    for eighths in (1, 2, 4, 8):
        asked.clear()
        edge = int(np.ceil(32 * margin * 8 / eighths))
        image = open_image(jpeg(ramp(edge, edge + 10)), SCALED.decoder)
        assert isinstance(image, ScaledJpeg)
        SCALED.transform(image)
        SCALED.transform(image)
        assert asked == [(-(-(edge + 10) * eighths // 8), -(-edge * eighths // 8))]
        # a smaller region of it needs more pixels
        crop_shown(image, Crop(1, 1, edge - 2, edge - 2, False), SCALED)
        assert [shape[1] for shape in asked[1:]] == ([] if eighths == 8 else [-(-edge * eighths * 2 // 8)])


def end(see: Callable[[Preprocess], Any], each: Preprocess) -> Any:
    """What comes of an image: what is seen, or the words that say why not."""
    try:
        return see(each)
    except (UndecodableImageError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_what_is_shown_are_the_decoders_bytes_and_no_copy(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Through no picture of Pillow's; the bytes are those that one would have."""
    data = jpeg(ramp(443, 331))
    each = Preprocess((32, 32), PILLOW.mean, PILLOW.std, resize_mode=mode, decoder="jpeg-scaled")
    image = open_image(data, each.decoder)
    assert isinstance(image, ScaledJpeg)
    height, width = each.resized(*image.size)
    planes = center_crop_or_pad(image.resized((width, height), Image.Resampling.BICUBIC), [32, 32])
    monkeypatch.setattr(Image, "fromarray", None)
    crop = Crop(0, 0, 300, 400, True)
    for seen, wanted in (
        (each.shown(image), planes),
        (crop_shown(image, crop, each), image.resized((32, 32), Image.Resampling.BICUBIC, (0, 0, 400, 300)).flip(-1)),
    ):
        assert seen.dtype == np.uint8
        assert seen.flags.writeable
        np.testing.assert_array_equal(seen, np.moveaxis(wanted.numpy(), 0, -1))
        assert torch.equal(each.normalized(seen), each.normalized_batch(torch.from_numpy(seen)[None])[0])


@pytest.mark.parametrize("odd", ODD_IMAGES, ids=lambda odd: odd.name)
def test_odd_images_have_pillows_end(odd: OddImage) -> None:
    found, wanted = (
        end(lambda each: each.transform(open_image(odd.data, each.decoder)), each) for each in (SCALED, PILLOW)
    )
    if isinstance(wanted, str):
        assert found == wanted
    elif isinstance(open_image(odd.data, "jpeg-scaled"), ScaledJpeg) and odd.name != "damaged.jpg":
        assert levels(found, wanted).max() <= 3
    else:
        assert torch.equal(found, wanted)


def test_a_strip_that_shrinks_to_nothing_has_pillows_end() -> None:
    data = jpeg(ramp(1000, 1))
    for each in (PILLOW, SCALED):
        long = Preprocess((32, 32), PILLOW.mean, PILLOW.std, resize_mode="longest", decoder=each.decoder)
        with pytest.raises(ValueError, match=r"^height and width must be > 0$"):
            long.transform(open_image(data, each.decoder))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_cut_or_damaged_jpeg_is_decided_by_pillow(progressive: bool) -> None:
    """Cut anywhere, or with bytes changed anywhere: the same words, or the same pixels."""
    rng = np.random.default_rng(3)
    noise = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((203, 151))
    data = jpeg(noise, progressive=progressive, quality=80)
    broken = [data[:cut] for cut in rng.integers(0, len(data), 60)] + [data[:-1], data[:-2], data[:-3]]
    for at in rng.integers(len(data) // 5, len(data) - 2, 60):
        broken.append(data[:at] + bytes(rng.integers(0, 256, 3, np.uint8)) + data[at + 3 :])
    lost = 0
    crop = Crop(9, 11, 130, 140, True)
    for number, part in enumerate(broken):
        for see in (
            lambda each, part=part: each.shown(open_image(part, each.decoder)),
            lambda each, part=part: crop_shown(open_image(part, each.decoder), crop, each),
        ):
            found, wanted = (end(see, each) for each in (SCALED, PILLOW))
            if isinstance(wanted, str):
                lost += 1
                assert found == wanted, number
            else:  # some damage nobody sees, and then both decode it
                assert levels(found, wanted).mean() < 1, number
    assert lost > 100


def test_a_grey_jpeg_has_pillows_pixels() -> None:
    data = jpeg(ramp(443, 331).convert("L"))
    seen = open_image(data, "jpeg-scaled")
    assert isinstance(seen, Image.Image)
    assert torch.equal(SCALED.transform(seen), PILLOW.transform(open_image(data)))


def test_a_missing_package_is_named_before_anything_is_done(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_photos(tmp_path / "photos", 5)
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    command = ["precompute", "--dataset", f"flickr:{photos}", "--teacher", f"local-dir:{tiny_teacher}"]
    result = CliRunner().invoke(app, [*command, "--cache", str(tmp_path / "c"), "--decoder", "jpeg-scaled"])
    assert isinstance(result.exception, UsageError)
    assert "needs simplejpeg, which is not installed: " in str(result.exception)
    assert str(result.exception).endswith("[fastjpeg]'")
    assert not (tmp_path / "c").exists()
    with pytest.raises(UsageError, match="decoder 'turbo' is not known; there are pillow, jpeg-scaled"):
        PILLOW.decoded_by("turbo")


def large_photos(root: Path, images: int = 12) -> Path:
    """``write_photos``, enlarged to odd sizes so that each scale is used; number 2 is cut, number 3 is a PNG."""
    write_photos(root, images)
    for number, path in enumerate(sorted((root / "images").iterdir())):
        with Image.open(path) as photo:
            large = photo.resize((photo.width * (1 + number % 5) + 1, photo.height * (1 + number % 5)))
        large.save(path, "PNG" if number == 3 else "JPEG")
    cut = root / "images" / "0002.jpg"
    cut.write_bytes(cut.read_bytes()[:-300])
    return root


class Made:
    """A cache of several views by jpeg-scaled, and one by Pillow of the same photographs."""

    def __init__(self, home: Path, teacher: Path) -> None:
        self.home, self.teacher = home, f"local-dir:{teacher}"
        self.photos = large_photos(home / "photos")
        self.cache, self.by_pillow = str(home / "scaled"), str(home / "pillow")
        precompute(self.config(self.cache))
        precompute(self.config(self.by_pillow, decoder="pillow"))
        self.student = home / "student.json"
        self.student.write_text(json.dumps(STUDENT))

    def config(self, cache: str, **changes: Any) -> PrecomputeConfig:
        settings = {"batch_size": 4, "chunk_rows": 4, "device": "cpu", "views": VIEWS, "decoder": "jpeg-scaled"}
        return PrecomputeConfig(
            dataset=f"flickr:{self.photos}", teacher=self.teacher, cache=cache, **{**settings, **changes}
        )


@pytest.fixture(scope="module")
def made(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"), tiny_teacher)


def test_the_identity_names_the_decoder_and_a_cache_by_pillow_none(made: Made) -> None:
    scaled, pillow = (EmbeddingReader(cache).manifest for cache in (made.cache, made.by_pillow))
    assert scaled.identity.preprocess.decoder == "jpeg-scaled"
    assert scaled.made_with["simplejpeg"] == simplejpeg.__version__
    assert "decoder" not in pillow.identity.fields()["preprocess"]
    assert "simplejpeg" not in pillow.made_with
    assert scaled.identity.preprocess.model_copy(update={"decoder": None}) == pillow.identity.preprocess
    assert scaled.identity_digest != pillow.identity_digest


def test_rows_differ_by_little_and_the_same_image_is_lost(made: Made) -> None:
    scaled, pillow = EmbeddingReader(made.cache), EmbeddingReader(made.by_pillow)
    rows = pillow.image_rows()
    assert scaled.image_rows().tolist() == rows.tolist()
    assert scaled.quarantined == pillow.quarantined
    assert [item.sample_id for item in scaled.quarantined] == ["0002.jpg"]
    differ = []
    for view in range(VIEWS):
        one, other = (each.take("image", rows, view).astype(np.float32) for each in (scaled, pillow))
        boxes = (each.take("image", rows, view, array="view") for each in (scaled, pillow))
        np.testing.assert_array_equal(*boxes)
        differ.append(1 - (one * other).sum(axis=1))
    assert 0 < np.max(differ) < 0.001


@pytest.mark.parametrize("decoder", ["pillow", "jpeg-scaled"])
def test_another_decoder_is_refused_and_nothing_written(made: Made, decoder: str) -> None:
    cache, has, asks = (
        (made.cache, '"jpeg-scaled"', "null") if decoder == "pillow" else (made.by_pillow, "null", '"jpeg-scaled"')
    )
    before = cache_digest(Path(cache))
    with pytest.raises(CacheMismatchError) as caught:
        precompute(made.config(cache, decoder=decoder))
    assert f"preprocess.decoder: {has} in the cache, {asks} asked for" in str(caught.value)
    assert "Encode to a new path" in str(caught.value)
    assert cache_digest(Path(cache)) == before


def test_a_sample_of_it_is_proven_with_its_own_decoder(made: Made) -> None:
    proof = prove_sample(
        ProofConfig(cache=made.cache, sample=100, teacher=made.teacher, device="cpu", threshold=0.999999)
    )
    assert proof.ok, proof.wrong
    assert (proof.images_compared, proof.quarantined_checked) == (11 * VIEWS, VIEWS)


def test_repair_brings_back_the_bytes(made: Made, tmp_path: Path) -> None:
    settings = made.config(str(tmp_path / "c"))
    teacher = load_teacher(made.teacher, device="cpu", decoder="jpeg-scaled")
    encode_chunks(settings, teacher, plan_precompute(settings, teacher))
    seal_and_summarize(settings.cache, 0, 0.0)
    before = cache_digest(tmp_path / "c")
    damaged = tmp_path / "c" / "targets.zarr" / "image" / "embedding" / "c" / "1" / "1" / "0"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    result = repair(settings.cache, teacher=made.teacher, device="cpu")
    assert (result.ok, result.chunks_encoded, result.replaced_manifest_digest) == (True, 1, None)
    assert cache_digest(tmp_path / "c") == before
    assert verify_cache(settings.cache).ok


def test_a_student_sees_the_caches_pixels_whether_decoded_or_ready(made: Made, tmp_path: Path) -> None:
    reader = EmbeddingReader(made.cache)
    mine = Preprocess((48, 48), PILLOW.mean, PILLOW.std)
    images = StudentImages(reader, ImageSource(str(made.photos)), mine)
    ready = {}
    for cache in (made.cache, made.by_pillow):
        ready[cache] = str(tmp_path / Path(cache).name)
        make_pixels(plan_pixels(PixelsConfig(cache=cache, student=str(made.student), out=ready[cache], threads=2)))
    rows = reader.image_rows("train")
    pixels = ReadyPixels(ready[made.cache], reader, rows, VIEWS, mine)
    scaled = mine.decoded_by("jpeg-scaled")
    other = 0
    for image in CachedSamples(reader, kept_chunks=1).records(rows):
        row = image.row
        data = (made.photos / "images" / f"{row:04d}.jpg").read_bytes()
        expected = scaled.transform(open_image(data, scaled.decoder))
        assert torch.equal(images.see(image), expected)
        assert torch.equal(mine.normalized(pixels.shown(row, 0)), expected)
        other += not torch.equal(mine.transform(open_image(data, mine.decoder)), expected)
        for view in range(1, VIEWS):
            crop = Crop.from_row(reader.take("image", np.array([row]), view, array="view")[0])
            assert torch.equal(mine.normalized(pixels.shown(row, view)), images.see(image, crop))
    assert other > 4
    with pytest.raises(CacheMismatchError, match="decoded_by is None, wanted jpeg-scaled"):
        ReadyPixels(ready[made.by_pillow], reader, rows, VIEWS, mine)
    with pytest.raises(CacheMismatchError, match="decoded_by is jpeg-scaled, wanted None"):
        ReadyPixels(ready[made.cache], EmbeddingReader(made.by_pillow), rows, VIEWS, mine)


def test_a_student_learns_from_it(made: Made, tmp_path: Path) -> None:
    config = TrainConfig(
        cache=made.cache,
        student=str(made.student),
        out=str(tmp_path / "run"),
        epochs=1,
        batch_size=4,
        device="cpu",
        workers=1,
    )
    record = train(config).record
    assert record.identity.preprocess.decoder == "jpeg-scaled"
    [origin] = (tmp_path / "run").rglob("open_clip_config.json")
    assert "decoder" not in json.loads(origin.read_text())["preprocess_cfg"]  # open_clip has no such setting


def test_a_student_of_it_is_shipped_beside_its_teacher(made: Made, tmp_path: Path) -> None:
    """The teacher is loaded with the cache's decoder, or it would be another one than the cache's."""
    config = DeployConfig(run="unused", out=str(tmp_path / "out"), teacher=made.teacher)
    teacher, _ = _teacher(config, open_split(EvaluateConfig(cache=made.cache, split="test")))
    assert teacher.preprocess.decoder == "jpeg-scaled"


@pytest.mark.skipif(find_spec("prefect_ray") is None, reason="pip install 'teacher-cache[prefect-ray]'")
def test_the_example_on_ray_encodes_with_the_decoder_that_is_asked_for(made: Made, tmp_path: Path) -> None:
    from examples.encode_on_ray import encode, plan

    config = made.config(str(tmp_path / "c"))
    encode.fn(config, plan.fn(config), 0)
    seal_and_summarize(config.cache, 0, 0.0)
    assert cache_digest(tmp_path / "c") == cache_digest(Path(made.cache))


def test_the_manifest_names_what_the_teacher_decodes_with(made: Made, tmp_path: Path) -> None:
    """Whatever the settings say: identity and versions cannot disagree."""
    config = made.config(str(tmp_path / "c"), decoder="pillow")
    plan_precompute(config, load_teacher(made.teacher, device="cpu", decoder="jpeg-scaled"))
    manifest = read_manifest(open_files(config.cache))
    assert manifest.identity.preprocess.decoder == "jpeg-scaled"
    assert manifest.made_with["simplejpeg"] == simplejpeg.__version__


@pytest.mark.real_data
def test_a_trained_teacher_makes_nearly_the_same_of_photographs() -> None:
    """At their own size and enlarged, so that they are decoded at a smaller scale."""
    teacher = load_teacher(f"local-dir:{shared('teacher-flickr8k')}", device="cpu")
    pillow, scaled = teacher.preprocess, teacher.preprocess.decoded_by("jpeg-scaled")
    photos = sorted((shared("flickr8k") / "images").iterdir())[:4000:1000]
    for size in ((224, 224), (500, 375), (2000, 1500)):
        seen = []
        for photo in photos:
            data = photo.read_bytes()
            if size != (224, 224):
                data = jpeg(Image.open(photo).resize(size, Image.Resampling.BICUBIC), quality=90)
            seen.append([each.transform(open_image(data, each.decoder)) for each in (pillow, scaled)])
        one, other = (teacher.image_features(torch.stack([pair[at] for pair in seen])) for at in (0, 1))
        assert (1 - (one * other).sum(dim=1)).max() < 0.001, size
