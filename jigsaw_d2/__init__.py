"""Jigsaw pre-training of detector backbones from the detection dataset alone, for Detectron2."""

__version__ = "0.1.0"
