"""Rank of a query's best match in a gallery: FAISS proposes in float32, float64 decides. No torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.look.nearest import exact_scores

__all__ = ["Engine", "Matches", "find_engine", "row_lengths", "rows_ahead"]

_SPARE = 32  # candidates beyond the depth: near ties at the last place seldom need more
_MOST_CANDIDATES = 256  # FAISS is slow beyond, and refuses more than 2,048 on a GPU: deeper ranks are counted
_QUERIES_AT_ONCE = 4_096
_WORK_BYTES = 64 << 20
_GPU_PROVEN = 16  # queries of each block whose GPU scores are computed again

_Floats = NDArray[np.float32]
_Rows = NDArray[np.int64]
_Search = Callable[[_Floats, int], tuple[_Floats, _Rows]]


@dataclass(frozen=True)
class Engine:
    """FAISS's exhaustive inner-product search on one device.

    Attributes:
        name: build and version, as results record it.
        gpu: number of the CUDA device; None for the CPU.
    """

    name: str
    gpu: int | None = None

    def searcher(self, gallery: _Floats) -> _Search:
        """Return a function of (queries, k) that gives the scores and rows of the k nearest, best first."""
        import faiss

        if self.gpu is None:  # in the caller's array: an index would be a copy of it
            return lambda queries, k: faiss.knn(queries, gallery, k, metric=faiss.METRIC_INNER_PRODUCT)
        config = faiss.GpuIndexFlatConfig()
        config.device = self.gpu
        config.useFloat16 = False  # the error bound is float32's
        resources = faiss.StandardGpuResources()
        index = faiss.GpuIndexFlatIP(resources, gallery.shape[1], config)
        index.add(gallery)

        def search(queries: _Floats, k: int, resources: object = resources) -> tuple[_Floats, _Rows]:
            # the index uses the resources without owning them: the default argument keeps them alive
            scores, rows = index.search(queries, k)
            return scores, rows

        return search


def find_engine(device: str = "auto") -> Engine:
    """Return the engine of a device, which never searches on another one.

    Args:
        device: auto, cpu, cuda or cuda:N. auto is the GPU where faiss-gpu finds one, else the CPU.

    Raises:
        UsageError: the device is unknown, or FAISS is not installed or cannot use it.
    """
    try:
        import faiss
    except ImportError as error:
        raise UsageError(
            "recall needs FAISS, which is not installed: pip install 'teacher-cache[cpu]', or [gpu] for faiss-gpu"
        ) from error
    kind, _, number = device.partition(":")
    if device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and number.isdecimal()):
        raise UsageError(f"device {device!r} is not known; use auto, cpu, cuda or cuda:N")
    # faiss-cpu may lack the names, and faiss-gpu may run on a machine without a GPU
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
        row: (n,) the match's row in the gallery; the lowest of equal ones.
    """

    queries: _Floats
    score: NDArray[np.float64]
    row: _Rows

    def part(self, index: slice | _Rows) -> Matches:
        """Return some of the queries."""
        return Matches(self.queries[index], self.score[index], self.row[index])

    def ahead(self, gallery: _Floats, query: _Rows, row: _Rows) -> _Rows:
        """Count in float64, for each query, the listed rows that come before its match; equal scores go by row.

        Args:
            query, row: (p,) pairs of a query and a row of the gallery.
        """
        scores, best = exact_scores(self.queries, gallery, query, row), self.score[query]
        before = (scores > best) | ((scores == best) & (row < self.row[query]))
        return np.bincount(query[before], minlength=len(self.queries))


def rows_ahead(matches: Matches, gallery: _Floats, depth: int, engine: Engine) -> _Rows:
    """Count, for each query, the rows of the gallery that come before its best match.

    Exact: as all scores in float64 would say, equal ones ordered by row. Memory is bounded at any size.

    Args:
        gallery: (m, dim) float32, contiguous.
        depth: how far to count.

    Returns:
        (n,) counts; one of ``depth`` or more may be short of the true one.

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
    """Count by FAISS's candidates; also return which queries those leave open."""
    dim, k = gallery.shape[1], min(depth + _SPARE, _MOST_CANDIDATES, len(gallery))
    # A float32 sum of dim products is off by less than dim * 2^-24 * |q| |g| (Higham 2002, eq. 3.7; 1.01 for its
    # denominator), and by what underflows. Where it may overflow, FAISS is not asked.
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
    # rows beyond the candidates may come before the match too, unless the last candidate is clearly behind it
    open_[searched] = (scores[:, -1:] >= low)[:, 0] & (ahead[searched] < depth) & (k < len(gallery))
    return ahead, open_


def _counted(matches: Matches, gallery: _Floats, reach: NDArray[np.float64], depth: int) -> _Rows:
    """Count by all scores in float64, for queries that FAISS leaves open: collapsed students, ranks far down."""
    dim = gallery.shape[1]
    # BLAS adds in another order than exact_scores, which decides: each may be off by half of this
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
    """Check some of a GPU's scores: in TF32 or float16 they are off by more than the bound allows for.

    Raises:
        UsageError: they are.
    """
    proven = np.linspace(0, len(queries) - 1, min(len(queries), _GPU_PROVEN)).astype(int)
    places = min(rows.shape[1], 64)
    query, place = np.repeat(proven, places), np.tile(np.arange(places), len(proven))
    off = np.abs(scores[query, place] - exact_scores(queries, gallery, query, rows[query, place]))
    # rounding errors cancel: in practice their sum grows with the root of dim, the bound with dim
    if (off > error[query] * min(1.0, 4 / np.sqrt(gallery.shape[1]))).any():
        raise UsageError(
            f"faiss-gpu: scores are off by {off.max():.1e}, more than float32 explains (TF32?), so that recall would "
            "not be exact. Use --device cpu"
        )


@contextmanager
def _torch_threads() -> Iterator[None]:
    """Let FAISS use no more threads than torch was told to, while the block runs; its own limit holds too."""
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
    """Return the (rows,) norms in float64; not finite where a value is not."""
    return np.asarray(np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64)))


def _blocks(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
