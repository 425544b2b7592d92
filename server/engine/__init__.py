"""The engine: which request computes what, when, and in which cache blocks."""
