"""Datasets, teachers, precompute, students, losses, training, evaluation. Runs without an orchestrator.

Importing the package imports nothing heavy; each module brings what it needs.
"""
