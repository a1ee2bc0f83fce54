"""Makes the environment that ``make`` works in, or finds it ready: see ``set_up``.

Runs on the bare Python of the machine; everything heavier happens in the environment's own.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Iterable, Iterator

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "dev" / "constraints.txt"
# Whatever changes here changes what an environment must hold.
INPUTS = ("setup.py", "pyproject.toml", "dev/constraints.txt", "dev/set_up.py")
DETECTRON2_INPUTS = "dev/*detectron2*.py"
STAMP = ".jigsaw-setup"
LINT_STAMP = ".jigsaw-lint"
LOCK = ROOT / ".setup" / "lock"
# All that a virtual environment holds at its top: a folder with anything else is never removed.
VENV_ENTRIES = {"bin", "include", "lib", "lib64", "share", "pyvenv.cfg", ".gitignore"}
VENV_ENTRIES |= {STAMP, LINT_STAMP}
# What Detectron2's own setup.py imports, and what the rest is built with.
FOUNDATION = ("setuptools", "wheel", "torch", "torchvision")


class SetUpError(RuntimeError):
    """Why the environment could not be made, and what to do."""


def set_up(venv: Path) -> None:
    """Make ``venv`` hold the pinned libraries, Detectron2 and this project (editable).

    A stamp, written last, ends a finished set-up; with it in place this returns at once. An
    interrupted one left no stamp: the next call mends what was half done and goes on.

    Raises:
        SetUpError: with what to do.
    """
    key = input_key()
    stamp = venv / STAMP
    if _read(stamp) == key and (venv / "bin" / "python").exists():
        return
    with _locked(venv):
        if _read(stamp) == key and (venv / "bin" / "python").exists():
            return  # another call has just done it
        stamp.unlink(missing_ok=True)
        make_venv(venv)
        if _detectron2_state(venv) == "user":
            # Built against the torch that is here: pins of ours could break it.
            _pip(venv, "-e", f"{ROOT}[benchmark,test,timm]", constrained=False)
        else:
            _check_python(venv)
            _pip(venv, *FOUNDATION)
            _run(venv, str(ROOT / "dev" / "install_detectron2.py"))
            # "detectron2" is there by now; naming it brings what it needs at run time.
            _pip(venv, "detectron2", "-e", f"{ROOT}[benchmark,test,timm]")
        verify(venv)
        _write(stamp, key)


def set_up_lint(venv: Path) -> None:
    """Add the linters, which nothing else needs, to a finished environment."""
    key = hashlib.sha256(CONSTRAINTS.read_bytes()).hexdigest()
    if _read(venv / LINT_STAMP) != key:
        with _locked(venv):
            _pip(venv, "black", "isort", "flake8")
            _write(venv / LINT_STAMP, key)


def input_key() -> str:
    """Changes whenever the environment would have to: inputs, place of the checkout, Python."""
    total = hashlib.sha256(f"{ROOT} {sys.version_info[:2]}".encode())
    for path in [ROOT / name for name in INPUTS] + sorted(ROOT.glob(DETECTRON2_INPUTS)):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def make_venv(venv: Path) -> None:
    """Create ``venv``, or mend one that an interrupted call left; a sound one stays as it is.

    Raises:
        SetUpError: this Python cannot make environments, or the folder holds other things.
    """
    python = venv / "bin" / "python"
    if venv.exists() and not _works(python, "-c", "pass"):
        foreign = sorted(path.name for path in venv.iterdir() if path.name not in VENV_ENTRIES)
        if foreign:
            raise SetUpError(
                f"{venv} is not a virtual environment (it holds {', '.join(foreign[:3])}) and has "
                "no working bin/python: name another folder, make VENV=path"
            )
        print(f"{venv} has no working Python: making it anew", flush=True)
        shutil.rmtree(venv)
    if not venv.exists():
        done = subprocess.run([sys.executable, "-m", "venv", str(venv)], check=False)
        if done.returncode:
            shutil.rmtree(venv, ignore_errors=True)
            raise SetUpError(
                f"{sys.executable} -m venv failed; on Debian and Ubuntu it needs the package "
                f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
            )
    if (venv / "pyvenv.cfg").is_file():  # conda's environments have none, and other habits
        for site in venv.glob("lib/python*/site-packages"):
            clear_half_installed(site)
    if not _works(python, "-m", "pip", "--version"):
        _run(venv, "-m", "ensurepip", "--upgrade")


def _check_python(venv: Path) -> None:
    code = "import sys; sys.exit(sys.version_info < (3, 11))"
    if not _works(venv / "bin" / "python", "-c", code):
        raise SetUpError(
            f"{venv} has a Python older than 3.11, which the pinned libraries need: remove that "
            "folder or name another, make VENV=path"
        )


def clear_half_installed(site: Path) -> list[str]:
    """Remove what a killed pip left in ``site``, so that pip installs those packages again.

    Every installer signs a distribution in INSTALLER when all its files are there: metadata without
    it belong to a package that did not arrive whole, yet pip would take it for installed. Names
    with "~" are what pip moves aside while it replaces a package.

    Returns:
        Names of the removed folders.
    """
    stale = [info for info in site.glob("*.dist-info") if not (info / "INSTALLER").is_file()]
    stale += [path for path in site.glob("~*") if path.is_dir()]
    for path in stale:
        shutil.rmtree(path)
    return [path.name for path in stale]


def read_pins(names: Iterable[str]) -> dict[str, str]:
    """The versions that the constraints file gives to ``names``."""
    lines = CONSTRAINTS.read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name: pins[name] for name in names}


def verify(venv: Path) -> None:
    """Import everything once: a wrong pair of torch and torchvision shows only then.

    Raises:
        SetUpError: naming what does not import.
    """
    pins = {} if _detectron2_state(venv) == "user" else read_pins(("torch", "torchvision"))
    code = (
        "import torch, torchvision\n"
        f"for name, pin in {pins!r}.items():\n"
        "    found = __import__(name).__version__.split('+')[0]\n"
        "    assert found == pin, f'{name} is {found}, but the pinned version is {pin}'\n"
        "torch.ops.torchvision.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)\n"
        "import cv2, detectron2.engine, detectron2.evaluation, detectron2.model_zoo, jigsaw_d2\n"
    )
    done = _python(venv, "-c", code, capture_output=True, text=True)
    if done.returncode:
        raise SetUpError(
            f"the environment in {venv} is not sound:\n{done.stderr.strip()}\n"
            "Remove that folder and run this again; if it stays so, see whether pip took torch or "
            "torchvision from another place than PyPI (pip config list)"
        )


def _detectron2_state(venv: Path) -> str:
    script = str(ROOT / "dev" / "install_detectron2.py")
    done = _python(venv, script, "--state", capture_output=True, text=True)
    if done.returncode:
        raise SetUpError(done.stderr.strip())
    return done.stdout.split()[0]


def _pip(venv: Path, *requirements: str, constrained: bool = True) -> None:
    pins = ["-c", str(CONSTRAINTS)] if constrained else []
    options = ["--disable-pip-version-check", "--no-build-isolation", *pins]
    _run(venv, "-m", "pip", "install", *options, *requirements)


def _run(venv: Path, *arguments: str) -> None:
    """Run the environment's Python, its output shown."""
    if _python(venv, *arguments).returncode:
        raise SetUpError(
            f"{' '.join(['python', *arguments])} failed (see above). Nothing is lost: once its "
            "cause is gone, run the same command again and it goes on from here"
        )


def _python(venv: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    command = [str(venv / "bin" / "python"), *arguments]
    return subprocess.run(command, check=False, env=_environment(), **options)


def _environment() -> dict[str, str]:
    """This process's, without the settings of another Python or virtual environment."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "VIRTUAL_ENV")}


def _works(python: Path, *arguments: str) -> bool:
    try:
        return not subprocess.run([str(python), *arguments], capture_output=True).returncode
    except OSError:
        return False


@contextlib.contextmanager
def _locked(venv: Path) -> Iterator[None]:
    """Let one set-up at a time work on ``venv``; the system frees the lock of a killed one."""
    LOCK.parent.mkdir(exist_ok=True)
    with open(LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another set-up works on {venv}: waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""


def _write(path: Path, text: str) -> None:
    """Whole or not at all: under another name first."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text + "\n")
    temporary.replace(path)


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 = the environment is ready."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="the environment")
    parser.add_argument("--lint", action="store_true", help="add the linters to it")
    args = parser.parse_args(argv)
    if sys.version_info < (3, 11):
        print("set_up: the pinned libraries need Python 3.11 or later", file=sys.stderr)
        return 1
    venv = Path(os.path.abspath(args.venv))
    try:
        (set_up_lint if args.lint else set_up)(venv)
    except SetUpError as error:
        print(f"set_up: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
