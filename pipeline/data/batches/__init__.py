"""Cache to training batches."""
