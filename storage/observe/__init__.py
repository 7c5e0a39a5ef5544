"""Log lines, progress bars, metrics, and removal of secrets from texts."""
