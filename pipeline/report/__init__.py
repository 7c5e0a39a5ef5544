"""The report of a cache and of the students trained from it, as one page."""
