"""A deployed student as OpenVINO's IR: the towers of the float32 ONNX files. No torch.

    openvino/image.xml  image.bin    ``pixels`` to ``image_features``, as in image.onnx
    openvino/text.xml  text.bin      ``tokens`` to ``text_features``

Made by ``read_model``: ``convert_model`` has telemetry.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from teacher_cache.pipeline.deploy.record import Artefact, Deployment
from teacher_cache.pipeline.deploy.tokens import runtime_package

FOLDER = "openvino"


def write_openvino(folder: Path, deployment: Deployment) -> Deployment:
    """Write ``openvino/`` into the folder of a deployment. Return its record with these files, which is written too.

    Raises:
        UsageError: openvino is not installed.
    """
    openvino = runtime_package("openvino", None)
    (folder / FOLDER).mkdir()
    weights: dict[str, Artefact] = {}
    graphs: dict[str, Artefact] = {}
    for tower in deployment.towers["fp32"]:
        model = openvino.Core().read_model(deployment.tower(folder, tower, "fp32"))
        # its default, weights in float16, costs a convolutional tower more than the gate allows
        openvino.save_model(model, folder / FOLDER / f"{tower}.xml", compress_to_fp16=False)
        for suffix, files in ((".bin", weights), (".xml", graphs)):
            path = folder / FOLDER / f"{tower}{suffix}"
            files[tower] = Artefact.of(path).model_copy(update={"file": f"{FOLDER}/{path.name}"})
    added: dict[str, Any] = {
        "towers": {**deployment.towers, "openvino": weights},
        "openvino_graphs": graphs,
        "made_with": {**deployment.made_with, "openvino": openvino.__version__},
    }
    deployment = deployment.model_copy(update=added)
    deployment.write(folder)
    return deployment


def load_openvino(openvino: Any, graph: bytes, weights: bytes, threads: int | None) -> Callable[[NDArray[Any]], Any]:
    """Return the call that runs a tower on the CPU in float32; several threads may call it.

    Args:
        openvino: the module.
        graph, weights: bytes of the .xml and the .bin.
        threads: number of threads per run. None: all cores.
    """
    core = openvino.Core()
    model = core.read_model(graph, weights)
    # on CPUs that multiply bfloat16 it would be the default
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(model, "CPU", settings)

    def run(values: NDArray[Any], owners: object = (core, model, weights)) -> Any:
        # the owners of what the compiled model may refer to live as long as it does
        return compiled.create_infer_request().infer([values])[0]

    return run
