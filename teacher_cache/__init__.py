"""Run a CLIP teacher once, keep its embeddings in a cache, distil every student from it."""
