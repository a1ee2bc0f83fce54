"""Extraction, its command included, comes up without torch and matplotlib."""

import subprocess
import sys
from pathlib import Path

import pytest

import jigsaw_d2

# The package itself is left out: it registers the network, which needs torch.
SCRIPT = """
import importlib, sys, types
sys.modules["jigsaw_d2"] = package = types.ModuleType("jigsaw_d2")
package.__path__ = [{path!r}]
importlib.import_module({module!r})
print(sorted({{"torch", "matplotlib", "detectron2"}} & set(sys.modules)))
"""


@pytest.mark.parametrize("module", ["jigsaw_d2.tools.extract", "jigsaw_d2.tools.store"])
def test_neither_torch_nor_matplotlib(module: str) -> None:
    script = SCRIPT.format(path=str(Path(jigsaw_d2.__file__).parent), module=module)
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "[]\n"
