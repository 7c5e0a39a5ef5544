"""Training batches from a cache: order, targets, pixels and tokens by one iterator."""
