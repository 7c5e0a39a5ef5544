"""Looks into a finished or unfinished cache: info, list, statistics, rows by name, differences, export."""
