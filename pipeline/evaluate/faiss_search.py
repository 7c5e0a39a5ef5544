"""Exact ranks of queries: FAISS proposes candidates in float32, float64 scores decide. No torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.errors import MissingPackageError, UsageError
from teacher_cache.storage.look.nearest import exact_scores

_SPARE = 32  # candidates beyond the depth, for near ties at the last place
_MOST_CANDIDATES = 256  # FAISS is slow beyond, and limited to 2,048 on a GPU; deeper ranks are counted in float64
_QUERIES_AT_ONCE = 4_096
_WORK_BYTES = 64 << 20
_GPU_WORK_BYTES = 256 << 20
_GPU_PROVEN = 16  # queries per block whose GPU scores are checked

_Floats = NDArray[np.float32]
_Rows = NDArray[np.int64]
_Search = Callable[[_Floats, int], tuple[_Floats, _Rows]]


@dataclass(frozen=True)
class Engine:
    """FAISS's exhaustive inner-product search on one device.

    Attributes:
        name: build and version of FAISS, for results.
        gpu: number of the CUDA device; None for the CPU.
    """

    name: str
    gpu: int | None = None

    def searcher(self, gallery: _Floats) -> _Search:
        """Return a function of (queries, k) that gives the scores and rows of the k nearest, best first."""
        import faiss

        if self.gpu is None:  # knn searches the array itself; an index would copy it
            return lambda queries, k: faiss.knn(queries, gallery, k, metric=faiss.METRIC_INNER_PRODUCT)
        config = faiss.GpuIndexFlatConfig()
        config.device = self.gpu
        config.useFloat16 = False  # the error bound assumes float32
        resources = faiss.StandardGpuResources()
        resources.setTempMemory(_GPU_WORK_BYTES)  # by default 1.5 GB
        index = faiss.GpuIndexFlatIP(resources, gallery.shape[1], config)
        index.add(gallery)

        def search(queries: _Floats, k: int, resources: object = resources) -> tuple[_Floats, _Rows]:
            # the index does not own the resources: the default argument keeps them alive
            scores, rows = index.search(queries, k)
            return scores, rows

        return search


def find_engine(device: str = "auto") -> Engine:
    """Return the engine of a device, without falling back to another device.

    Args:
        device: auto, cpu, cuda or cuda:N. auto: the GPU if faiss-gpu finds one, else the CPU.

    Raises:
        UsageError: the device is unknown, or FAISS is not installed or cannot use it.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingPackageError("faiss", "recall") from error
    kind, _, number = device.partition(":")
    if device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and number.isdecimal()):
        raise UsageError(f"device {device!r} is not known; use auto, cpu, cuda or cuda:N")
    # faiss-cpu may lack these names
    gpus = int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0
    if kind == "cuda" and int(number or 0) >= gpus:
        raise UsageError(
            f"device {device!r} asked for, but FAISS {faiss.__version__} finds {gpus} GPUs: recall on a GPU needs "
            "faiss-gpu (pip install 'teacher-cache[gpu]') and that GPU. Or use --device cpu"
        )
    if kind == "cpu" or not gpus:
        return Engine(f"faiss-cpu {faiss.__version__}")
    return Engine(f"faiss-gpu {faiss.__version__}", int(number or 0))


@dataclass(frozen=True)
class Matches:
    """Queries of one direction, each with its best match in the gallery.

    Attributes:
        queries: (n, dim) float32.
        score: (n,) float64 inner product with the best match.
        row: (n,) row of the match in the gallery; the lowest of equal scores.
    """

    queries: _Floats
    score: NDArray[np.float64]
    row: _Rows

    def part(self, index: slice | _Rows) -> Matches:
        """Return a subset of the queries."""
        return Matches(self.queries[index], self.score[index], self.row[index])

    def ahead(self, gallery: _Floats, query: _Rows, row: _Rows) -> _Rows:
        """Count for each query, in float64, the listed rows that come before its match; ties are ordered by row.

        Args:
            query, row: (p,) pairs of a query and a row of the gallery.
        """
        scores, best = exact_scores(self.queries, gallery, query, row), self.score[query]
        before = (scores > best) | ((scores == best) & (row < self.row[query]))
        return np.bincount(query[before], minlength=len(self.queries))


def rows_ahead(matches: Matches, gallery: _Floats, depth: int, engine: Engine) -> _Rows:
    """Count, for each query, the rows of the gallery that come before its best match.

    The counts are exact: they equal those of all scores in float64, ties ordered by row. Memory is bounded.

    Args:
        gallery: (m, dim) float32, contiguous.
        depth: count at which to stop.

    Returns:
        (n,) counts. A count of ``depth`` or more may be smaller than the true one.

    Raises:
        UsageError: the GPU's scores are less exact than float32.
    """
    ahead = np.empty(len(matches.queries), np.int64)
    longest = float(row_lengths(gallery).max())
    with _torch_threads():
        search = engine.searcher(gallery)
        for block in _blocks(len(ahead), _QUERIES_AT_ONCE):
            part = matches.part(block)
            reach = row_lengths(part.queries) * longest
            ahead[block], open_ = _searched(part, gallery, reach, depth, engine, search)
            rest = np.flatnonzero(open_)
            if len(rest):
                ahead[block.start + rest] = _counted(part.part(rest), gallery, reach[rest], depth)
    return ahead


def _searched(
    matches: Matches, gallery: _Floats, reach: NDArray[np.float64], depth: int, engine: Engine, search: _Search
) -> tuple[_Rows, NDArray[np.bool_]]:
    """Count among FAISS's candidates; also return which queries these do not decide."""
    dim, k = gallery.shape[1], min(depth + _SPARE, _MOST_CANDIDATES, len(gallery))
    # The error of a float32 sum of dim products is below dim * 2^-24 * |q| |g| (Higham 2002, eq. 3.7; 1.01 for its
    # denominator) plus underflow. Queries whose sums may overflow are not searched by FAISS.
    error = 1.01 * dim * (2.0**-24 * reach + 2.0**-126)
    open_ = reach >= 2.0**120
    ahead = np.zeros(len(reach), np.int64)
    searched = np.flatnonzero(~open_)
    if not len(searched):
        return ahead, open_
    part, error = matches.part(searched), error[searched]
    scores, rows = search(np.ascontiguousarray(part.queries), k)
    if engine.gpu is not None:
        _require_float32(part.queries, gallery, scores, rows, error)
    low, high = (part.score - error)[:, None], (part.score + error)[:, None]
    query, place = np.nonzero((scores >= low) & (scores <= high))
    ahead[searched] = (scores > high).sum(axis=1) + part.ahead(gallery, query, rows[query, place])
    # rows beyond the candidates may come before the match, unless the last candidate clearly comes after it
    open_[searched] = (scores[:, -1:] >= low)[:, 0] & (ahead[searched] < depth) & (k < len(gallery))
    return ahead, open_


def _counted(matches: Matches, gallery: _Floats, reach: NDArray[np.float64], depth: int) -> _Rows:
    """Count among all scores in float64, for queries that FAISS does not decide: collapsed students, deep ranks."""
    dim = gallery.shape[1]
    # BLAS adds in another order than exact_scores, which decides: each has up to half this error
    error = 2.02 * dim * (2.0**-53 * reach + 2.0**-1022)
    low, high = matches.score - error, matches.score + error
    ahead = np.zeros(len(reach), np.int64)
    for rows in _blocks(len(gallery), max(1, _WORK_BYTES // (8 * dim))):
        columns = gallery[rows].astype(np.float64).T
        still = np.flatnonzero(ahead < depth)
        for block in _blocks(len(still), max(1, _WORK_BYTES // (8 * columns.shape[1]))):
            queries = still[block]
            scores = matches.queries[queries].astype(np.float64) @ columns
            above = scores > high[queries, None]
            query, row = np.nonzero((scores >= low[queries, None]) & ~above)
            ahead[queries] += above.sum(axis=1) + matches.part(queries).ahead(gallery, query, row + rows.start)
    return ahead


def _require_float32(
    queries: _Floats, gallery: _Floats, scores: _Floats, rows: _Rows, error: NDArray[np.float64]
) -> None:
    """Check a sample of the GPU's scores: the errors of TF32 and float16 exceed the bound."""
    proven = np.linspace(0, len(queries) - 1, min(len(queries), _GPU_PROVEN)).astype(int)
    places = min(rows.shape[1], 64)
    query, place = np.repeat(proven, places), np.tile(np.arange(places), len(proven))
    off = np.abs(scores[query, place] - exact_scores(queries, gallery, query, rows[query, place]))
    # rounding errors cancel: their sum grows with the root of dim, the bound with dim
    if (off > error[query] * min(1.0, 4 / np.sqrt(gallery.shape[1]))).any():
        raise UsageError(
            f"faiss-gpu: scores are off by {off.max():.1e}, more than float32 explains (TF32?), so that recall would "
            "not be exact. Use --device cpu"
        )


@contextmanager
def _torch_threads() -> Iterator[None]:
    """Limit FAISS to torch's number of threads within the block. FAISS's own limit holds too."""
    import faiss

    torch: Any = sys.modules.get("torch")
    before = faiss.omp_get_max_threads()
    if torch is not None:
        faiss.omp_set_num_threads(min(before, torch.get_num_threads()))
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def row_lengths(rows: _Floats) -> NDArray[np.float64]:
    """Return the norm of each row in float64, (rows,); not finite if a value is not."""
    return np.asarray(np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64)))


def _blocks(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
