"""What a run tells of its steps: log.jsonl and trackers."""
