"""Logs of a run's steps: log.jsonl and trackers."""
