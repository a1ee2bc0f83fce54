#!/usr/bin/env python
"""Jigsaw checkpoint to Detectron2 or torchvision weights: ``python -m jigsaw_d2 convert``."""

import sys

from jigsaw_d2.tools import run_command
from jigsaw_d2.tools.convert import main

if __name__ == "__main__":
    sys.exit(run_command(main))
