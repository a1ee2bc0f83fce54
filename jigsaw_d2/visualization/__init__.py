"""Figures, one module each; pure functions from arrays to a matplotlib ``Figure`` or an image."""
