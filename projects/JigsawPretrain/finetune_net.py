#!/usr/bin/env python
"""Train a model-zoo detector from converted weights (Sec. 4.1).

The command is ``jigsaw_d2.tools.finetune``; ``python -m jigsaw_d2 finetune`` runs it too.
"""

import sys

from jigsaw_d2.tools import run_command
from jigsaw_d2.tools.finetune import main

if __name__ == "__main__":
    sys.exit(run_command(main))
