"""Training the detector: its config, its run."""
