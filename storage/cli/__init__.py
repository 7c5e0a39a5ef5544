"""The commands that need no torch: ls, info, stats, look, diff, gc, export."""
