"""The checks of gpu_check.py, by what they look at."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PATHS = [str(ROOT / name) for name in ("", "tests", "dev")]
sys.path[:0] = PATHS  # the tests' helpers make the data
