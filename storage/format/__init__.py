"""What lies in a cache: identity, manifest, arrays, commits, tables, journal."""
