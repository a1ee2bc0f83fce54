#!/usr/bin/env python
"""Cut positive and negative samples out of a detection set (Sec. 3.1).

The command is ``jigsaw_d2.tools.extract``; ``python -m jigsaw_d2 extract`` runs it too.
"""

import sys

from jigsaw_d2.tools import run_command
from jigsaw_d2.tools.extract import main

if __name__ == "__main__":
    sys.exit(run_command(main))
