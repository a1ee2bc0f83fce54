"""Packaging of jigsaw_d2: the code, the project's configs, and what it needs from PyPI.

The lower bounds were tested together on Python 3.11, the versions of dev/constraints.txt too, and torch
2.11 with NumPy 2.5 on Python 3.12; NumPy 1.26 does not do.

Detectron2 is no entry here, for PyPI does not have it under its name: build it from its repository,
or run dev/install_detectron2.py.
"""

import re
from importlib import metadata
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
OPENCV_BUILDS = (
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)


def read_version() -> str:
    """The version that the package states, read without importing it (it needs Detectron2)."""
    text = (ROOT / "jigsaw_d2" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def opencv_requirement() -> str:
    """The build of OpenCV that is installed already; otherwise the one that servers can load.

    All of them provide the same ``cv2`` and overwrite each other, so a second one must not be asked
    for. opencv-python needs libGL, which a bare server lacks; we open no windows.
    """
    for name in OPENCV_BUILDS:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return f"{name}>=4.10"
    return "opencv-python-headless>=4.10"


def config_packages() -> dict[str, str]:
    """Top-level ``configs/`` and its folders, as sub-packages of the installed ``jigsaw_d2``."""
    folders = sorted({path.parent for path in (ROOT / "configs").rglob("*.yaml")})
    relative = [folder.relative_to(ROOT).as_posix() for folder in folders]
    return {"jigsaw_d2." + name.replace("/", "."): name for name in relative}


CONFIGS = config_packages()

setup(
    name="jigsaw_d2",
    version=read_version(),
    description="Jigsaw pre-training of detector backbones from the detection dataset alone",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["jigsaw_d2", "jigsaw_d2.*"]) + list(CONFIGS),
    package_dir=CONFIGS,
    package_data={name: ["*.yaml"] for name in CONFIGS},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "numpy>=2.0",
        opencv_requirement(),
        "simplejpeg>=1.8.2",
        "zlib-ng>=0.5.1",
        "pillow>=10.4",
        "pycocotools>=2.0.8",
        "faster-coco-eval>=1.8",
        "matplotlib>=3.9",
        "fvcore>=0.1.5,<0.1.6",
        "omegaconf>=2.1",
        "PyYAML>=6.0.1",
        "tqdm>=4.66",
        "tabulate>=0.9",
    ],
    extras_require={
        "timm": ["timm>=1.0.15"],
        "benchmark": ["scipy>=1.13", "submitit>=1.5.2"],
        "test": ["pytest>=8.0", "pytest-xdist>=3.5", "hypothesis>=6.90"],
        "lint": ["black>=24", "isort>=5.12", "flake8>=6"],
    },
)
