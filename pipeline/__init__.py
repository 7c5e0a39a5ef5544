"""Datasets, teachers, precompute, students, losses, training, evaluation. Runs without an orchestrator.

Importing the package imports nothing heavy; each module brings what it needs.
"""

import os

# Before torch is imported, since its OpenMP reads this once: threads that wait for each other sleep instead of
# spinning. Decoders, DataLoader workers and other programs share the cores with the model; with one busy
# neighbour on two cores a spinning teacher made 6-9 images/s, a sleeping one 55 (benchmarks/cpu_teacher.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
