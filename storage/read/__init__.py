"""Rows of a cache: single reads, streams, the shuffle order."""
