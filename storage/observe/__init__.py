"""Log lines, progress bars, metrics, and secrets kept out of texts."""
