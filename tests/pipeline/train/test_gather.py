"""Two real processes under DistributedDataParallel against one process on the joined batch."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from teacher_cache.pipeline.settings.recipes import RECIPES
from teacher_cache.pipeline.train.gather import gather_features
from teacher_cache.pipeline.train.losses import LOSSES, LossInputs, TeacherQueue, weighted_sum

RANKS, ROWS, TEACHER_DIM = 2, 6, 5
MIXES: dict[str, dict[str, float]] = {
    **{name: {name: 1.0} for name in LOSSES},
    **{f"recipe {name}": recipe.losses for name, recipe in RECIPES.items()},
    "all": dict.fromkeys(LOSSES, 1.0),
}
CASES = [(name, dtype) for name in MIXES for dtype in (torch.float64, torch.float32)]


class Towers(nn.Module):
    """Two small towers of another width than the teacher, with all that a student trains."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 4)), nn.Linear(9, 4)
        self.image_projection, self.text_projection = (nn.Linear(4, TEACHER_DIM, bias=False) for _ in range(2))
        self.log_logit_scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        u, v = self.image(pixels), self.text(tokens)
        projected = self.image_projection(u), self.text_projection(v)
        return *(F.normalize(x, dim=-1) for x in (u, v, *projected)), self.log_logit_scale.exp()


def make_towers(dtype: torch.dtype) -> Towers:
    torch.manual_seed(0)
    return Towers().to(dtype)


def joined_batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels, tokens, teacher's images and texts of all ranks."""
    generator = torch.Generator().manual_seed(100 + step)
    widths = (7, 9, TEACHER_DIM, TEACHER_DIM)
    pixels, tokens, p, q = (torch.randn(RANKS * ROWS, width, generator=generator).to(dtype) for width in widths)
    return pixels, tokens, F.normalize(p, dim=1), F.normalize(q, dim=1)


def gradients_of(model: nn.Module, dtype: torch.dtype, weights: dict[str, float], rows: slice) -> dict[str, Tensor]:
    """Loss and gradients of a second step: its queue holds rows of the first step and its own."""
    queue = TeacherQueue(RANKS * ROWS + 5, TEACHER_DIM)
    for step in (0, 1):
        pixels, tokens, p, q = (tensor[rows] for tensor in joined_batch(step, dtype))
        *features, scale = model(pixels, tokens)
        u, v, pu, pv, p, q = gather_features(*features, p, q)
        queue.push(p, q)
        if step == 1:
            inputs = LossInputs((u, v), (pu, pv), (p, q), scale, 6.0, 0.1, 2.0, queue.rows())
            loss, _ = weighted_sum(inputs, weights)
            loss.backward()
    named = getattr(model, "module", model).named_parameters()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in named if p.grad is not None}


def one_rank(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # 127.0.0.1, no other network
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=RANKS, timeout=timedelta(seconds=120)
    )
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    found: dict[Any, Any] = {}
    for name, dtype in CASES:
        # not every loss uses the projections
        model = nn.parallel.DistributedDataParallel(make_towers(dtype), find_unused_parameters=True)
        found[name, str(dtype)] = gradients_of(model, dtype, MIXES[name], own)

    numbers = torch.arange(4.0).reshape(2, 2) + 10 * rank
    leaf, target = numbers.clone().requires_grad_(), numbers.int()
    rows, columns, integers = gather_features(leaf, leaf.T, target)
    # each rank weighs the joined rows in another way: what comes back is the sum over ranks
    ((rank + 1) * rows * torch.arange(8.0).reshape(4, 2)).sum().backward()
    found["parts"] = rows.detach(), columns.detach(), integers, integers.requires_grad, leaf.grad
    torch.save(found, f"{folder}/rank-{rank}.pt")
    # a rank that ends while the other one, or its own reducer, still has a thread in the group may be aborted
    del model
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(one_rank, (str(folder),), nprocs=RANKS)
    return [torch.load(Path(folder) / f"rank-{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_ranks_get_the_gradients_of_one_process(by_rank: list[dict[Any, Any]], name: str, dtype: torch.dtype) -> None:
    wanted = gradients_of(make_towers(dtype), dtype, MIXES[name], slice(None))
    assert wanted["image.0.weight"].abs().max() > 1e-6
    # float64 shows that it is the same sum; float32 is what trains
    off = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 1e-6, "rtol": 1e-5}
    for rank, found in enumerate(by_rank):
        gradients = found[name, str(dtype)]
        assert set(gradients) >= set(wanted)
        for parameter, gradient in gradients.items():
            expected = wanted.get(parameter, torch.zeros_like(gradient))  # DDP gives 0 where one process gives None
            torch.testing.assert_close(gradient, expected, **off, msg=lambda m, at=(rank, parameter): f"{at}: {m}")


def test_rows_come_in_the_order_of_ranks_and_their_gradients_are_summed(by_rank: list[dict[Any, Any]]) -> None:
    for rank, found in enumerate(by_rank):
        rows, columns, integers, needs_gradient, gradient = found["parts"]
        assert rows.tolist() == [[0, 1], [2, 3], [10, 11], [12, 13]]
        assert columns.tolist() == [[0, 2], [1, 3], [10, 12], [11, 13]]
        assert integers.tolist() == rows.tolist()
        assert not needs_gradient
        # weights 1 and 2 of the ranks add up to 3
        assert gradient.tolist() == [[[0, 3], [6, 9]], [[12, 15], [18, 21]]][rank]


def test_one_process_gets_its_own_tensors_back() -> None:
    a, b = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2)
    got = gather_features(a, b)
    assert got[0] is a
    assert got[1] is b
    assert gather_features() == ()
