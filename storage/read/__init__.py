"""Readers of a finished cache: rows by number, streams in a known order, the shuffle order, and resident rows."""
