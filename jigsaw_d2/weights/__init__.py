"""Weights on their way from a checkpoint to a detector: passport, files, architectures, loading."""
