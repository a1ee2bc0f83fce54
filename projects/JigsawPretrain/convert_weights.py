#!/usr/bin/env python
"""Turn a pre-training checkpoint into Detectron2 or torchvision backbone weights.

The command is ``jigsaw_d2.tools.convert``; ``python -m jigsaw_d2 convert`` runs it too.
"""

import sys

from jigsaw_d2.tools import run_command
from jigsaw_d2.tools.convert import main

if __name__ == "__main__":
    sys.exit(run_command(main))
