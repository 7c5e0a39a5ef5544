"""What every stage can be told, checked before a model is built; no torch."""
