"""Datasets on disk to samples: adapters of the published forms, and the checks that all forms share."""
