"""What a model costs: parameters, FLOPs, latency, memory."""
