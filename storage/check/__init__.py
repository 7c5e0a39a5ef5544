"""Checks of a cache: verify, the plan of a repair, and garbage."""
