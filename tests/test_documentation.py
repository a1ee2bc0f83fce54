"""What is written for readers agrees with the code: docstrings, shapes, the table of keys."""

import argparse
import ast
import importlib
import inspect
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling.proposal_generator import proposal_utils

import jigsaw_d2
from jigsaw_d2.__main__ import COMMANDS
from jigsaw_d2.config import add_jigsaw_config

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


@pytest.mark.parametrize("name", [m for m in MODULES if not m.endswith("__main__")])
def test_every_public_method_is_explained(name):
    """By itself, by the class's docstring, or by the base class or contract that it follows."""
    missing = []
    for class_name, value in _public_names(importlib.import_module(name)):
        for method in vars(value) if inspect.isclass(value) else ():
            member = inspect.getattr_static(value, method)
            member = getattr(member, "fget", None) or getattr(member, "__func__", member)
            follows = any(hasattr(base, method) for base in value.__mro__[1:])
            follows = follows or method == "from_config"  # of Detectron2's configurable
            said = inspect.getdoc(member) or re.search(rf"\b{method}\b", value.__doc__ or "")
            if inspect.isfunction(member) and not (method.startswith("_") or follows or said):
                missing.append(f"{class_name}.{method}")
    assert not missing, f"{name}: no docstring on {missing}"


@pytest.mark.parametrize("name", [m for m in MODULES if ".tools" not in m])
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


def _flat_keys(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _flat_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_every_configuration_key_is_in_the_table_with_a_meaning():
    plain, ours = get_cfg(), get_cfg()
    add_jigsaw_config(ours)
    keys = set(_flat_keys(ours)) - set(_flat_keys(plain))
    text = (ROOT / "projects" / "JigsawPretrain" / "README.md").read_text()
    rows = dict(re.findall(r"^\| `([A-Z_0-9.]+)` \| `.*?` \| (.*?) \|$", text, flags=re.MULTILINE))
    assert len(keys) > 20 and keys - set(rows) == set()
    assert [key for key in keys if len(rows[key]) < 10] == []


SCRIPTS = {
    "train_net.py": "pretrain",
    "extract_samples.py": "extract",
    "convert_weights.py": "convert",
    "finetune_net.py": "finetune",
    "compare.py": "compare",
    "demo.py": "demo",
    "visualize.py": "visualize",
}
READMES = [
    "README.md",
    "projects/JigsawPretrain/README.md",
    "projects/JigsawPretrain/results/README.md",
]


def _commands_in(text):
    """(command, its words) of every line in a shell block that calls one of our commands."""
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for index, word in enumerate(words):
                if name := SCRIPTS.get(word.removeprefix("projects/JigsawPretrain/")):
                    yield name, words[index + 1 :]
            if "jigsaw_d2" in words:
                start = words.index("jigsaw_d2")
                yield words[start + 1], words[start + 2 :]


@pytest.mark.parametrize("readme", READMES)
def test_commands_in_a_readme_have_the_flags_they_use(readme):
    found = list(_commands_in((ROOT / readme).read_text()))
    assert found
    for name, words in found:
        parser = importlib.import_module(_module_of(name)).build_parser()
        flags = [word for word in words if word.startswith("--")]
        known = {
            flag for parser in _with_subparsers(parser) for flag in parser._option_string_actions
        }
        assert set(flags) <= known, f"{readme}: {name} knows no {set(flags) - known}"


def _module_of(name):
    if name in ("compare", "demo"):
        return name
    assert name in COMMANDS, f"{name} is no command"
    return f"jigsaw_d2.tools.{name}"


def _with_subparsers(parser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


@pytest.mark.parametrize("readme", ["README.md", "projects/JigsawPretrain/README.md"])
def test_files_named_in_a_readme_exist(readme):
    text = (ROOT / readme).read_text()
    links = re.findall(r"\]\((?!http|#)([^)#\s]+)", text)
    folder = (ROOT / readme).parent
    missing = [link for link in links if not (folder / link).exists()]
    assert not missing, f"{readme} links to {missing}"


def _texts_of(folder):
    """Every string in the code of a folder; what an f-string fills in is "{}"."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_that_troubleshooting_quotes_are_those_of_the_code():
    readme = (ROOT / "projects" / "JigsawPretrain" / "README.md").read_text()
    rows = readme.split("## Troubleshooting")[1].splitlines()
    seen = [row.split("|")[1] for row in rows if row.startswith("|")]
    quoted = [text for cell in seen for text in re.findall(r'"([^"]+)"', cell)]
    detectron2 = Path(proposal_utils.__file__).parent
    said = [*_texts_of(ROOT / "jigsaw_d2"), *_texts_of(detectron2)]
    assert len(quoted) > 5
    assert not [text for text in quoted if not any(text in each for each in said)]
