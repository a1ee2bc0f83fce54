"""The way of the data: detection set -> samples -> store -> Jigsaw image -> batch (Sec. 3)."""
