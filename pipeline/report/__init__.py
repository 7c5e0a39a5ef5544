"""The report page of a cache: everything that is known of it and of the students trained from it, in one file."""
