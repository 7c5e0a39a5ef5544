"""A queue of cached teacher rows, for the loss that wants more negatives than a batch has."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TeacherQueue"]


class TeacherQueue:
    """The last ``rows`` pairs of teacher embeddings that were pushed: first in, first out.

    Nothing in it is learned, and nothing in it is stale: a teacher's row is the same at every step, unlike the
    momentum encoder's of MoCo (He et al. 2020). Its content is a function of what was pushed, in that order. With
    several ranks each pushes the gathered rows of all, so that all queues are equal.

    A step pushes its own teacher rows, then reads ``rows()``, so that every pair of the batch has its match among
    the queued ones.
    """

    def __init__(self, rows: int, dim: int, device: torch.device | str = "cpu") -> None:
        """Make an empty queue.

        Args:
            rows: most pairs that are kept, > 0.
            dim: width of the teacher's embeddings.
            device: where rows are kept and returned.

        Raises:
            ValueError: ``rows`` is not > 0.
        """
        if rows < 1:
            raise ValueError(f"a queue of {rows} rows holds nothing; wanted at least 1")
        self.most_rows, self.dim = rows, dim
        self._device = torch.device(device)
        self._image = torch.empty(0, dim, device=self._device)
        self._text = torch.empty(0, dim, device=self._device)

    def __len__(self) -> int:
        """Pairs held now."""
        return len(self._image)

    def push(self, image: Tensor, text: Tensor) -> None:
        """Add pairs at the end; the oldest leave when there are more than ``most_rows``.

        Rows got before stay as they were: nothing is overwritten in place, so a loss of an earlier step can still be
        differentiated.

        Args:
            image, text: (batch, dim), row ``i`` of both of the same pair; detached here.

        Raises:
            ValueError: shapes differ, or are not ``dim`` wide.
        """
        self._require(image, text)
        self._image, self._text = self._joined(self._image, image), self._joined(self._text, text)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Images and texts, (pairs held, dim) each, oldest first."""
        return self._image, self._text

    def state_dict(self) -> dict[str, Tensor]:
        """All that the queue is: ``image`` and ``text``, as ``rows()``."""
        return {"image": self._image, "text": self._text}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state_dict()``, on this queue's device.

        Raises:
            ValueError: of another width, or more rows than this queue keeps.
        """
        image, text = state["image"], state["text"]
        self._require(image, text)
        if len(image) > self.most_rows:
            raise ValueError(
                f"the saved queue holds {len(image)} rows, this one keeps {self.most_rows}. Resume with the queue_rows "
                "that the run was started with."
            )
        # copies: what was saved belongs to the caller
        self._image = image.detach().to(self._device, copy=True)
        self._text = text.detach().to(self._device, copy=True)

    def _require(self, image: Tensor, text: Tensor) -> None:
        if image.shape != text.shape or image.ndim != 2 or image.shape[1] != self.dim:
            raise ValueError(
                f"images {tuple(image.shape)} and texts {tuple(text.shape)}: wanted (pairs, {self.dim}) of both"
            )

    def _joined(self, held: Tensor, new: Tensor) -> Tensor:
        new = new.detach().to(self._device)[-self.most_rows :]
        kept = held[max(len(held) + len(new) - self.most_rows, 0) :]
        # a tensor of its own, not a view of a longer one: saving a view saves all of it
        return torch.cat([kept.to(new.dtype), new])
