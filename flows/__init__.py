"""Prefect flows: when and with what retries; all that is done lies in ``pipeline``."""
