"""The cache on disk: format, writing, reading, verifying. No torch, no orchestrator.

A cache is one folder (or URL) that says exactly which teacher, preprocessing, tokenizer, dataset and crops
made the embeddings in it. See ARCHITECTURE.md for the format and ``teacher_cache.storage.errors`` for what can go
wrong.
"""
