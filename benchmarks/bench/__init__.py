"""Speed and size against the peers: sections of measurements, run by ``python -m benchmarks.bench``."""
