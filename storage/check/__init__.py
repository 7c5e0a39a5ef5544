"""Verify a cache, repair it, remove garbage from it."""
