"""The format of a cache: identity, manifest, arrays, commits, tables, journal."""
