"""Rows of a cache for other trainers: as a dataset, as a stream, or by the content of their own pairs."""
