"""Floating-point operations of a forward pass, counted by torch's own counter: 2 x multiply-adds.

torch counts matrix products, convolutions and attention; norms, activations, softmax and look-ups, some per cent of
a tower, it leaves out, as published figures do. Those of open_clip (docs/model_profile.csv there, by fvcore) are
in the same units and equal these: ViT-B-32 8.82 GFLOPs an image, 5.96 a caption of 77 tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import BaseModel, Field
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["TowerFlops", "count_flops"]


class TowerFlops(BaseModel, frozen=True):
    """Of one image and one caption."""

    image: int = Field(description="One image at the model's own size.")
    text: int = Field(description="One text at the full context, as published figures count.")
    text_tokens: int = Field(description="Tokens of the full context.")
    caption: int = Field(description="A caption of usual length as it is encoded here: shortened, where that is sound.")
    caption_tokens: int = Field(description="Tokens that are encoded for it; rounded up as pipeline.short_text does.")


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of one call, 2 for a multiplication and its addition.

    Two kernels would hide work from the counter, and neither is used while it counts: the fused encoder layer of
    ``nn.MultiheadAttention`` (a third of a ViT) and fused attention on a CPU (1 to 3 % of a CLIP's towers). What a
    causal mask leaves unused counts, since kernels compute it.

    Args:
        run: any torch computation. It needs no gradient and is run without one.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())
