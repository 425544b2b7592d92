"""Tensors, weights and devices: everything of Rivulet that knows nothing of HTTP or text."""
