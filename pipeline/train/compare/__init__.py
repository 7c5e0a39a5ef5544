"""Compare teachers by small students of each, and say which differences are certain."""
