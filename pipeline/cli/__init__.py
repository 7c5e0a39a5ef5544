"""The teacher-cache command: one module per group of verbs."""
