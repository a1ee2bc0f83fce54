"""dev/install_detectron2.py: what it refuses, and that it never leaves half a package."""

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import detectron2_adaptations
import install_detectron2 as installer
import pytest


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A site-packages folder that the interpreters started by the installer see first."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def _package(site, init="", digest=None):
    """Put a package of the name detectron2 into ``site``; with ``digest``, one of ours."""
    package = site / "detectron2"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text(init)
    if digest is not None:
        (package / installer.MARKER).write_text(json.dumps({"digest": digest}))
    return package


def _wheel(folder, content):
    """A wheel detectron2 0.6 whose one module holds ``content``."""
    path = folder / "detectron2-0.6-py3-none-any.whl"
    info = "detectron2-0.6.dist-info"
    files = {
        "detectron2/__init__.py": "",
        "detectron2/content.py": content,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: detectron2\nVersion: 0.6\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(name, text)
    return path


# ---- what is there already


def test_a_users_detectron2_is_left_untouched(site, monkeypatch):
    package = _package(site, "value = 1\n")
    monkeypatch.setattr(installer, "download_archive", lambda folder: pytest.fail("downloads"))
    assert installer.find_installed() == ("user", package)
    assert installer.install() == f"Detectron2 at {package} is used as it is"
    assert {path.name for path in package.iterdir()} <= {"__init__.py", "__pycache__"}


def test_a_users_broken_detectron2_is_reported_not_replaced(site):
    package = _package(site, "import a_library_that_is_not_there\n")
    with pytest.raises(installer.InstallError, match="a_library_that_is_not_there") as error:
        installer.install()
    assert str(package) in str(error.value) and "Mend or uninstall" in str(error.value)


def test_our_build_is_told_from_an_outdated_one(site):
    package = _package(site, digest=installer.build_digest())
    assert installer.find_installed() == ("ours", package)
    assert installer.install() == f"Detectron2 at {package} is up to date"
    _package(site, digest="of an earlier table")
    assert installer.find_installed() == ("outdated", package)


# ---- the archive


def test_an_archive_of_other_content_is_refused(site, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(installer, "find_installed", lambda: ("missing", None))
    monkeypatch.setattr(installer, "unpack_and_adapt", lambda *args: pytest.fail("unpacks"))
    archive = tmp_path / "pb1-detectron2-0.6.tar.gz"
    archive.write_bytes(b"something else")
    with pytest.raises(installer.InstallError, match="nothing was installed"):
        installer.install(archive)
    assert installer.main(["--archive", str(archive)]) == 1
    assert "sha256" in capsys.readouterr().err
    assert list(site.iterdir()) == []


def _archive(tmp_path, files):
    tree = tmp_path / "source" / "pb1-detectron2-0.6"
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    archive = tmp_path / "pb1-detectron2-0.6.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tree, tree.name)
    return archive


def test_an_adapted_tree_becomes_a_marked_wheel(tmp_path, monkeypatch):
    files = {
        "detectron2/__init__.py": "",
        "detectron2/model_zoo/__init__.py": "",
        "detectron2/model_zoo/configs/Base.yaml": "A: 1\n",
        "detectron2/model_zoo/configs/COCO/sub/a.py": "b = 1\n",
        "setup.py": "raise SystemExit('the original builds C++')\n",
    }
    for name in ("PointRend/point_rend", "DeepLab/deeplab", "Panoptic-DeepLab/panoptic_deeplab"):
        files[f"projects/{name}/__init__.py"] = ""
    entry = detectron2_adaptations.AddFile("detectron2_setup.py", "setup.py", "packaging")
    monkeypatch.setattr(
        installer, "apply_all", lambda tree: detectron2_adaptations.apply_all(tree, (entry,))
    )
    tree = installer.unpack_and_adapt(_archive(tmp_path, files), tmp_path / "work")
    names = zipfile.ZipFile(installer.build_wheel(tree)).namelist()
    for name in (
        f"detectron2/{installer.MARKER}",
        "detectron2/model_zoo/configs/Base.yaml",
        "detectron2/model_zoo/configs/COCO/sub/a.py",
        "detectron2/projects/point_rend/__init__.py",
        "detectron2/projects/deeplab/__init__.py",
        "detectron2/projects/panoptic_deeplab/__init__.py",
    ):
        assert name in names


@pytest.mark.parametrize("pip, needs_older", [("23.2.1", False), ("26.1", False), ("26.3", True)])
def test_a_pip_that_refuses_the_archive_is_stepped_round(tmp_path, monkeypatch, pip, needs_older):
    calls = []

    def fake_python(arguments, check=True, **options):
        calls.append((arguments, options))
        if "download" in arguments:
            (tmp_path / "pb1-detectron2-0.6.tar.gz").write_text("")

    monkeypatch.setattr(installer, "_python", fake_python)
    monkeypatch.setattr(installer.metadata, "version", lambda name: pip)
    assert installer.download_archive(tmp_path).name == "pb1-detectron2-0.6.tar.gz"
    assert len(calls) == (2 if needs_older else 1)
    arguments, options = calls[-1]
    assert arguments[:3] == ["-m", "pip", "download"] and installer.REQUIREMENT in arguments
    assert (options["env"].get("PYTHONPATH") == str(tmp_path / "pip")) == needs_older


# ---- putting it in place


def _state(site):
    """What an interpreter gets from ``site``: None, or the content of the package there."""
    code = (
        f"import sys; sys.path[:0] = [{str(site)!r}]\n"
        "import importlib.machinery as m\n"
        f"spec = m.PathFinder.find_spec('detectron2', [{str(site)!r}])\n"
        "if spec and spec.loader:\n    import detectron2.content as c; print(c.VALUE)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip() or None


def test_installing_replaces_the_old_package_and_answers_its_version(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / ".detectron2-left-by-a-killed-run").mkdir()
    for value in ("old", "new"):
        installer.install_wheel(_wheel(tmp_path, f"VALUE = {value!r}\n"), site)
        assert _state(site) == value
    found = list(installer.metadata.distributions(name="detectron2", path=[str(site)]))
    assert [dist.version for dist in found] == ["0.6"]
    assert sorted(path.name for path in site.iterdir()) == [
        "detectron2",
        "detectron2-0.6.dist-info",
    ]
    # pip freeze and uninstall work on it: it has a record, and no temporary path is noted.
    assert found[0].read_text("RECORD") and found[0].read_text("direct_url.json") is None


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_an_interruption_between_any_two_steps_leaves_no_half_package(tmp_path, monkeypatch, step):
    """Four renames: old package and old metadata out, new metadata and new package in."""
    site = tmp_path / "site"
    site.mkdir()
    installer.install_wheel(_wheel(tmp_path, "VALUE = 'old'\n"), site)
    new = _wheel(tmp_path, "VALUE = 'new'\n")
    rename, count = Path.rename, 0

    def interrupted(self, target):
        nonlocal count
        count += 1
        if count == step:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            installer.install_wheel(new, site)
    assert _state(site) in ("old" if step == 1 else None, None)
    installer.install_wheel(new, site)
    assert _state(site) == "new"
