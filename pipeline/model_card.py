"""The README.md of a deployed student: what it is, how it was measured, how it is used. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.deployment import Deployment
from pipeline.runs import AveragedRun
from pipeline.student_table import StudentTable, to_markdown

__all__ = ["model_card"]


def model_card(deployment: Deployment, table: StudentTable, averaged: Sequence[AveragedRun]) -> str:
    """Markdown, with the head that model hubs read.

    Args:
        table: goes in whole.
        averaged: the runs whose mean this student is, if it is one.
    """
    size = "x".join(str(edge) for edge in deployment.preprocess["size"])
    files = [
        f"- `{artefact.file}`: {tower} tower, {variant}, {artefact.bytes / 1e6:.1f} MB"
        for variant, towers in deployment.towers.items()
        for tower, artefact in towers.items()
    ]
    files += [
        f"- int8 of the {tower} tower: {report.method}, {report.share_int8:.1%} of {report.parameters:,} parameters; "
        f"kept in float: {'; '.join(f'{kind}, {why}' for kind, why in report.kept_float.items()) or 'none'}"
        for tower, report in table.int8.items()
    ]
    files += [f"- no int8 file of the {tower} tower: {why}" for tower, why in deployment.not_quantised.items()]
    gates = "\n".join(f"| {gate.name} | {gate.found:.7g} | {gate.wanted} |" for gate in table.gates)
    # the last of those that have both towers, since the runtime takes both of one variant
    smallest = [variant for variant, made in deployment.towers.items() if len(made) == 2][-1]
    dense = deployment.weights.bytes > 1.1 * 4 * deployment.parameters
    multiplied_out = "; the factorised token embedding is multiplied out there" if dense else ""
    runs = f" Its weights are the mean of those of {len(averaged)} runs that began alike." if averaged else ""
    return f"""---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags: [clip, distillation, onnx, teacher-cache]
---
# {deployment.name}

A CLIP student with {deployment.parameters:,} parameters and {deployment.embed_dim} dimensions, distilled from
{deployment.teacher} by its cached embeddings (cache {deployment.cache_manifest_digest[:12]}). It sees {size} pixels and
reads up to {deployment.tokenization.context_length} tokens.{runs}

![Size, speed and recall of {deployment.name}, its teacher and its ONNX files](table.png)

{to_markdown(table)}
What each file had to pass, and did:

| | found | wanted |
|---|---:|---|
{gates}

## Files
{chr(10).join(files)}
- `model.safetensors`, `open_clip_config.json`: for open_clip, {deployment.weights.bytes / 1e6:.1f} MB{multiplied_out}
- `tokenizer.json`: for Hugging Face's tokenizers; `deploy.json`: preprocessing, tokenization, sha256 of each file
- `table.md`, `table.json`, `table.png`: the table above

## Use
With onnxruntime; torch is not imported (where it shall not be installed either: `pip install --no-deps teacher-cache`
beside onnxruntime, tokenizers, ftfy, pillow, numpy and pydantic, and typer and rich for the command):
```python
from pipeline.runtime import StudentRuntime

student = StudentRuntime("FOLDER", variant="{smallest}")
print(student.classify(["photo.jpg"], ["a photo of a dog", "a photo of a cat"]))
```
```
teacher-cache infer photo.jpg --text "a photo of a dog" --text "a photo of a cat" --student FOLDER
```
With open_clip:
```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
```

## Limits
It learned from the images and captions of one dataset and knows little beside; what it keeps of its teacher elsewhere
is in the table only as far as it was measured. The numbers hold for the machine and the split that are named.
"""
