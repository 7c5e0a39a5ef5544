"""Prefect flows: when, and with which retries."""
