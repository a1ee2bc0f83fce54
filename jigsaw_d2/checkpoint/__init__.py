"""Weights on their way from a checkpoint to a detector: metadata, conversion, loading."""
