"""Promotion of students: champions, challengers and retraining."""
