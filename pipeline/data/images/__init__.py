"""Bytes to pixels: decoding, model input, preprocessing, crops."""
