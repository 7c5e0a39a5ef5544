"""Bytes by key, in a folder or at a URL: written whole or not at all."""
