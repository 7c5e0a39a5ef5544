"""Training of a student from a cache."""
