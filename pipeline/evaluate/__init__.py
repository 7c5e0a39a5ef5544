"""What a student keeps: retrieval by FAISS, zero-shot accuracy."""
