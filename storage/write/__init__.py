"""Writer of a cache: plan, chunks, claims and the seal."""
