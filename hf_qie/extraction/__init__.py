"""Rows to embedding sets, a chunk at a time."""
