"""From bytes on disk to training batches."""
