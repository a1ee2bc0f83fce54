"""The set-up of dev/set_up.py and the packaging of setup.py."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import set_up

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = (ROOT / "dev" / "constraints.txt").read_text()


# ---- the pins


def test_everything_the_project_and_its_tests_need_is_pinned():
    pinned = {line.split("==")[0].lower() for line in CONSTRAINTS.splitlines() if "==" in line}
    needed = re.findall(r'^ +"([A-Za-z][\w-]+)[<>=]', (ROOT / "setup.py").read_text(), re.M)
    needed += re.findall(r'"([a-z][\w-]+)>=', (ROOT / "setup.py").read_text())
    needed += re.findall(
        r'^ {8}"([A-Za-z][\w-]+)[<>=]', (ROOT / "dev" / "detectron2_setup.py").read_text(), re.M
    )
    assert {"torch", "pytest-xdist", "black", "hydra-core"} <= {name.lower() for name in needed}
    assert {name.lower() for name in needed} <= pinned


# ---- making the environment, with pip and the interpreter replaced


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Record what a set-up would run, in order; each entry its name and arguments."""
    record = []
    monkeypatch.setattr(set_up, "LOCK", tmp_path / "lock-folder" / "lock")

    def fake_venv(venv):
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        (venv / "bin" / "python").touch()
        record.append(("venv",))

    monkeypatch.setattr(set_up, "make_venv", fake_venv)
    monkeypatch.setattr(set_up, "_check_python", lambda venv: None)
    monkeypatch.setattr(set_up, "_detectron2_state", lambda venv: "missing")
    monkeypatch.setattr(
        set_up, "_pip", lambda venv, *names, **options: record.append(("pip", *names, options))
    )
    monkeypatch.setattr(
        set_up, "_run", lambda venv, *arguments: record.append(("run", Path(arguments[0]).name))
    )
    monkeypatch.setattr(set_up, "verify", lambda venv: record.append(("verify",)))
    return record


def test_set_up_installs_in_order_and_only_once(calls, tmp_path, monkeypatch):
    venv = tmp_path / "venv"
    set_up.set_up(venv)
    project = f"{ROOT}[benchmark,test,timm]"
    assert calls == [
        ("venv",),
        ("pip", "setuptools", "wheel", "torch", "torchvision", {}),
        ("run", "install_detectron2.py"),
        ("pip", "detectron2", "-e", project, {}),
        ("verify",),
    ]
    set_up.set_up(venv)
    assert len(calls) == 5
    # A user's Detectron2 was built against the torch that is here, which therefore stays.
    monkeypatch.setattr(set_up, "_detectron2_state", lambda venv: "user")
    set_up.set_up(tmp_path / "other")
    assert calls[5:] == [("venv",), ("pip", "-e", project, {"constrained": False}), ("verify",)]


@pytest.mark.parametrize("failing", ["_pip", "_run", "verify"])
def test_a_failed_set_up_is_not_taken_for_finished(calls, tmp_path, monkeypatch, capsys, failing):
    venv = tmp_path / "venv"
    set_up.set_up(venv)
    (venv / set_up.STAMP).write_text("of other pins")
    with monkeypatch.context() as patched:

        def fail(*args, **options):
            raise set_up.SetUpError("no network")

        patched.setattr(set_up, failing, fail)
        assert set_up.main(["--venv", str(venv)]) == 1
    assert capsys.readouterr().err == "set_up: no network\n"
    assert not (venv / set_up.STAMP).exists()
    before = len(calls)
    set_up.set_up(venv)
    assert len(calls) == before + 5 and (venv / set_up.STAMP).is_file()


def test_changed_pins_or_scripts_ask_for_another_set_up(monkeypatch, tmp_path):
    for name in set_up.INPUTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    script = tmp_path / "dev" / "detectron2_ops.py"
    monkeypatch.setattr(set_up, "ROOT", tmp_path)
    keys = [set_up.input_key(), set_up.input_key()]
    assert keys[0] == keys[1]
    for path in (script, tmp_path / "dev" / "constraints.txt", tmp_path / "setup.py"):
        with open(path, "a") as file:
            file.write("# changed\n")
        keys.append(set_up.input_key())
    assert len(set(keys)) == 4


def test_packages_that_did_not_arrive_whole_are_installed_again(tmp_path):
    """pip copies METADATA, and the archive's RECORD, with the other files: INSTALLER comes last."""
    for name, files in (("whole", ("INSTALLER",)), ("half", ()), ("third", ("RECORD",))):
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        for file in ("METADATA", *files):
            (tmp_path / f"{name}-1.0.dist-info" / file).touch()
    (tmp_path / "~orch").mkdir()
    (tmp_path / "torch").mkdir()
    cleared = sorted(set_up.clear_half_installed(tmp_path))
    assert cleared == ["half-1.0.dist-info", "third-1.0.dist-info", "~orch"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["torch", "whole-1.0.dist-info"]


@pytest.mark.parametrize("left", ["nothing", "folder without python", "python that fails"])
def test_a_venv_that_an_interrupted_call_left_is_made_anew(tmp_path, monkeypatch, left):
    venv = tmp_path / "venv"
    if left != "nothing":
        (venv / "bin").mkdir(parents=True)
    if left == "python that fails":
        (venv / "bin" / "python").symlink_to(tmp_path / "no_such_interpreter")
    real_run = subprocess.run

    def without_pip(command, **options):
        # Without ensurepip this takes milliseconds; what follows it is seen in `installed`.
        if command[1:3] == ["-m", "venv"]:
            command = [*command[:3], "--without-pip", *command[3:]]
        return real_run(command, **options)

    installed = []
    monkeypatch.setattr(set_up.subprocess, "run", without_pip)
    monkeypatch.setattr(set_up, "_run", lambda venv, *arguments: installed.append(arguments))
    set_up.make_venv(venv)
    done = real_run([venv / "bin" / "python", "-c", "print(1)"], capture_output=True, text=True)
    assert done.stdout == "1\n"
    assert installed == [("-m", "ensurepip", "--upgrade")]
    set_up.make_venv(venv)  # sound by now: kept
    assert (venv / "pyvenv.cfg").is_file()


def test_a_folder_of_other_things_is_never_removed(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(set_up.SetUpError, match="thesis.txt"):
        set_up.make_venv(tmp_path)
    assert (tmp_path / "thesis.txt").is_file()


def test_a_wrong_pair_of_libraries_is_named(tmp_path, monkeypatch):
    """The check itself, on this environment, with pins that it does not have."""
    monkeypatch.setattr(set_up, "_detectron2_state", lambda venv: "ours")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    pins = tmp_path / "constraints.txt"
    pins.write_text("torch==0.0.1\ntorchvision==0.0.2\n")
    monkeypatch.setattr(set_up, "CONSTRAINTS", pins)
    fake = tmp_path / "modules"
    for name in ("torch", "torchvision"):
        (fake / name).mkdir(parents=True)
        (fake / name / "__init__.py").write_text("__version__ = '2.12.1+cu130'\n")
    monkeypatch.setenv("PYTHONPATH", str(fake))
    with pytest.raises(set_up.SetUpError, match="torch is 2.12.1, but the pinned .* 0.0.1"):
        set_up.verify(tmp_path)


# ---- packaging


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The project's wheel, built from a copy so that nothing is written into the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("jigsaw_d2", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "setup.py", "-q", "bdist_wheel"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (path,) = (folder / "dist").glob("jigsaw_d2-*.whl")
    return path


def test_wheel_holds_the_code_and_every_config(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    code = [path.relative_to(ROOT).as_posix() for path in (ROOT / "jigsaw_d2").rglob("*.py")]
    assert set(code) <= names
    configs = [path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")]
    assert configs and {f"jigsaw_d2/{name}" for name in configs} <= names
    assert not [name for name in names if name.startswith(("tests/", "dev/", "projects/"))]


def test_installed_package_finds_its_configs(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = (
        "import jigsaw_d2.config_files as c; print(c.config_dir());"
        "import jigsaw_d2.config as c; c.get_jigsaw_cfg('configs/jigsaw_R_50.yaml')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        **{"cwd": tmp_path, "text": True, "capture_output": True},
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "installed" / "jigsaw_d2" / "configs")


def test_every_library_that_the_code_imports_is_asked_for(wheel):
    archive = zipfile.ZipFile(wheel)
    (info,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
    required = re.findall(r"^Requires-Dist: ([\w-]+)", archive.read(info).decode(), re.M)
    asked = {name.lower().replace("_", "-") for name in required} | {"detectron2", "jigsaw-d2"}
    distributions = metadata.packages_distributions()
    for path in (ROOT / "jigsaw_d2").rglob("*.py"):
        for module in _imported(path) - set(sys.stdlib_module_names):
            names = {name.lower().replace("_", "-") for name in distributions.get(module, [module])}
            assert names & asked, f"{path} imports {module}, which setup.py does not ask for"


def _imported(path):
    """Top-level names of the modules that a source file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names
