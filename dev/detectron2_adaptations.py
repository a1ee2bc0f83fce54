"""The one table of what is changed in Detectron2 0.6 so that it runs on current libraries.

Each entry has its reason. An entry that finds nothing to adapt is an error: then the archive is
not the one that the table was written for.
"""

import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

DEV = Path(__file__).resolve().parent


class AdaptationError(RuntimeError):
    """An entry of the table found nothing to adapt."""


@dataclass(frozen=True)
class Rewrite:
    """Replace every match of ``pattern`` (multi-line regex) in the files of the glob ``files``."""

    files: str
    pattern: str
    replacement: str
    reason: str

    def apply(self, tree: Path) -> list[str]:
        """Rewrite below ``tree``; the changed files' paths relative to it, never empty.

        Raises:
            AdaptationError: no file of the glob has a match.
        """
        changed = []
        for path in sorted(tree.glob(self.files)):
            text = path.read_text(encoding="utf-8")
            new_text, count = re.subn(self.pattern, self.replacement, text, flags=re.MULTILINE)
            if count:
                path.write_text(new_text, encoding="utf-8")
                changed.append(str(path.relative_to(tree)))
        if not changed:
            raise AdaptationError(
                f"nothing in {self.files!r} below {tree} matches {self.pattern!r} "
                f"(wanted because: {self.reason})"
            )
        return changed


@dataclass(frozen=True)
class AddFile:
    """Copy ``source``, a file of this folder, to ``target`` in the tree, over what is there."""

    source: str
    target: str
    reason: str

    def apply(self, tree: Path) -> list[str]:
        """Copy the file.

        Raises:
            AdaptationError: the target's folder does not exist.
        """
        target = tree / self.target
        if not target.parent.is_dir():
            raise AdaptationError(f"{tree} has no folder for {self.target}: {self.reason}")
        shutil.copyfile(DEV / self.source, target)
        return [self.target]


@dataclass(frozen=True)
class RemoveFiles:
    """Leave out the files of the glob ``files``."""

    files: str
    reason: str

    def apply(self, tree: Path) -> list[str]:
        """Delete the files.

        Raises:
            AdaptationError: there are none.
        """
        paths = sorted(tree.glob(self.files))
        if not paths:
            raise AdaptationError(f"{tree} has no {self.files} to leave out: {self.reason}")
        for path in paths:
            path.unlink()
        return [str(path.relative_to(tree)) for path in paths]


Adaptation = Rewrite | AddFile | RemoveFiles

ADAPTATIONS: tuple[Adaptation, ...] = (
    # ---- packaging
    AddFile(
        "detectron2_setup.py",
        "setup.py",
        "the original compiles C++ sources that the archive lacks, looks for the model zoo's "
        "configs where they are not, and pins tools of 2021",
    ),
    Rewrite(
        "detectron2/model_zoo/model_zoo.py",
        r"^import pkg_resources$",
        "",
        "setuptools 81 no longer has pkg_resources",
    ),
    Rewrite(
        "detectron2/model_zoo/model_zoo.py",
        r"pkg_resources\.resource_filename\(\s*\"detectron2\.model_zoo\", "
        r"(os\.path\.join\(\"configs\", config_path\))\s*\)",
        r"os.path.join(os.path.dirname(os.path.abspath(__file__)), \1)",
        "setuptools 81 no longer has pkg_resources",
    ),
    # ---- compiled ops
    AddFile(
        "detectron2_ops.py",
        "detectron2/_C.py",
        "the archive lacks the sources of the compiled extension",
    ),
    Rewrite(
        "detectron2/layers/deform_conv.py",
        r"^(deform_conv|modulated_deform_conv) = _\w+\.apply$",
        r"\1 = _C.\1",
        "torchvision has the operator, forward and backward, on CPU and CUDA",
    ),
    Rewrite(
        "detectron2/layers/nms.py",
        r"^( *return )torch\.ops\.detectron2\.nms_rotated\(",
        r"\1_C.nms_rotated(",
        "the extension registered this operator with torch; ours explains what is missing",
    ),
    Rewrite(
        "detectron2/layers/nms.py",
        r"^(from torchvision\.ops import nms .*)$",
        r"\1\n\nfrom detectron2 import _C",
        "see above: nms_rotated now lives in detectron2._C",
    ),
    Rewrite(
        "detectron2/evaluation/coco_evaluation.py",
        r"^from detectron2\.evaluation\.fast_eval_api import COCOeval_opt$",
        "COCOeval_opt = COCOeval  # no compiled evaluation: pycocotools serves",
        "COCOEvaluator defaults to the C++ evaluation; newer releases fall back like this too",
    ),
    Rewrite(
        "detectron2/evaluation/coco_evaluation.py",
        r"self\._use_fast_impl = use_fast_impl$",
        "self._use_fast_impl = False  # no compiled evaluation",
        "the log should say that the official COCO API was used",
    ),
    # ---- several processes without CUDA, as newer releases do
    Rewrite(
        "detectron2/engine/launch.py",
        r"^    assert torch\.cuda\.is_available\(\), .*$",
        "    has_gpu = torch.cuda.is_available()\n"
        "    if has_gpu:\n"
        "        assert num_gpus_per_machine <= torch.cuda.device_count()",
        "launch() refused machines without CUDA",
    ),
    Rewrite(
        "detectron2/engine/launch.py",
        r"backend=\"NCCL\"",
        'backend="NCCL" if has_gpu else "GLOO"',
        "NCCL needs CUDA, Gloo does not",
    ),
    Rewrite(
        "detectron2/engine/launch.py",
        r"^    assert num_gpus_per_machine <= torch\.cuda\.device_count\(\)\n"
        r"    torch\.cuda\.set_device\(local_rank\)$",
        "    if has_gpu:\n        torch.cuda.set_device(local_rank)",
        "there is no device to set without CUDA",
    ),
    Rewrite(
        "detectron2/engine/defaults.py",
        r"^( *kwargs\[\"device_ids\"\] = \[comm\.get_local_rank\(\)\])$",
        r"\1 if torch.cuda.is_available() else None",
        "DistributedDataParallel takes no device ids for a model on the CPU",
    ),
    # ---- caffe2
    Rewrite(
        "detectron2/export/__init__.py",
        r"^from \.api import \*\n",
        "",
        "PyTorch no longer contains caffe2; detectron2.utils.analysis needs only TracingAdapter",
    ),
    RemoveFiles("detectron2/export/caffe2_*.py", "PyTorch no longer contains caffe2"),
    RemoveFiles("detectron2/export/api.py", "built on caffe2"),
    RemoveFiles("detectron2/export/c10.py", "built on caffe2"),
    RemoveFiles("detectron2/export/shared.py", "built on caffe2"),
    # ---- libraries that moved on
    Rewrite(
        "projects/Panoptic-DeepLab/panoptic_deeplab/dataset_mapper.py",
        r"^from panopticapi\.utils import rgb2id$",
        "\n\ndef rgb2id(color):\n"
        "    from panopticapi.utils import rgb2id as convert\n\n"
        "    return convert(color)\n",
        "panopticapi is not on PyPI; only this mapper's calls need it, not its import",
    ),
    Rewrite(
        "**/*.py",
        r"\bnp\.(bool|int|float|str)\b",
        r"\1",
        "NumPy 1.24 removed its aliases of the builtins",
    ),
    Rewrite(
        "detectron2/data/transforms/transform.py",
        r"\bImage\.LINEAR\b",
        "Image.BILINEAR",
        "Pillow 10 removed the alias",
    ),
    Rewrite(
        "**/*.py",
        r"\blr_scheduler\._LRScheduler\b",
        "lr_scheduler.LRScheduler",
        "PyTorch 2.0 made LRScheduler the base; by the old name hooks.LRScheduler takes plain "
        "schedulers for strangers and saves no state",
    ),
    Rewrite(
        "detectron2/data/common.py",
        r"self\._rng\.sample\(self\._fallback_candidates, k=1\)",
        "self._rng.sample(tuple(self._fallback_candidates), k=1)",
        "Python 3.11 samples from sequences only; older ones made this same tuple",
    ),
    Rewrite(
        "**/*.py",
        r"torch\.meshgrid\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*?),?\s*\)",
        r'torch.meshgrid(\1, indexing="ij")',
        "PyTorch warns at every call that leaves the indexing out",
    ),
    Rewrite(
        "detectron2/modeling/meta_arch/retinanet.py",
        r"get_norm\(norm, 1\)",
        "get_norm(norm, 32)",
        "GroupNorm refuses 32 groups of the one channel with which the head asks for the norm's "
        "class: FCOS, and RetinaNet with group norm, did not build",
    ),
)


def apply_all(tree: Path, adaptations: tuple[Adaptation, ...] = ADAPTATIONS) -> list[str]:
    """Apply the table to an unpacked source tree, in place.

    Returns:
        One line per entry: the files it touched and its reason.

    Raises:
        AdaptationError: an entry found nothing to adapt.
    """
    return [f"{', '.join(entry.apply(tree))}: {entry.reason}" for entry in adaptations]


def digest(adaptations: tuple[Adaptation, ...] = ADAPTATIONS) -> str:
    """SHA-256 over the table and the files that it adds: changes whenever the result would."""
    total = hashlib.sha256()
    for entry in adaptations:
        total.update(repr(entry).encode())
        if isinstance(entry, AddFile):
            total.update((DEV / entry.source).read_bytes())
    return total.hexdigest()
