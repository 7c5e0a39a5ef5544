"""Several caches of one teacher, read as one."""
