"""Networks and images for looking at effective receptive fields outside of training."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_backbone
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from jigsaw_d2.checkpoint import read_backbone
from jigsaw_d2.data.build import JigsawBatches, build_jigsaw_sampler
from jigsaw_d2.data.dataset_mapper import JigsawDatasetMapper
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.detection.finetune_config import load_detection_config
from jigsaw_d2.erf_weights import ErfError
from jigsaw_d2.training.norm import resolve_norm
from jigsaw_d2.weights.weight_files import read_weights

logger = logging.getLogger(__name__)

RANDOM = "random"
# Added to a run's seed, so that measurements and training draw different images.
SEED_OFFSET = 7_919
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def default_device() -> str:
    """ "cuda" where PyTorch sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_network(
    config_file: str,
    feature: str = "",
    weights: str = RANDOM,
    overrides: Sequence[str] = (),
    *,
    seed: int = 0,
    device: str = "",
) -> tuple[nn.Module, CfgNode]:
    """The backbone of any Detectron2 config, and the config as it was built from.

    Args:
        config_file: a path, a config of ours, or a name in Detectron2's model zoo.
        feature: must be among the outputs; a plain ResNet is asked for it, e.g. for the res5 that
            a C4 detector keeps in its RoI heads. "" = any.
        weights: "random", or a file: a checkpoint or converted file of ours, weights of a
            Detectron2 model (a file or a URL of its path manager), or of torchvision's ResNets.
        overrides: KEY VALUE ... as on the command line.
        seed: of the random initialisation.

    Raises:
        ErfError: the feature does not exist, or the weights are another network's.
    """
    cfg = load_detection_config(config_file, overrides)
    cfg.MODEL.DEVICE = device or default_device()
    cfg.MODEL.RESNETS.NORM = resolve_norm(cfg, 1)
    outputs = cfg.MODEL.RESNETS.OUT_FEATURES
    if feature.startswith("res") and feature not in outputs:
        if cfg.MODEL.BACKBONE.NAME == "build_resnet_backbone":
            cfg.MODEL.RESNETS.OUT_FEATURES = [*outputs, feature]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = build_backbone(cfg).to(cfg.MODEL.DEVICE).eval()
    names = list(backbone.output_shape())
    if feature and feature not in names:
        raise ErfError(f"{config_file}: its backbone returns {', '.join(names)}, no {feature!r}")
    if weights != RANDOM:
        load_weights(backbone, weights)
    return backbone, cfg


def load_weights(backbone: nn.Module, path: str) -> list[str]:
    """Fill the backbone from a file; returns the names that the file does not have.

    Only layers of a feature pyramid may be missing, with a warning: files of ours hold the
    bottom-up network alone.

    Raises:
        ErfError: another tensor is missing, or has another shape.
        WeightFileError: the file cannot be read.
    """
    local = PathManager.get_local_path(path)
    data = read_weights(local)
    held = data.get("model", data) if isinstance(data, Mapping) else {}
    wanted = [name for name in backbone.state_dict() if not name.endswith("num_batches_tracked")]
    found = {name: _find(held, name) for name in wanted}
    if all(value is None for value in found.values()):  # other names: torchvision's, MSRA's
        held = read_backbone(local)[0]
        found = {name: _find(held, name) for name in wanted}
    missing = [name for name, value in found.items() if value is None]
    needed = [name for name in missing if not name.startswith("fpn_")]
    state = backbone.state_dict()
    shapes = [
        f"{name} {tuple(value.shape)} for {tuple(state[name].shape)}"
        for name, value in found.items()
        if value is not None and tuple(value.shape) != tuple(state[name].shape)
    ]
    if needed or shapes:
        raise ErfError(
            f"{path} does not fit the backbone: {len(needed)} tensors missing "
            f"({', '.join(needed[:3])}), {len(shapes)} of another shape ({', '.join(shapes[:3])}); "
            "choose the config of the same network"
        )
    with torch.no_grad():
        for name, value in found.items():
            if value is not None:
                state[name].copy_(torch.as_tensor(value))
    if missing:
        logger.warning("%s has no feature pyramid; %d tensors stay random", path, len(missing))
    return missing


def _find(tensors: Mapping[str, Any], name: str) -> Any | None:
    """A backbone's tensor under the names that detectors, checkpoints and our files give it."""
    bare = name.removeprefix("bottom_up.")
    for prefix in ("backbone.bottom_up.", "backbone.", "", "roi_heads."):
        if prefix + bare in tensors:
            return tensors[prefix + bare]
    return None


def normalise(images: Tensor, cfg: CfgNode) -> Tensor:
    """RGB images uint8 (N, 3, H, W) -> what the config's network expects, float32."""
    if cfg.INPUT.FORMAT == "BGR":
        images = images.flip(1)
    mean = torch.tensor(cfg.MODEL.PIXEL_MEAN).view(-1, 1, 1)
    return (images - mean) / torch.tensor(cfg.MODEL.PIXEL_STD).view(-1, 1, 1)


def jigsaw_stream(cfg: CfgNode, store: SampleStore) -> JigsawBatches:
    """Range of positions (ints >= 0) -> batch: Jigsaw images of a stream of its own.

    Drawn and made as the training images are, but with another seed; a function of position alone.
    """
    mapper = JigsawDatasetMapper(cfg, store, seed=max(cfg.SEED, 0) + SEED_OFFSET)
    return JigsawBatches(build_jigsaw_sampler(cfg, mapper), mapper)


def rgb_stream(cfg: CfgNode, stores: Sequence[str], seed: int = 0) -> JigsawBatches:
    """``jigsaw_stream`` of stores on disk, in RGB whatever the network takes: for figures."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.FORMAT = "RGB"
    cfg.SEED = seed
    return jigsaw_stream(cfg, SampleStore(list(stores)))


def random_images(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Standard normal float32 (count, 3, H, W): noise as if normalised already."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *size, generator=rng)


def read_images(paths: Sequence[str], size: tuple[int, int], limit: int) -> Tensor:
    """Photos, scaled to cover ``size`` and cropped at the centre: uint8 RGB (N, 3, H, W).

    Args:
        paths: image files, and folders of them (taken in order of name).
        size: (H, W) in pixels.
        limit: most images read.

    Raises:
        ErfError: no image among ``paths``, or one that cannot be read.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        files += [f for f in inside if not path.is_dir() or f.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise ErfError(f"no images in {', '.join(map(str, paths))}")
    return torch.stack([_read_cover(file, size) for file in files[:limit]])


def _read_cover(file: Path, size: tuple[int, int]) -> Tensor:
    try:
        image = np.asarray(read_image(str(file), format="RGB"))
    except (OSError, ValueError) as error:
        raise ErfError(f"image {file} cannot be read: {error}") from error
    height, width = size
    scale = max(height / image.shape[0], width / image.shape[1])
    shape = (max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale)))
    image = cv2.resize(
        image, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    )
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    crop = image[top : top + height, left : left + width]
    return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))
