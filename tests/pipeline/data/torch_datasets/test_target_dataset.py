"""``TargetDataset``: the rows it gives are those of the cache, in any process, order and subset."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, Subset

from teacher_cache import Cache, CacheCorruptError, TargetDataset, UsageError
from teacher_cache.pipeline.data.service.fork_server import start_fork_server
from teacher_cache.storage.read.chunks import ChunkSource
from tests.conftest import known_row, make_known_cache
from tests.pipeline.train.train_work import make_cache


def check_known(item: dict[str, Any], dtype: torch.dtype = torch.float16) -> None:
    """An item of the known cache holds the row it names, and one of the captions of this image."""
    row, captions = int(item["row"]), item["caption"].tolist()
    assert torch.equal(item["image"], torch.from_numpy(known_row("image", row)).to(dtype))
    assert torch.equal(item["text"], torch.from_numpy(np.stack([known_row("text", c) for c in captions])).to(dtype))
    assert item["image"].dtype == item["text"].dtype == dtype
    assert item["box"].tolist() == [0, 0, 32, 32, 0]


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_item_is_the_row_that_it_names(known_cache: Path, resident: bool, dtype: Any) -> None:
    targets = TargetDataset(str(known_cache), dtype=dtype, captions=2, resident=resident)
    owners = Cache(str(known_cache)).captions["image_row"].to_numpy()
    assert len(targets) == 10
    items = [*targets.__getitems__([3, 9, 3]), targets[0], targets[-1]]
    assert [int(item["row"]) for item in items] == [3, 9, 3, 0, 9]
    for item in items:
        check_known(item, getattr(torch, dtype))
        assert owners[item["caption"]].tolist() == [int(item["row"])] * 2
        assert len(set(item["caption"].tolist())) == 2
    assert targets.logit_scale == 20.0


def test_captions_are_drawn_by_torchs_generator_and_all_of_them_come(known_cache: Path) -> None:
    targets = TargetDataset(str(known_cache))
    torch.manual_seed(3)
    drawn = [int(targets[0]["caption"]) for _ in range(30)]
    torch.manual_seed(3)
    assert [int(targets[0]["caption"]) for _ in range(30)] == drawn
    assert set(drawn) == set(range(*targets.cache.caption_offsets[:2]))


def test_resident_rows_are_read_once_and_each_forked_worker_opens_the_cache_once(
    known_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in every process: chunks that are read, and caches that are opened."""
    log = tmp_path / "log"
    load, init = ChunkSource.load, Cache.__init__

    def note(line: str) -> None:
        with log.open("a") as file:
            file.write(f"{line} {os.getpid()}\n")

    def counted_load(self: ChunkSource, ref: Any, array: str) -> Any:
        note(f"read {ref.name} {array}")
        return load(self, ref, array)

    def counted_init(self: Cache, *arguments: Any, **settings: Any) -> None:
        note("open")
        init(self, *arguments, **settings)

    monkeypatch.setattr(ChunkSource, "load", counted_load)
    monkeypatch.setattr(Cache, "__init__", counted_init)
    targets = TargetDataset(str(known_cache))
    for _ in range(2):  # two epochs, with new workers
        for batch in DataLoader(targets, 2, shuffle=True, num_workers=2, multiprocessing_context="fork"):
            for item in range(2):
                check_known({name: values[item] for name, values in batch.items()})
    lines = log.read_text().splitlines()
    reads = [line for line in lines if line.startswith("read")]
    # 10 images (embeddings and boxes) and 25 captions, in chunks of 4: each once, in this process
    assert len(reads) == len(set(reads)) == 3 + 3 + 7
    assert all(line.endswith(f" {os.getpid()}") for line in reads)
    opens = [line for line in lines if line.startswith("open")]
    assert len(opens) == len(set(opens)) == 1 + 2 * 2


def test_spawned_workers_share_the_resident_rows(tmp_path: Path) -> None:
    """The chunks are deleted before the workers start: what they serve is the memory of this process."""
    make_known_cache(tmp_path / "c")
    targets = TargetDataset(str(tmp_path / "c"))
    shutil.rmtree(tmp_path / "c/targets.zarr")
    rows = []
    for batch in DataLoader(targets, 5, num_workers=1, multiprocessing_context=start_fork_server()):
        rows += batch["row"].tolist()
        for item in range(5):
            check_known({name: values[item] for name, values in batch.items()})
    assert rows == list(range(10))


def test_a_pickle_holds_no_rows_and_loads_them_at_first_use(tmp_path: Path) -> None:
    make_known_cache(tmp_path / "c", images=4000, captions=4000, chunk_rows=1000)
    targets = TargetDataset(str(tmp_path / "c"), rows=[7, 3])
    data = pickle.dumps(targets)
    assert len(data) < 4000 * 8 * 2  # bytes of the images' embeddings alone
    other = pickle.loads(data)
    assert other.cache.objects_read == 0
    for index, row in enumerate([7, 3]):
        check_known(other[index])
        assert int(other[index]["row"]) == row
    assert other.cache.objects_read == 12  # 4 chunks of images, boxes and captions


@pytest.fixture
def contents(photo_cache: Path) -> list[tuple[str, str, int, int]]:
    """sha256, caption, image row and caption row of all pairs, from the files of the dataset and the tables."""
    cache = Cache(str(photo_cache))
    folder, owners = Path(cache.manifest.source.image_root), cache.captions["image_row"].to_pylist()
    shas = [hashlib.sha256((folder / uri).read_bytes()).hexdigest() for uri in cache.samples["uri"].to_pylist()]
    texts = cache.captions["text"].to_pylist()
    return [(shas[owner], text, owner, row) for row, (owner, text) in enumerate(zip(owners, texts, strict=True))]


def test_rows_are_found_by_content_in_any_order(photo_cache: Path, contents: list[tuple[str, str, int, int]]) -> None:
    picked = [contents[row] for row in np.random.default_rng(0).permutation(len(contents))[:50]]
    shas, texts, image_rows, caption_rows = (list(column) for column in zip(*picked, strict=True))
    targets = TargetDataset(str(photo_cache))
    found = targets.lookup(image_sha256=shas, caption=[f" {text}\n" for text in texts])
    assert (found.image_rows.tolist(), found.caption_rows.tolist()) == (image_rows, caption_rows)
    assert targets.lookup(image_sha256=shas[0].upper()) == ([image_rows[0]], None)
    assert targets.lookup(caption=texts[0]) == (None, [caption_rows[0]])
    batch = targets.at(found)
    assert torch.equal(batch["image"], torch.from_numpy(targets.cache.take("image", found.image_rows)))
    assert torch.equal(batch["text"][:, 0], torch.from_numpy(targets.cache.take("text", found.caption_rows)))
    # the order of another dataset: item i is its entry i, whatever sampler and subset pick
    mine = TargetDataset(targets.cache, rows=found, resident=False)
    picks = Subset(mine, range(10, 40))
    seen = [item for batch in DataLoader(picks, 5, sampler=RandomSampler(picks)) for item in batch["caption"].tolist()]
    assert sorted(seen) == sorted([[row] for row in caption_rows[10:40]])
    assert [int(mine[index]["row"]) for index in range(50)] == image_rows


def test_equal_contents_are_the_first_row_with_its_own_captions(known_cache: Path) -> None:
    """All images of the known cache have one digest: the captions of all count as those of the first."""
    cache = Cache(str(known_cache))
    found = cache.lookup(["e" * 64] * 2, ["img 24", "img 0"])
    assert (found.image_rows.tolist(), found.caption_rows.tolist()) == ([9, 0], [24, 0])
    assert cache.lookup("e" * 64).image_rows.tolist() == [0]


def test_what_the_cache_does_not_have_is_named(photo_cache: Path, contents: list[tuple[str, str, int, int]]) -> None:
    (sha, text, *_), (other_sha, other_text, *_) = contents[0], contents[-1]
    lookup = TargetDataset(str(photo_cache), resident=False).lookup
    with pytest.raises(UsageError, match=rf"stored bytes have the sha256 '{'0' * 64}' \(1 more are missing\)"):
        lookup(image_sha256=[sha, "0" * 64, "f" * 64])
    with pytest.raises(UsageError, match=r"no caption is 'a unicorn'\. Name the cache of this dataset"):
        lookup(caption=["a unicorn"])
    with pytest.raises(UsageError, match=f"the image '{sha}' has no caption '{other_text}'"):
        lookup(image_sha256=[other_sha, sha], caption=[other_text, other_text])
    with pytest.raises(ValueError, match="1 image_sha256 and 2 captions"):
        lookup(image_sha256=[sha], caption=[text, text])
    with pytest.raises(ValueError, match="neither was given"):
        lookup()
    assert TargetDataset(str(photo_cache), resident=False).lookup(image_sha256=[]).image_rows.tolist() == []


def test_pixels_show_the_region_of_the_target_and_tokens_its_captions(tiny_teacher: Path, tmp_path: Path) -> None:
    """The live teacher on the pixels and tokens of a batch gives the cached targets, for random crops too."""
    import open_clip

    cache = make_cache(tmp_path, tiny_teacher, 10, views=3)
    model = open_clip.create_model(f"local-dir:{tiny_teacher}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_teacher}")
    targets = TargetDataset(str(cache), "train", dtype="float32", views=3).with_images().with_tokens(tokenizer)
    torch.manual_seed(0)
    loader = DataLoader(targets, 4, shuffle=True, num_workers=2, multiprocessing_context="fork")
    boxes = []
    for batch in loader:
        assert batch["pixels"].shape == (4, 3, 32, 32)
        with torch.no_grad():
            image = torch.nn.functional.normalize(model.encode_image(batch["pixels"]), dim=-1)
            text = torch.nn.functional.normalize(model.encode_text(batch["tokens"][:, 0]), dim=-1)
        assert torch.allclose(image, batch["image"], atol=2e-3)
        assert torch.allclose(text, batch["text"][:, 0], atol=2e-3)
        boxes += batch["box"].tolist()
    assert any(box[4] for box in boxes)  # mirrored: some crops are not the evaluation crop
    small = TargetDataset(str(cache), captions=0).with_images(16)
    assert small[0]["pixels"].shape == (3, 16, 16)
    assert "text" not in small[0]
    (tmp_path / "photos/images/0000.jpg").unlink()
    with pytest.raises(OSError, match=r"row 0 .*0000\.jpg.*Is this one gone\?"):
        small[0]


def test_mistakes_are_one_line_that_says_what_to_do(known_cache: Path) -> None:
    location = str(known_cache)
    targets = TargetDataset(location, "train", resident=False)
    with pytest.raises(IndexError, match=r"known\.cache: item 8 asked for, items are 0 to 7"):
        targets[8]
    with pytest.raises(IndexError, match="image row 10 asked for, rows are 0 to 9"):
        TargetDataset(location, rows=[0, 10])
    with pytest.raises(UsageError, match="dev"):
        TargetDataset(location, "dev")
    with pytest.raises(UsageError, match="both given; choose one"):
        TargetDataset(location, "train", [0])
    with pytest.raises(UsageError, match="2 views asked for, this cache has 1"):
        TargetDataset(location, views=2)
    with pytest.raises(UsageError, match="choose 'float16' or 'float32'"):
        TargetDataset(location, dtype="float64")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="together with image_sha256"):
        TargetDataset(location, rows=targets.lookup(caption="img 3"))
    with pytest.raises(UsageError, match="captions=1 or more"):
        TargetDataset(location, captions=0).with_tokens(len)  # type: ignore[arg-type]


def test_images_without_captions_are_refused_unless_captions_are_left_out(tmp_path: Path) -> None:
    make_known_cache(tmp_path / "c", images=10, captions=5)
    with pytest.raises(UsageError, match=r"5 of 10 images have no caption\. .*captions=0"):
        TargetDataset(str(tmp_path / "c"))
    assert set(TargetDataset(str(tmp_path / "c"), captions=0)[9]) == {"row", "image", "box"}


def test_a_missing_chunk_is_named_with_its_remedy(known_cache: Path) -> None:
    (known_cache / "targets.zarr/image/embedding/c/1/0/0").unlink()
    with pytest.raises(CacheCorruptError, match=r"missing.*teacher-cache repair"):
        TargetDataset(str(known_cache))
    lazy = DataLoader(TargetDataset(str(known_cache), resident=False), 2, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(CacheCorruptError, match=r"missing.*teacher-cache repair"):
        list(lazy)
