"""Plan a cache, claim chunks, write them, commit, seal."""
