"""Replaces the ``setup.py`` of the adapted Detectron2 0.6: no C++ build, today's requirements."""

from setuptools import find_packages, setup

PROJECTS = {
    "detectron2.projects.point_rend": "projects/PointRend/point_rend",
    "detectron2.projects.deeplab": "projects/DeepLab/deeplab",
    "detectron2.projects.panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
}

setup(
    name="detectron2",
    # The local part tells this build from the original; "detectron2==0.6" still accepts it.
    version="0.6+jigsaw",
    author="FAIR",
    license="Apache-2.0",
    url="https://github.com/facebookresearch/detectron2",
    description="Detectron2 0.6, adapted to current libraries for jigsaw_d2, without compiled ops",
    packages=find_packages(include=["detectron2*"]) + list(PROJECTS),
    package_dir=PROJECTS,
    package_data={
        "detectron2": ["jigsaw_adaptation.json"],
        "detectron2.model_zoo": ["configs/**/*.yaml", "configs/**/*.py"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch",
        "torchvision",
        "Pillow>=7.1",
        "matplotlib",
        "pycocotools>=2.0.2",
        "termcolor>=1.1",
        "yacs>=0.1.8",
        "tabulate",
        "cloudpickle",
        "tqdm>4.29.0",
        "tensorboard",
        "fvcore>=0.1.5,<0.1.6",
        "iopath>=0.1.7,<0.1.10",
        "omegaconf>=2.1",
        "hydra-core>=1.1",
    ],
)
