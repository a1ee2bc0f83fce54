"""Installs Detectron2 0.6 from PyPI, adapted to current libraries, unless one is there already.

``python dev/install_detectron2.py`` works on the environment of the Python that runs it, in which
torch, torchvision, setuptools and wheel must be installed. A Detectron2 that can be imported and
was not put there by this script is left untouched.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

from detectron2_adaptations import apply_all, digest

REQUIREMENT = "pb1-detectron2==0.6"
ARCHIVE_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
# The last pip known to accept the archive's metadata, which has a direct URL in an extra.
LAST_LENIENT_PIP = "26.1"
# Inside the package, written by us alone: tells our build from the user's own.
MARKER = "jigsaw_adaptation.json"


class InstallError(RuntimeError):
    """Why Detectron2 could not be installed, and what to do."""


def find_installed() -> tuple[str, Path | None]:
    """What ``import detectron2`` finds, asked of a fresh interpreter.

    Returns:
        ("missing", None); ("user", folder) for one that is not ours; ("ours", folder) for our
        build from the table as it is now; ("outdated", folder) for our build from another table.

    Raises:
        InstallError: there is a Detectron2 of the user's, and importing it fails.
    """
    code = (
        "import importlib.util as u; s = u.find_spec('detectron2');"
        "print('-' if s is None or not s.submodule_search_locations"
        " else list(s.submodule_search_locations)[0])"
    )
    where = _python(["-c", code]).stdout.strip()
    if where == "-" or not (Path(where) / "__init__.py").is_file():
        return "missing", None
    marker = Path(where) / MARKER
    if marker.is_file():
        same = json.loads(marker.read_text()).get("digest") == build_digest()
        return ("ours" if same else "outdated"), Path(where)
    imported = _python(["-c", "import detectron2"], check=False)
    if imported.returncode:
        raise InstallError(
            f"the Detectron2 at {where} does not import:\n{imported.stderr.strip()}\n"
            "Mend or uninstall it, then run this again."
        )
    return "user", Path(where)


def build_digest() -> str:
    """Identifies the archive together with the table of adaptations."""
    return hashlib.sha256((ARCHIVE_SHA256 + digest()).encode()).hexdigest()


def download_archive(folder: Path) -> Path:
    """Fetch the source archive into ``folder`` with pip (its index, mirrors and cache apply).

    Raises:
        InstallError: pip failed.
    """
    pip, env = ["-m", "pip"], dict(os.environ)
    if _version(metadata.version("pip")) > _version(LAST_LENIENT_PIP):
        lenient = folder / "pip"
        _python(
            ["-m", "pip", "install", "-q", "--target", str(lenient), f"pip=={LAST_LENIENT_PIP}"]
        )
        env["PYTHONPATH"] = str(lenient)
    options = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-q"]
    _python([*pip, "download", *options, "--dest", str(folder), REQUIREMENT], env=env)
    archives = list(folder.glob("*.tar.gz"))
    if len(archives) != 1:
        raise InstallError(f"pip download {REQUIREMENT} left {len(archives)} archives, not one")
    return archives[0]


def verify_archive(archive: Path, sha256: str = ARCHIVE_SHA256) -> None:
    """Refuse an archive whose content is not the one that the table was written for.

    Raises:
        InstallError: the checksum differs.
    """
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise InstallError(
            f"{archive.name} has sha256 {found}, not {sha256}: it is not the known release of "
            "Detectron2 0.6, so nothing was installed"
        )


def unpack_and_adapt(archive: Path, folder: Path) -> Path:
    """Unpack below ``folder`` and apply the table.

    Returns:
        The source tree, ready to build.
    """
    with tarfile.open(archive) as tar:
        # Python before 3.11.4 has no filters; the archive is the known one in any case (sha256).
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        tar.extractall(folder)
    (tree,) = [path for path in folder.iterdir() if (path / "detectron2").is_dir()]
    changes = apply_all(tree)
    marker = {"digest": build_digest(), "archive_sha256": ARCHIVE_SHA256, "changes": changes}
    (tree / "detectron2" / MARKER).write_text(json.dumps(marker, indent=1) + "\n")
    return tree


def build_wheel(tree: Path) -> Path:
    """Build a wheel of the adapted tree; nothing is compiled."""
    _python(["setup.py", "-q", "bdist_wheel", "--dist-dir", "dist"], cwd=tree)
    (wheel,) = (tree / "dist").glob("*.whl")
    return wheel


def install_wheel(wheel: Path, site: Path) -> None:
    """Put the wheel's content into ``site`` (a site-packages folder) whole or not at all.

    pip writes it beside its place; renames follow, the package's own last, so that
    ``import detectron2`` never finds half of one, whenever this is interrupted.
    """
    for stale in site.glob(".detectron2-*"):
        shutil.rmtree(stale, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=".detectron2-", dir=site))
    try:
        # By name and folder: given as a path, pip would record this temporary one for good.
        options = ["--no-deps", "--no-index", "--find-links", str(wheel.parent), "-q"]
        options += ["--target", str(staging / "new")]
        _python(["-m", "pip", "install", *options, "detectron2"])
        (staging / "old").mkdir()
        for old in [site / "detectron2", *site.glob("detectron2-*.dist-info")]:
            if old.exists():
                old.rename(staging / "old" / old.name)
        (info,) = (staging / "new").glob("detectron2-*.dist-info")
        info.rename(site / info.name)
        (staging / "new" / "detectron2").rename(site / "detectron2")
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def install(archive: Path | None = None) -> str:
    """Make ``import detectron2`` work in this environment.

    Args:
        archive: the source archive where it is at hand already; otherwise pip downloads it.

    Returns:
        One line saying what is there now.

    Raises:
        InstallError: with what to do.
    """
    state, where = find_installed()
    if state == "user":
        return f"Detectron2 at {where} is used as it is"
    if state == "ours":
        return f"Detectron2 at {where} is up to date"
    with tempfile.TemporaryDirectory(prefix="detectron2-") as name:
        work = Path(name)
        archive = archive or download_archive(work)
        verify_archive(archive)
        wheel = build_wheel(unpack_and_adapt(archive, work))
        install_wheel(wheel, Path(sysconfig.get_paths()["purelib"]))
    state, where = find_installed()
    if state != "ours":
        raise InstallError(f"after the installation Python still finds {where} ({state})")
    code = "from importlib.metadata import version; print(version('detectron2'))"
    return f"Detectron2 {_python(['-c', code]).stdout.strip()} installed at {where}"


def _python(arguments: list[str], check: bool = True, **options) -> subprocess.CompletedProcess:
    """Run this interpreter from a neutral folder, so that no local folder shadows a package."""
    options.setdefault("cwd", tempfile.gettempdir())
    done = subprocess.run(
        [sys.executable, *arguments], text=True, capture_output=True, check=False, **options
    )
    if check and done.returncode:
        command = " ".join(["python", *arguments])
        raise InstallError(f"{command} failed:\n{done.stdout}{done.stderr}".rstrip())
    return done


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 = Detectron2 is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archive", type=Path, help="the .tar.gz where it is at hand already")
    parser.add_argument(
        "--state", action="store_true", help="only say what there is: missing, user, ours, outdated"
    )
    args = parser.parse_args(argv)
    try:
        print(*find_installed() if args.state else [install(args.archive)])
    except RuntimeError as error:  # InstallError, AdaptationError
        print(f"install_detectron2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
