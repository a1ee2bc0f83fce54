"""Training the detector: configs, data, compute."""
