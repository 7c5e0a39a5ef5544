"""Look inside a cache: info, stats, diff, export."""
