"""Twins: images of two splits or caches that show the same picture, and lists of images to leave out of training."""
