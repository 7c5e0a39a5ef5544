"""Teachers and students in torch, to be measured by ``teacher_cache.pipeline.evaluate.cost.measure``.

Decoding and tokenizing are not timed: they are the same work for every model of one input size. Pixels are random,
since no kernel's speed depends on the picture. Captions are those of
``teacher_cache.pipeline.evaluate.cost.results``, since their lengths matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from teacher_cache.pipeline.evaluate.cost.peak_memory import ProbeRequest
from teacher_cache.pipeline.evaluate.cost.results import MeasuredModel, ModelFacts, TowerFlops, captions
from teacher_cache.pipeline.models.device import full_float32, image_memory_format, resolve_device
from teacher_cache.pipeline.models.run_record import CHECKPOINT_WEIGHTS
from teacher_cache.pipeline.models.student import load_student, student_tokenizer
from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.pipeline.models.text_length import can_shorten, encode_text, shorten
from teacher_cache.pipeline.settings.names import TRANSFORMERS, teacher_folder


class TorchModel:
    """An open_clip model in float32: a ``teacher_cache.pipeline.evaluate.cost.results.CostModel``.

    A convolutional image tower gets the memory layout of its kernels: a third faster on a CPU.

    Args:
        model: in evaluation mode; moved to ``device``.
        size: height and width in pixels.
        tokenizer: texts to int64 (batch, context_length).
        weights_file: the model's safetensors file, if any.
    """

    def __init__(
        self,
        model: nn.Module,
        size: tuple[int, int],
        tokenizer: Any,
        device: torch.device,
        weights_file: Path | None = None,
    ) -> None:
        self._model: Any = model.to(device).eval()
        self._size, self._tokenizer, self._device, self._weights_file = size, tokenizer, device, weights_file
        self._shortens = can_shorten(model)
        self._format = image_memory_format(model)
        self._model.visual.to(memory_format=self._format)

    def images(self, batch: int) -> Callable[[], object]:
        """Return a call that embeds random pixels, (batch, 3, height, width), into unit rows on the CPU."""
        drawn = torch.randn(batch, 3, *self._size, generator=torch.Generator().manual_seed(0))
        pixels = drawn.to(self._device).to(memory_format=self._format)
        return lambda: self._finish(self._model.encode_image, pixels)

    def texts(self, batch: int) -> Callable[[], object]:
        """Return a call that embeds that many of ``CAPTIONS``, cut after the longest one if the model allows that."""
        tokens = self._tokens(batch).to(self._device)
        return lambda: self._finish(self._encode_text, tokens)

    def facts(self) -> ModelFacts:
        """Return the model's size and FLOPs."""
        state = self._model.state_dict().values()
        file = self._weights_file
        return ModelFacts(
            parameters=sum(parameter.numel() for parameter in self._model.parameters()),
            weights_bytes=file.stat().st_size if file is not None and file.is_file() else None,
            state_bytes=sum(tensor.numel() * tensor.element_size() for tensor in state),
            flops=self._flops(),
        )

    def _flops(self) -> TowerFlops:
        whole, short = torch.as_tensor(self._tokenizer(captions(1))).to(self._device), self._tokens(1).to(self._device)
        pixels = torch.zeros(1, 3, *self._size, device=self._device)
        return TowerFlops(
            image=count_flops(lambda: self._model.encode_image(pixels)),
            text=count_flops(lambda: self._encode_text(whole)),
            text_tokens=whole.shape[1],
            caption=count_flops(lambda: self._encode_text(short)),
            caption_tokens=short.shape[1],
        )

    def _encode_text(self, tokens: Tensor) -> Tensor:
        return encode_text(self._model, tokens)

    def _tokens(self, batch: int) -> Tensor:
        tokens: Tensor = torch.as_tensor(self._tokenizer(captions(batch)))
        return shorten(tokens) if self._shortens else tokens

    def _finish(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        with torch.inference_mode(), full_float32():
            # cpu() waits for the GPU
            return F.normalize(encode(inputs).float(), dim=-1).cpu()


def load_teacher_model(name: str, pretrained: str | None = None, device: str = "auto") -> TorchModel:
    """Load a teacher to measure; see :func:`teacher_cache.pipeline.models.teacher.load_teacher`.

    Raises:
        UsageError: it cannot be loaded.
    """
    teacher = load_teacher(name, pretrained, device)
    folder = teacher_folder(name)
    weights = "model.safetensors" if name.startswith(TRANSFORMERS) else CHECKPOINT_WEIGHTS
    file = folder / weights if folder is not None else None
    return TorchModel(teacher.model, teacher.preprocess.size, teacher.tokenizer, teacher.device, file)


def load_student_model(folder: str, device: str = "auto") -> TorchModel:
    """Load a student's checkpoint to measure.

    Raises:
        UsageError: it cannot be loaded.
    """
    student, config = load_student(Path(folder))
    file = Path(folder) / CHECKPOINT_WEIGHTS
    return TorchModel(student.model, student.preprocess.size, student_tokenizer(config), resolve_device(device), file)


def loaded(load: Callable[..., TorchModel], arguments: dict[str, Any], batch: int, threads: int) -> MeasuredModel:
    """Load a model to measure. The arguments load it again in the process that measures memory."""
    model = load(**arguments)
    return MeasuredModel(model, ProbeRequest.of(load, arguments, batch, threads), model.facts())


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Disable the fused encoder layer of ``nn.MultiheadAttention``, which nothing sees into, within the block."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def count_flops(run: Callable[[], object]) -> int:
    """Count the FLOPs of one call, 2 per multiply-add.

    Two kernels would hide work from the counter and are disabled: the fused encoder layer of ``nn.MultiheadAttention``
    (a third of a ViT), and fused attention on a CPU (1 to 3 % of a CLIP's towers). Masked attention scores count, since
    kernels compute them.

    Args:
        run: any torch computation; run without gradients.
    """
    with no_fast_path(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())
