#!/usr/bin/env python
"""Draw the figures: samples, jigsaw, erf, labels.

The command is ``jigsaw_d2.tools.visualize``; ``python -m jigsaw_d2 visualize`` runs it too.
"""

import sys

from jigsaw_d2.tools import run_command
from jigsaw_d2.tools.visualize import main

if __name__ == "__main__":
    sys.exit(run_command(main))
