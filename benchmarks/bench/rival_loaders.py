"""The same rows in the peers' formats, and an epoch of each in a shuffled order: a process per peer.

    python -m benchmarks.bench.rival_loaders NAME FOLDER SECONDS

writes ``NAME``'s files below ``FOLDER`` unless they are there, says ``ready``, and for each line on stdin streams
batches until the epoch or the seconds are over; it answers with rows, seconds and :func:`weighed` of all rows, as JSON:
that sum is made where the line is ``prove``, which is not for timing.

Every loader yields (1,024, 512) float16, embedding-reader float32, shuffles a window of 65,536 rows or as its own
shuffle would, and runs in this one process. A module of a peer is imported by its loader.
"""

from __future__ import annotations

import fcntl
import json
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

BATCH, CHUNK, WIDTH = 1024, 4096, 512
WINDOW_CHUNKS = 16  # as TrainConfig has it
FEW = 65_536  # rows, at most, of the peers that need minutes for a million
Batches = Iterator[NDArray[np.float16]]


def source(folder: Path) -> NDArray[np.float16]:
    """(rows, 512): what every format holds."""
    return np.load(folder / "npy" / "img_emb" / "img_emb_0.npy", mmap_mode="r")


def weighed(rows: NDArray[Any]) -> float:
    """A sum that tells rows apart: each column has a weight of its own."""
    return float((rows.astype(np.float64) @ np.arange(1.0, WIDTH + 1)).sum())


def _order(rows: int, epoch: int) -> Iterator[NDArray[np.int64]]:
    """The windows of ``storage/read/shuffle.py`` again: a peer's environment need not have what that one imports."""
    rng = np.random.default_rng(epoch)
    picked = rng.permutation(rows // CHUNK)
    for start in range(0, len(picked), WINDOW_CHUNKS):
        chunks = picked[start : start + WINDOW_CHUNKS]
        yield rng.permutation((chunks[:, None] * CHUNK + np.arange(CHUNK)).reshape(-1))


def _shuffled(windows: Iterator[NDArray[np.float16]], epoch: int) -> Batches:
    """Batches of windows that are in memory, their rows shuffled."""
    rng = np.random.default_rng(epoch)
    for window in windows:
        order = rng.permutation(len(window))
        for start in range(0, len(window), BATCH):
            yield window[order[start : start + BATCH]]


# ---------------------------------------------------------------- ours, and the same files by other readers


def _cache(folder: Path) -> str:
    (found,) = folder.glob("*.cache")
    return str(found)


def ours(folder: Path) -> Callable[[int], Batches]:
    """A stream in the order that training uses; each chunk's checksum is proven when this reader first reads it."""
    return _ours(folder, "first")


def ours_proving(folder: Path) -> Callable[[int], Batches]:
    """The same, each checksum proven in every epoch."""
    return _ours(folder, "every")


def _ours(folder: Path, prove: Literal["first", "every"]) -> Callable[[int], Batches]:
    from teacher_cache.storage.read.reader import EmbeddingReader
    from teacher_cache.storage.read.shuffle import batches, window_order

    reader = EmbeddingReader(_cache(folder))
    rows = reader.image_rows()

    def epoch(number: int) -> Batches:
        order = batches(window_order(rows, CHUNK, WINDOW_CHUNKS, 0, number), BATCH)
        return reader.stream("image", order, prove=prove)

    return epoch


def zarr_rows(folder: Path) -> Callable[[int], Batches]:
    """zarr-python's own selection of a batch's rows: each batch decodes the window's sixteen chunks."""
    import zarr

    array: Any = zarr.open_array(f"{_cache(folder)}/targets.zarr/image/embedding", mode="r")

    def epoch(number: int) -> Batches:
        for window in _order(array.shape[0], number):
            for start in range(0, len(window), BATCH):
                yield array.oindex[window[start : start + BATCH], 0]

    return epoch


def tensorstore(folder: Path) -> Callable[[int], Batches]:
    """Whole chunks, all of a window at once and the next window ahead."""
    import tensorstore as ts

    kvstore = {"driver": "file", "path": f"{_cache(folder)}/targets.zarr/image/embedding/"}
    array = ts.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()

    def epoch(number: int) -> Batches:
        rng = np.random.default_rng(number)
        picked = rng.permutation(array.shape[0] // CHUNK)

        def ask(first: int) -> list[Any]:
            return [
                array[at * CHUNK : (at + 1) * CHUNK, 0].read() for at in picked[first : first + WINDOW_CHUNKS].tolist()
            ]

        def windows() -> Iterator[NDArray[np.float16]]:
            ahead = ask(0)
            for first in range(0, len(picked), WINDOW_CHUNKS):
                now, ahead = ahead, ask(first + WINDOW_CHUNKS)
                yield np.concatenate([future.result() for future in now])

        return _shuffled(windows(), number)

    return epoch


# ---------------------------------------------------------------- npy and parquet


def embedding_reader(folder: Path) -> Callable[[int], Batches]:
    """The reader of clip-retrieval's output, npy beside parquet. It reads in order: windows, then shuffled."""
    from embedding_reader import EmbeddingReader

    reader = EmbeddingReader(
        str(folder / "npy" / "img_emb"),
        "parquet_npy",
        meta_columns=["image_path"],
        metadata_folder=str(folder / "npy" / "metadata"),
    )

    def epoch(number: int) -> Batches:
        windows = (rows for rows, _ in reader(WINDOW_CHUNKS * CHUNK, show_progress=False))
        return _shuffled(windows, number)

    return epoch


def npy_memmap(folder: Path) -> Callable[[int], Batches]:
    """The bare npy file, mapped, no checks: the floor under everything here."""
    rows = source(folder)

    def epoch(number: int) -> Batches:
        for window in _order(len(rows), number):
            for start in range(0, len(window), BATCH):
                yield np.asarray(rows[window[start : start + BATCH]])

    return epoch


# ---------------------------------------------------------------- Lance


def _lance(folder: Path) -> Any:
    import lance

    at = folder / "rows.lance"
    with (folder / "rows.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two loaders read it
        if not at.exists():
            _write_lance(at, source(folder))
    return lance.dataset(str(at))


def _write_lance(at: Path, rows: NDArray[np.float16]) -> None:
    import lance
    import pyarrow as pa

    def tables() -> Iterator[Any]:
        for start in range(0, len(rows), CHUNK):
            flat = pa.array(np.asarray(rows[start : start + CHUNK]).reshape(-1))
            yield pa.record_batch([pa.FixedSizeListArray.from_arrays(flat, WIDTH)], ["e"])

    schema = pa.schema([("e", pa.list_(pa.float16(), WIDTH))])
    batches = pa.RecordBatchReader.from_batches(schema, tables())
    lance.write_dataset(batches, str(at), max_rows_per_file=WINDOW_CHUNKS * CHUNK)


def _of_list(column: Any) -> NDArray[np.float16]:
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False)).reshape(-1, WIDTH)


def lance_scan(folder: Path) -> Callable[[int], Batches]:
    """Fragments of a window's rows in random order, each scanned whole and shuffled in memory."""
    dataset = _lance(folder)

    def epoch(number: int) -> Batches:
        fragments = dataset.get_fragments()
        picked = np.random.default_rng(number).permutation(len(fragments))

        def windows() -> Iterator[NDArray[np.float16]]:
            for at in picked:
                batches = fragments[at].to_batches(columns=["e"], batch_size=CHUNK)
                yield np.concatenate([_of_list(batch.column("e")) for batch in batches])

        return _shuffled(windows(), number)

    return epoch


def lance_take(folder: Path) -> Callable[[int], Batches]:
    """Lance's random access, a batch at a time."""
    dataset = _lance(folder)
    rows = dataset.count_rows()

    def epoch(number: int) -> Batches:
        for window in _order(rows, number):
            for start in range(0, len(window), BATCH):
                table = dataset.take(window[start : start + BATCH], columns=["e"])
                yield _of_list(table.column("e").combine_chunks())

    return epoch


# ---------------------------------------------------------------- streams of samples


def mosaic(folder: Path) -> Callable[[int], Batches]:
    """MosaicML Streaming: MDS shards, its own shuffle, batched by torch's DataLoader."""
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    at = folder / "mds"
    if not at.exists():
        with MDSWriter(out=str(at), columns={"e": f"ndarray:float16:{WIDTH}"}) as writer:
            for row in source(folder)[:FEW]:
                writer.write({"e": np.asarray(row)})
    dataset = StreamingDataset(
        local=str(at), shuffle=True, batch_size=BATCH, num_canonical_nodes=1, shuffle_block_size=WINDOW_CHUNKS * CHUNK
    )
    loader = DataLoader(dataset, BATCH, collate_fn=lambda some: np.stack([each["e"] for each in some]))
    return lambda number: iter(loader)


def webdataset(folder: Path) -> Callable[[int], Batches]:
    """Tars of npy files, shards shuffled, then a buffer of 5,000 samples, as WebDataset's own examples have it."""
    import webdataset as wds

    at = folder / "tars"
    rows = source(folder)[:FEW]
    shards = len(rows) // CHUNK
    if not at.exists():
        at.mkdir()
        for shard in range(shards):
            with tarfile.open(at / f"{shard:06d}.tar", "w") as tar:
                for row in range(shard * CHUNK, (shard + 1) * CHUNK):
                    data = BytesIO()
                    np.save(data, rows[row])
                    member = tarfile.TarInfo(f"{row:09d}.npy")
                    member.size = data.tell()
                    data.seek(0)
                    tar.addfile(member, data)
    urls = f"{at}/{{000000..{shards - 1:06d}}}.tar"

    def epoch(number: int) -> Batches:
        samples = wds.WebDataset(urls, shardshuffle=100, seed=number).shuffle(5000).decode().to_tuple("npy")
        return iter(samples.batched(BATCH, collation_fn=lambda some: np.stack([each[0] for each in some])))

    return epoch


def hf_datasets(folder: Path) -> Callable[[int], Batches]:
    """Hugging Face datasets: Arrow files as an iterable dataset, shuffled by its shards and a buffer."""
    import pyarrow as pa
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    at = folder / "arrow"
    if not at.exists():
        flat = pa.array(np.asarray(source(folder)[:FEW]).reshape(-1))
        Dataset(pa.table({"e": pa.FixedSizeListArray.from_arrays(flat, WIDTH)})).save_to_disk(str(at))
    dataset = Dataset.load_from_disk(str(at)).with_format("numpy")
    stream = dataset.to_iterable_dataset(num_shards=len(dataset) // CHUNK).shuffle(seed=0, buffer_size=5000)

    def epoch(number: int) -> Batches:
        stream.set_epoch(number)
        return (batch["e"] for batch in stream.iter(BATCH))

    return epoch


LOADERS: dict[str, Callable[[Path], Callable[[int], Batches]]] = {
    loader.__name__: loader
    for loader in (
        ours,
        ours_proving,
        npy_memmap,
        embedding_reader,
        zarr_rows,
        tensorstore,
        lance_scan,
        lance_take,
        mosaic,
        webdataset,
        hf_datasets,
    )
}


def main() -> None:
    name, folder, limit = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    answers, sys.stdout = sys.stdout, sys.stderr  # a peer may print
    epoch = LOADERS[name](folder)
    print("ready", file=answers, flush=True)
    for number, line in enumerate(sys.stdin):
        prove = line.strip() == "prove"
        rows, total = 0, 0.0
        started = time.perf_counter()
        for batch in epoch(number):
            if batch.shape[1:] != (WIDTH,):
                raise AssertionError(f"{name}: {batch.shape}")
            rows += len(batch)
            if prove:
                total += weighed(batch)
            elif time.perf_counter() - started > limit:
                break
        said = {"rows": rows, "seconds": time.perf_counter() - started, "total": total}
        print(json.dumps(said), file=answers, flush=True)


if __name__ == "__main__":
    main()
