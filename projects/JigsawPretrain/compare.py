#!/usr/bin/env python
"""Compare initialisations at equal budget, over seeds (Tables 1-5, Fig. 7).

The command is ``jigsaw_d2.commands.compare``; ``python -m jigsaw_d2 compare`` runs it too.
"""

import sys

from jigsaw_d2.commands import run_command
from jigsaw_d2.commands.compare import main

if __name__ == "__main__":
    sys.exit(run_command(main))
