#!/usr/bin/env python
"""Pre-training on Jigsaw images (Sec. 3.2-3.3, 4.1): ``python -m jigsaw_d2 pretrain``."""

import sys

from jigsaw_d2.tools import run_command
from jigsaw_d2.tools.pretrain import main

if __name__ == "__main__":
    sys.exit(run_command(main))
