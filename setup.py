"""Packaging of jigsaw_d2; Detectron2 itself comes from the user or from dev/install_detectron2.py."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """The version that the package states, read without importing it (it needs Detectron2)."""
    text = (ROOT / "jigsaw_d2" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


setup(name="jigsaw_d2", version=read_version(), packages=find_packages(include=["jigsaw_d2*"]))
