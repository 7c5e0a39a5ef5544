"""The nearest rows of a gallery, exactly: FAISS proposes in float32, float64 decides. Bounded memory; no torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["nearest_parts", "searches_on_gpu", "top_k"]

_QUERIES_AT_ONCE = 4096
_WORK_BYTES = 128 << 20
# candidates beyond k: enough that a near-tie at the k-th place seldom needs the whole gallery
_SPARE = 32
_GPU_MOST = 2048  # faiss-gpu keeps its candidates in registers and shared memory, and refuses more
_GPU_PROVEN = 16  # queries of each part whose scores by the GPU are computed again


def top_k(queries: NDArray[np.float32], gallery: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The k nearest rows of the gallery by inner product, best first, equal scores by row number.

    Exact: FAISS's exhaustive search (float32; on the GPU where faiss-gpu finds one) proposes, and every query whose
    order is within float32's rounding error of a tie is decided anew by scores in float64.

    Args:
        queries: (n, dim) float32.
        gallery: (m, dim) float32.
        k: may exceed m.

    Returns:
        (n, min(k, m)) row numbers.

    Raises:
        ValueError: widths differ, or a value is not finite.
    """
    found = np.empty((len(queries), min(k, len(gallery))), np.int64)
    for start, rows in nearest_parts(queries, gallery, k):
        found[start : start + len(rows)] = rows
    return found


def searches_on_gpu() -> bool:
    """Whether FAISS is there, is built for GPUs, and finds one."""
    try:
        import faiss
    except ImportError:
        return False
    return _gpus(faiss) > 0


def nearest_parts(
    queries: NDArray[np.float32], gallery: NDArray[np.float32], k: int
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """:func:`top_k` of some queries after the other: the first query of the part, and its rows (part, min(k, m)).

    Besides the two arrays it holds some 0.5 GB at most, whatever n, m and k are; never all scores.

    Raises:
        ValueError: as :func:`top_k`.
    """
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries {queries.shape} and gallery {gallery.shape} must both be (rows, dim) of one dim")
    gallery = np.ascontiguousarray(gallery, np.float32)
    k = min(k, len(gallery))
    lengths = [_lengths(part) for part in _blocks(gallery)]
    if not all(np.isfinite(part).all() for part in [*lengths, *map(_lengths, _blocks(queries))]):
        raise ValueError("queries and gallery must be finite")
    if k < 1 or not len(queries):
        return
    exact = _Exact(gallery, max(float(part.max()) for part in lengths))
    asked = min(k + _SPARE, len(gallery))
    # FAISS holds up to twice the candidates while it looks
    step = max(1, min(_QUERIES_AT_ONCE, _WORK_BYTES // (36 * asked)))
    for start in range(0, len(queries), step):
        yield start, exact.nearest(np.ascontiguousarray(queries[start : start + step], np.float32), k, asked)


class _Exact:
    """One gallery, asked with parts of the queries.

    Args:
        longest: norm of its longest row.
    """

    def __init__(self, gallery: NDArray[np.float32], longest: float) -> None:
        self._gallery, self._longest = gallery, longest
        self._search = _Search(gallery)

    def nearest(self, queries: NDArray[np.float32], k: int, asked: int) -> NDArray[np.int64]:
        """(n, k) rows, by ``asked`` >= k candidates."""
        dim = self._gallery.shape[1]
        reach = _lengths(queries) * self._longest
        # A float32 sum of dim products is off by less than dim * 2^-24 * |q| |g| (Higham 2002, eq. 3.7), and by what
        # underflows. Where it may overflow, FAISS is not believed at all.
        error = np.where(reach < 2.0**120, dim * (2.0**-24 * reach + 2.0**-126), np.inf)
        scores, rows = self._search(queries, asked, error)
        if asked > 1:
            # of two scores, each may be off
            with np.errstate(invalid="ignore"):  # infinities, where it overflowed
                clear = (scores[:, :k] - _next(scores, k) > 2 * error[:, None]).all(axis=1)
        else:
            clear = np.isfinite(error)
        result: NDArray[np.int64] = rows[:, :k].copy()
        near = np.flatnonzero(~clear & np.isfinite(error))
        order, kth = self._rescored(queries[near], rows[near], k)
        result[near] = order
        # sure when nothing beyond the candidates can reach the k-th score, or there is nothing beyond
        sure = np.full(len(near), asked == len(self._gallery)) | (scores[near, -1] + error[near] < kth)
        for part in _blocks_of(np.concatenate([near[~sure], np.flatnonzero(np.isinf(error))]), self._whole_step):
            result[part] = self._of_all(queries[part], k)
        return result

    @property
    def _whole_step(self) -> int:
        return max(1, _WORK_BYTES // (8 * len(self._gallery)))

    def _rescored(
        self, queries: NDArray[np.float32], rows: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The best k of the candidates by float64 score, then row; and the k-th score."""
        best = np.empty((len(queries), k), np.int64)
        kth = np.empty(len(queries))
        for part in _blocks_of(np.arange(len(queries)), max(1, _WORK_BYTES // (8 * rows.shape[1]))):
            candidates = rows[part]
            scores = self._scores(queries[part], candidates)
            order = np.lexsort((candidates, -scores), axis=1)[:, :k]
            best[part] = np.take_along_axis(candidates, order, axis=1)
            kth[part] = np.take_along_axis(scores, order[:, -1:], axis=1)[:, 0]
        return best, kth

    def _scores(self, queries: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """(n, candidates) float64."""
        scores = np.empty(rows.shape)
        vectors = max(1, _WORK_BYTES // (12 * self._gallery.shape[1]))
        wide = min(rows.shape[1], vectors) or 1
        for part in _blocks_of(np.arange(len(queries)), max(1, vectors // wide)):
            wanted = queries[part].astype(np.float64)
            for start in range(0, rows.shape[1], wide):
                some = self._gallery[rows[part, start : start + wide]].astype(np.float64)
                # einsum adds in one order whatever the rows are, so that equal vectors get equal scores
                scores[part, start : start + wide] = np.einsum("nd,ncd->nc", wanted, some)
        return scores

    def _of_all(self, queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        """(n, k) rows, by the whole gallery: where far more of it is near-tied than was proposed."""
        wide = queries.astype(np.float64)
        scores = np.empty((len(queries), len(self._gallery)))
        at = 0
        for part in _blocks(self._gallery):
            scores[:, at : at + len(part)] = wide @ part.T.astype(np.float64)
            at += len(part)
        # BLAS adds in another order than einsum, which has the last word: off by this at most, each of the two
        dim = self._gallery.shape[1]
        error = dim * (2.0**-53 * _lengths(queries) * self._longest + 2.0**-1022)
        best = np.empty((len(queries), k), np.int64)
        for query, some in enumerate(scores):
            least = np.partition(some, len(some) - k)[len(some) - k]
            candidates = np.flatnonzero(some >= least - 4 * error[query])
            best[query] = self._rescored(queries[query : query + 1], candidates[None], k)[0][0]
        return best


class _Search:
    """FAISS's exhaustive search by inner product, on a GPU or on the CPU.

    The CPU searches in the caller's array, without an index, which would be a copy of it.
    """

    def __init__(self, gallery: NDArray[np.float32]) -> None:
        import faiss

        self._faiss: Any = faiss
        self._gallery = gallery
        self._gpu = self._gpu_index()

    def __call__(
        self, queries: NDArray[np.float32], k: int, error: NDArray[np.float64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores (n, k) and rows (n, k), best first.

        Args:
            error: (n,) by which a score in float32 may be off.
        """
        if self._gpu is not None and k <= _GPU_MOST:
            scores, rows = self._gpu.search(queries, k)
            off = self._off(queries, scores, rows, error)
            if off is None:
                return scores, rows
            self._leave_gpu(f"its scores are off by {off:.1e}, more than float32 explains (TF32?)")
        found: tuple[NDArray[np.float32], NDArray[np.int64]] = self._faiss.knn(
            queries, self._gallery, k, metric=self._faiss.METRIC_INNER_PRODUCT
        )
        return found

    def _gpu_index(self) -> Any:
        faiss = self._faiss
        if not _gpus(faiss):
            return None
        try:
            config = faiss.GpuIndexFlatConfig()
            config.useFloat16 = False  # rows are kept as they are; the error bound is float32's
            self._resources = faiss.StandardGpuResources()  # must outlive the index
            index = faiss.GpuIndexFlatIP(self._resources, self._gallery.shape[1], config)
            index.add(self._gallery)
        except RuntimeError as error:
            self._leave_gpu(str(error).strip().splitlines()[-1])
            return None
        return index

    def _off(
        self,
        queries: NDArray[np.float32],
        scores: NDArray[np.float32],
        rows: NDArray[np.int64],
        error: NDArray[np.float64],
    ) -> float | None:
        """How far scores of some queries are off, where that is more than sums in float32 are in practice."""
        some = np.linspace(0, len(queries) - 1, min(len(queries), _GPU_PROVEN)).astype(int)
        near = rows[some, : min(rows.shape[1], 64)]
        exact = np.einsum("nd,ncd->nc", queries[some].astype(np.float64), self._gallery[near].astype(np.float64))
        off = np.abs(scores[some, : near.shape[1]] - exact).max(axis=1)
        # rounding errors cancel: their sum grows with the root of dim, and the bound with dim. TF32's are above
        dim = self._gallery.shape[1]
        most = error[some] * min(1.0, 4 / np.sqrt(dim))
        return None if (off <= most).all() else float(off.max())

    def _leave_gpu(self, why: str) -> None:
        self._gpu = self._resources = None
        warnings.warn(f"faiss-gpu: {why}. Going on with the CPU, to the same result.", RuntimeWarning, stacklevel=2)


def _gpus(faiss: Any) -> int:
    # the build for CPUs may lack the names, and a build for GPUs may run where there is none
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


def _next(scores: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """The score after each of the first k; behind the last of the gallery there is none, and that is far."""
    if scores.shape[1] > k:
        return scores[:, 1 : k + 1]
    return np.pad(scores[:, 1:], ((0, 0), (0, 1)), constant_values=-np.inf)


def _lengths(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """(rows,) norms in float64; not finite where a value is not."""
    lengths: NDArray[np.float64] = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    return lengths


def _blocks(rows: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    step = max(1, _WORK_BYTES // (8 * max(rows.shape[1], 1)))
    return (rows[start : start + step] for start in range(0, len(rows), step))


def _blocks_of(positions: NDArray[np.int64], step: int) -> Iterator[NDArray[np.int64]]:
    return (positions[start : start + step] for start in range(0, len(positions), step))
