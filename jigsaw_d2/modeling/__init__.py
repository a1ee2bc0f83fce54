"""The network that is pre-trained, its objectives, and the receptive fields they look at."""
