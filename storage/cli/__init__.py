"""The commands that need no torch: info, stats, look, diff, export."""
