"""Rows that other tools made, by clip-retrieval and in DataCompDR's shards: matched, proven and imported."""
