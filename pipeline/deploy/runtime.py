"""The runtime of a deployed student: images and texts to features, classes and search. No torch.

    student = StudentRuntime("deployed/a")
    student.classify(["cat.jpg"], ["a photo of a cat", "a photo of a dog"])      # [[0.98, 0.02]]

Needs ``pip install teacher-cache[runtime]``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from teacher_cache.pipeline.data.datasets.files import open_regular
from teacher_cache.pipeline.data.images.decode import UndecodableImageError, decode_image, load_image
from teacher_cache.pipeline.data.images.model_input import RESIZE_MODES, ModelInput
from teacher_cache.pipeline.deploy.formats.openvino_ir import load_openvino
from teacher_cache.pipeline.deploy.record import RECORD, Deployment, Variant
from teacher_cache.pipeline.deploy.tokens import StudentTokens, runtime_package
from teacher_cache.storage.errors import UsageError

ImageLike: TypeAlias = Image.Image | str | Path | bytes
"""A Pillow image, the path of an image file, or its bytes."""


def probabilities(
    image_features: NDArray[np.float32],
    text_features: NDArray[np.float32],
    scale: float = 100.0,
    bias: float | None = None,
) -> NDArray[np.float32]:
    """Return the softmax over texts of scale x cosine, as in CLIP's paper, or SigLIP's sigmoid(scale x cosine + bias).

    Args:
        image_features, text_features: (images, dim) and (texts, dim), unit norm.
        scale: 100 is the paper's ceiling on the learned logit scale, which CLIP's own models reached.
        bias: the learned bias of a student of sigmoid losses. None: softmax.

    Returns:
        float32 (images, texts). Rows of softmax sum to 1; a sigmoid is the probability of one text by itself.

    Raises:
        ValueError: the scale is not a positive number.
    """
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale: {scale} found, a positive number wanted")
    cosines = image_features.astype(np.float64) @ text_features.astype(np.float64).T
    if bias is not None:
        # tanh cannot overflow: sigmoid(x) = (1 + tanh(x / 2)) / 2
        return np.asarray((1 + np.tanh((scale * cosines + bias) / 2)) / 2, np.float32)
    # subtract each row's maximum, so that exp cannot overflow
    weights = np.exp(scale * (cosines - cosines.max(axis=1, keepdims=True)))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


class StudentRuntime:
    """A deployed student. Each tower is read, checked and loaded at its first use.

    Several threads may use it at once. Nothing is written.

    Attributes:
        deployment: record of the deployment; ``embed_dim`` is the width of all features.

    Args:
        folder: folder of a deployment.
        variant: fp32, int8 for towers that have an int8 file, or openvino for a student that was deployed with it.
        threads: number of threads per run. Default: all cores.
        batch_size: number of images or texts per run; memory grows with it.

    Raises:
        UsageError: there is no deployment, the variant is unknown, or onnxruntime or openvino is not installed.
    """

    def __init__(
        self, folder: str | Path, variant: Variant = "fp32", threads: int | None = None, batch_size: int = 64
    ) -> None:
        if variant not in get_args(Variant):
            raise UsageError(f"variant {variant!r} is not known; there are {', '.join(get_args(Variant))}")
        if threads is not None and threads < 1:
            raise UsageError(f"threads: {threads} found, 1 or more wanted; leave it out to use all cores")
        if batch_size < 1:
            raise UsageError(f"batch_size: {batch_size} found, 1 or more wanted")
        self.folder = Path(folder)
        self.deployment = Deployment.read(folder)
        self.variant = variant
        self.threads = threads
        self.batch_size = batch_size
        self._engine = runtime_package("openvino", None) if variant == "openvino" else runtime_package("onnxruntime")
        self._input = _model_input(self.deployment)
        self._sessions: dict[str, Callable[[NDArray[Any]], Any]] = {}
        self._tokens: StudentTokens | None = None

    def pixels(self, image: ImageLike) -> NDArray[np.float32]:
        """Return an image as the model takes it: float32 (3, height, width).

        Raises:
            UndecodableImageError: as :mod:`teacher_cache.pipeline.data.images.decode` raises it, the path first.
            OSError: the file cannot be read.
        """
        try:
            if isinstance(image, Image.Image):
                decoded = load_image(image)
            elif isinstance(image, bytes):
                decoded = decode_image(image)
            else:
                with open_regular(image) as file:
                    decoded = decode_image(file.read())
            return self._input.pixels(decoded)
        except (UndecodableImageError, ValueError) as error:  # ValueError: too long a strip
            where = f"{image}: " if isinstance(image, (str, Path)) else ""
            raise UndecodableImageError(f"{where}{error}") from error

    def embed_pixels(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return features of stacked :meth:`pixels`: float32 (images, dim), each of unit norm."""
        return self._run("image", pixels)

    def embed_images(self, images: Sequence[ImageLike]) -> NDArray[np.float32]:
        """Return features of images, in their order: float32 (images, dim), each of unit norm.

        With dynamic int8 (towers without convolutions) a feature depends a little on the other images of its run;
        ``batch_size=1`` prevents that. The same holds for texts.

        Raises:
            UndecodableImageError: an image cannot be decoded; the message says which. To skip such images, call
                :meth:`pixels` for each image, then :meth:`embed_pixels`.
            OSError: a file cannot be read.
            UsageError: the image tower has no file of this variant.
            DeploymentError: the file is not the one that was deployed.
        """
        _require_several("images", images)
        features = [np.empty((0, self.deployment.embed_dim), np.float32)]
        for start in range(0, len(images), self.batch_size):
            pixels = []
            for number, image in enumerate(images[start : start + self.batch_size], start):
                try:
                    pixels.append(self.pixels(image))
                except UndecodableImageError as error:
                    raise UndecodableImageError(f"image {number}: {error}") from error
            features.append(self.embed_pixels(np.stack(pixels)))
        return np.concatenate(features)

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return features of texts, in their order: float32 (texts, dim), each of unit norm.

        A text longer than the context length is cut, as in training.

        Raises:
            UsageError: the text tower has no file of this variant, or tokenizers or ftfy is not installed.
            DeploymentError: a file is not the one that was deployed.
        """
        _require_several("texts", texts)
        tokens = self._tokens or self._load_tokens()
        ids = tokens(texts)
        # batches of similar length: less padding
        order = np.argsort(ids.argmax(axis=1), kind="stable")
        features = np.empty((len(texts), self.deployment.embed_dim), np.float32)
        for start in range(0, len(texts), self.batch_size):
            rows = order[start : start + self.batch_size]
            features[rows] = self._run("text", tokens.shortened(ids[rows]))
        return features

    def tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return texts as the model takes them: int64 (texts, length), as short as the longest text allows."""
        _require_several("texts", texts)
        tokens = self._tokens or self._load_tokens()
        return tokens.shortened(tokens(texts))

    def embed_tokens(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return features of :meth:`tokens`: float32 (texts, dim), each of unit norm."""
        return self._run("text", tokens)

    def classify(
        self, images: Sequence[ImageLike], queries: Sequence[str], scale: float | None = None
    ) -> NDArray[np.float32]:
        """Return the probability of each query for each image, see :func:`probabilities`.

        A student that learned by a sigmoid loss gives sigmoids, any other the softmax over the queries.

        Args:
            queries: whole texts, such as ``a photo of a cat``.
            scale: see :func:`probabilities`. Default: ``deployment.logit_scale``, which the student learned.

        Returns:
            float32 (images, queries).

        Raises:
            ValueError: no queries, or a scale that is not a positive number.
        """
        if not queries:
            raise ValueError("classify needs one query or more")
        scale = self.deployment.logit_scale if scale is None else scale
        return probabilities(self.embed_images(images), self.embed_texts(queries), scale, self.deployment.logit_bias)

    def search(self, index: Any, text: str, k: int = 10) -> list[tuple[int, float]]:
        """Return the rows of an index that are nearest to a text.

        Args:
            index: image features, float (rows, dim); or a FAISS inner-product index of them; or any object with a
                method ``search(float32 (1, dim), k)`` that returns scores and rows, both (1, k).
            k: maximum number of rows.

        Returns:
            (row, cosine), best first.

        Raises:
            ValueError: the index has another width, or ``k`` is not positive.
        """
        if k < 1:
            raise ValueError(f"k: {k} found, 1 or more wanted")
        dim = self.deployment.embed_dim
        width = index.shape[-1] if isinstance(index, np.ndarray) else getattr(index, "d", dim)
        if width != dim or (isinstance(index, np.ndarray) and index.ndim != 2):
            actual = f"shape {index.shape}" if isinstance(index, np.ndarray) else f"width {width}"
            raise ValueError(f"the index has {actual}, the student's features have width {dim}; index its own features")
        query = self.embed_texts([text])
        if isinstance(index, np.ndarray):
            scores = index.astype(np.float32, copy=False) @ query[0]
            best = np.argsort(-scores, kind="stable")[:k]
            return [(int(row), float(scores[row])) for row in best]
        found_scores, found_rows = index.search(query, k)
        # FAISS pads with row -1
        return [(int(row), float(score)) for row, score in zip(found_rows[0], found_scores[0], strict=True) if row >= 0]

    def _run(self, tower: Literal["image", "text"], values: NDArray[Any]) -> NDArray[np.float32]:
        run = self._sessions.get(tower) or self._load(tower)
        parts = [run(values[start : start + self.batch_size]) for start in range(0, len(values), self.batch_size)]
        return np.concatenate([np.empty((0, self.deployment.embed_dim), np.float32), *parts])

    def _load(self, tower: Literal["image", "text"]) -> Callable[[NDArray[Any]], Any]:
        data, engine = self.deployment.tower(self.folder, tower, self.variant), self._engine
        graph = b""
        if self.variant == "openvino":
            graph = self.deployment.proven(self.folder, self.deployment.openvino_graphs[tower])
        try:
            run = load_openvino(engine, graph, data, self.threads) if graph else self._load_onnx(tower, data)
        except Exception as error:  # their exceptions share no base; the digest was right, so it is the version
            made_with = ", ".join(f"{name} {version}" for name, version in self.deployment.made_with.items())
            raise UsageError(
                f"{self.folder}: {engine.__name__} {engine.__version__} cannot load the {tower} tower ({error}). "
                f"Update {engine.__name__}; the deployment was made with {made_with}."
            ) from error
        self._sessions[tower] = run
        return run

    def _load_onnx(self, tower: str, data: bytes) -> Callable[[NDArray[Any]], Any]:
        options = self._engine.SessionOptions()
        options.log_severity_level = 3  # errors only: warnings are about its optimiser
        # idle threads spin during a run, not after it, when other programs need the cores
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # a graph could name files of the working folder as its weights: nothing is below os.devnull
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        session = self._engine.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        argument = {"image": "pixels", "text": "tokens"}[tower]
        return lambda values: session.run([f"{tower}_features"], {argument: values})[0]

    def _load_tokens(self) -> StudentTokens:
        tokenization = self.deployment.tokenization
        data = self.deployment.proven(self.folder, tokenization.artefact)
        self._tokens = StudentTokens(tokenization, data)
        return self._tokens


def _model_input(deployment: Deployment) -> ModelInput:
    try:
        model_input = ModelInput.from_config(deployment.preprocess)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{RECORD}: its preprocess cannot be used ({error!r}). Copy it again.") from error
    if model_input.resize_mode not in RESIZE_MODES:
        modes = ", ".join(RESIZE_MODES)
        raise UsageError(f"{RECORD}: resize_mode {model_input.resize_mode!r} is none of {modes}. Update teacher-cache.")
    return model_input


def _require_several(what: str, values: Any) -> None:
    if isinstance(values, (str, bytes, Path, Image.Image)):
        raise TypeError(f"{what}: one {type(values).__name__} found, a list wanted; write [...] around it")
