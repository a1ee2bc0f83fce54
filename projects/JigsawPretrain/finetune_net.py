#!/usr/bin/env python
"""Train a model-zoo detector from converted weights (Sec. 4.1).

The command is ``jigsaw_d2.commands.finetune``; ``python -m jigsaw_d2 finetune`` runs it too.
"""

import sys

from jigsaw_d2.commands import run_command
from jigsaw_d2.commands.finetune import main

if __name__ == "__main__":
    sys.exit(run_command(main))
