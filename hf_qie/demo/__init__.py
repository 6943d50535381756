"""A tiny checkpoint and synthetic edits, for the demo and the tests."""
