"""Several caches, read as one: parts of a dataset by one teacher, or several teachers over the same images."""
