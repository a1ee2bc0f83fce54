"""What is written for readers agrees with the code: docstrings, shapes, the table of keys."""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jigsaw_d2

ROOT = Path(__file__).parents[1]
SHAPE = re.compile(r"\([A-Za-z0-9_*+\- .]+, ?[A-Za-z0-9_*+\- .,]*\)|scalar|shape")
ARRAYS = re.compile(r"Tensor|ndarray|NDArray|Boxes")
# A dict of tensors by name, such as a state_dict, has no one shape.
BY_NAME = re.compile(r"(dict|Mapping)\[str, [^\]]*\]")
MODULES = sorted(m.name for m in pkgutil.walk_packages(jigsaw_d2.__path__, "jigsaw_d2."))


def _public_names(module):
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        if (
            not name.startswith("_")
            and own
            and (inspect.isclass(value) or inspect.isfunction(value))
        ):
            yield name, value


@pytest.mark.parametrize("name", [m for m in MODULES if not m.endswith("__main__")])
def test_every_public_name_has_a_docstring(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    missing = [n for n, value in _public_names(module) if not inspect.getdoc(value)]
    assert not missing, f"{name}: no docstring on {missing}"


@pytest.mark.parametrize("name", [m for m in MODULES if ".commands" not in m])
def test_functions_on_arrays_state_shapes(name):
    module = importlib.import_module(name)
    silent = [
        n
        for n, value in _public_names(module)
        if inspect.isfunction(value)
        and ARRAYS.search(BY_NAME.sub("", str(inspect.signature(value))))
        and not SHAPE.search(inspect.getdoc(value) or "")
    ]
    assert not silent, f"{name}: no shape in the docstring of {silent}"


def test_table_of_configuration_keys_is_current():
    result = subprocess.run([sys.executable, str(ROOT / "dev" / "config_table.py"), "--check"])
    assert result.returncode == 0, "run: python dev/config_table.py"


@pytest.mark.parametrize("readme", ["README.md", "projects/JigsawPretrain/README.md"])
def test_files_named_in_a_readme_exist(readme):
    text = (ROOT / readme).read_text()
    links = re.findall(r"\]\((?!http|#)([^)#\s]+)", text)
    folder = (ROOT / readme).parent
    missing = [link for link in links if not (folder / link).exists()]
    assert not missing, f"{readme} links to {missing}"
