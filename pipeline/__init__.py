"""Datasets, teachers, precompute, students, losses, training, evaluation. Runs without an orchestrator.

Importing the package imports nothing heavy; each module brings what it needs.
"""

import os

# Before torch is imported, since its OpenMP reads these once: threads that wait for each other soon sleep instead of
# spinning. Decoders, DataLoader workers and other programs share the cores with the model; beside one busy
# neighbour on two cores a spinning teacher makes half as many images a second (benchmarks/cpu_teacher.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # but not at once: a layer's end is microseconds away

# Before onnxruntime is imported: it would report its use, and keep an id for that in the home folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
