"""The rooms of the house: imports go one way, and what is heavy comes in where it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jigsaw_d2
from jigsaw_d2.__main__ import COMMANDS

PACKAGE = Path(jigsaw_d2.__file__).parent
# From the ground up; a room may import from its own floor and from those below.
FLOORS = [
    {"io"},
    {"config", "config_files", "cost"},
    {"data"},
    {"modeling"},
    {"checkpoint"},
    {"engine", "evaluation"},
    {"detection"},
    {"visualization"},
    {"tools"},
    {"__main__", "__init__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# In their functions: figures are drawn where the trainer wants them.
ON_DEMAND = {("engine", "visualization")}


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(imported module, whether as the file is imported) of each import, less TYPE_CHECKING's."""
    found = []

    def walk(node: ast.AST, at_top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if isinstance(child, ast.ImportFrom) and child.module == "jigsaw_d2":
                found.extend((f"jigsaw_d2.{alias.name}", at_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                found.append((child.module or "", at_top))
            elif isinstance(child, ast.Import):
                found.extend((alias.name, at_top) for alias in child.names)
            walk(child, at_top and not inside)

    walk(ast.parse(path.read_text()), True)
    return found


def files() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
    }


def room(module: str) -> str:
    return module.split(".")[1]


def test_imports_go_one_way():
    wrong = [
        f"{module} imports {target}"
        for module, path in files().items()
        for target, at_top in imports_of(path)
        if target.startswith("jigsaw_d2.") and room(target) in FLOOR
        if FLOOR[room(target)] > FLOOR[room(module)]
        if at_top or (room(module), room(target)) not in ON_DEMAND
    ]
    assert not wrong
    assert {room(module) for module in files()} <= set(FLOOR)


def test_no_module_imports_itself_in_a_circle():
    known = files()
    edges = {
        module: {t for t, at_top in imports_of(path) if at_top and t in known}
        for module, path in known.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for target in edges[module]:
                visit(target, (*trail, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_figures_alone_import_matplotlib():
    drawing = [
        module
        for module, path in files().items()
        if any(target.split(".")[0] == "matplotlib" for target, _ in imports_of(path))
    ]
    assert drawing and {room(module) for module in drawing} == {"visualization"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_waits_for_nothing_heavy(name):
    """In a process of its own: this one has imported everything."""
    code = (
        "import sys, jigsaw_d2.__main__ as m\n"
        f"try: m.main([{name!r}, '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(str(sorted({'torch', 'detectron2', 'matplotlib'} & set(sys.modules)) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("usage:") and done.stderr.strip() == "", done.stderr


@pytest.mark.parametrize("name", ["extract", "store"])
def test_extraction_comes_up_without_torch(name):
    code = (
        f"import sys, jigsaw_d2.tools.{name}\n"
        "sys.exit(str(sorted({'torch', 'detectron2', 'matplotlib'} & set(sys.modules)) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "" and done.returncode in (0, 1), done.stderr
