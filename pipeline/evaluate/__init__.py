"""Recall, zero-shot accuracy and cost of teacher and student."""
