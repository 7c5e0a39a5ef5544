"""FAISS's approximate indexes: built from a factory string, searched with an effort, their inner products counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.errors import CacheCorruptError, UsageError

_LEAST_EF, _MOST_EF = 16, 4_096
_Floats = NDArray[np.float32]


class ApproximateIndex:
    """An inner-product index of FAISS, and its effort: efSearch of a graph, nprobe of inverted lists.

    Threads may search it at once.

    Attributes:
        effort: name of the effort; empty if the index has none.
    """

    def __init__(self, index: Any) -> None:
        import faiss

        self.index = index
        self._space = faiss.ParameterSpace()
        self._lists: Any = faiss.try_extract_index_ivf(index)
        self.effort = next((name for name in ("nprobe", "efSearch") if self._takes(name)), "")

    @classmethod
    def build(cls, factory: str, rows: _Floats) -> ApproximateIndex:
        """Train an index where its kind needs it, and add the rows.

        Args:
            factory: FAISS's factory string.
            rows: (rows, dim), unit norm.

        Raises:
            UsageError: FAISS does not know the string, or cannot build such an index of these rows.
        """
        import faiss

        try:
            index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
            index.train(rows)
            index.add(rows)
        except RuntimeError as error:
            raise UsageError(
                f"--factory {factory}: FAISS {faiss.__version__} builds no such index of {len(rows):,} rows of width "
                f"{rows.shape[1]} by inner product ({str(error).rpartition(': ')[2]}). Leave it out for HNSW32"
            ) from error
        return cls(index)

    @classmethod
    def loaded(cls, data: bytes, rows: int, dim: int, effort: int | None) -> ApproximateIndex:
        """Return the index in these bytes, which must be proven: FAISS's reader trusts what it reads.

        Raises:
            CacheCorruptError: it has other rows or another width or metric.
        """
        import faiss

        try:
            index = faiss.deserialize_index(np.frombuffer(data, np.uint8))
        except RuntimeError as error:
            raise CacheCorruptError(f"FAISS {faiss.__version__} cannot read the index: {error}") from error
        form = (index.ntotal, index.d, index.metric_type)
        if form != (rows, dim, faiss.METRIC_INNER_PRODUCT):
            raise CacheCorruptError(
                f"the index holds {form[0]:,} rows of width {form[1]}, metric {form[2]}; {rows:,} rows of width {dim}, "
                f"metric {faiss.METRIC_INNER_PRODUCT} are wanted. Build it anew by teacher-cache index"
            )
        result = cls(index)
        if effort is not None:
            result.set_effort(effort)
        return result

    def to_bytes(self) -> bytes:
        """Return the index in FAISS's own format."""
        import faiss

        return bytes(faiss.serialize_index(self.index))

    def efforts(self) -> Iterator[int | None]:
        """Yield the efforts to try: the least one, doubled each time. None alone if the index has none."""
        if not self.effort:
            yield None
            return
        least, most = (1, self._lists.nlist) if self.effort == "nprobe" else (_LEAST_EF, _MOST_EF)
        while least < most:
            yield least
            least *= 2
        yield most

    def set_effort(self, effort: int) -> None:
        """Set efSearch or nprobe."""
        self._space.set_index_parameter(self.index, self.effort, effort)

    def search(self, queries: _Floats, k: int) -> NDArray[np.int64]:
        """Return the positions of about the k nearest rows of each query, (queries, k); -1 where there are fewer."""
        return np.asarray(self.index.search(np.ascontiguousarray(queries, np.float32), k)[1])

    def counted(self, queries: _Floats, k: int) -> tuple[NDArray[np.int64], float]:
        """Return the result of :meth:`search`, and the inner products computed for a query on average.

        Counted by FAISS's own statistics, which are of this process: nothing else may search meanwhile.
        """
        import faiss

        counters: Any = faiss.cvar
        graph, lists = counters.hnsw_stats, counters.indexIVF_stats
        graph.reset()
        lists.reset()
        rows = self.search(queries, k)
        products = (graph.ndis + lists.ndis) / len(queries)
        if self._lists is not None and not graph.ndis:
            products += self._lists.nlist  # the centroids, which are searched exhaustively
        return rows, products or float(self.index.ntotal)

    def _takes(self, effort: str) -> bool:
        try:
            self._space.set_index_parameter(self.index, effort, 1)
        except RuntimeError:
            return False
        return True
