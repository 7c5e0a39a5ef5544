"""Parameters, FLOPs, latency and memory of a model."""
