"""Decode service: threads or processes that write pixels and tokens into slots of shared memory."""
