"""Champions, challengers and retraining."""
