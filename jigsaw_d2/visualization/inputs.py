"""Networks and images for looking at effective receptive fields outside of training."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.modeling import Backbone
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageOps
from torch import Tensor

from jigsaw_d2.checkpoint.loading import load_backbone
from jigsaw_d2.checkpoint.reading import read_tensors
from jigsaw_d2.config import resolve_norm
from jigsaw_d2.data.build import JigsawBatches, fit_input, jigsaw_stream
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.detection.config import apply_metadata, load_detection_config
from jigsaw_d2.io import ConfigError
from jigsaw_d2.modeling.backbones import build_backbone

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def default_device() -> str:
    """ "cuda" where PyTorch sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_network(
    config_file: str,
    feature: str = "",
    weights: str = "random",
    overrides: Sequence[str] = (),
    *,
    seed: int = 0,
    device: str = "",
    trust: bool = False,
) -> tuple[Backbone, CfgNode]:
    """The backbone of any Detectron2 config, in eval mode, and the config as it was built from.

    Args:
        config_file: a path, a config of ours, or a name in Detectron2's model zoo.
        feature: must be among the outputs; a plain ResNet is asked for it, e.g. for the res5 that
            a C4 detector keeps in its RoI heads. "" = any.
        weights: "random", or a file (or a URL of Detectron2's path manager): ours, torchvision's,
            MSRA's, or of any Detectron2 model. What its metadata requires is set in the config.
        overrides: KEY VALUE ... as on the command line.
        seed: of the random initialisation.
        device: "" = a GPU where there is one.
        trust: unpickle anything in ``weights`` and let tags in the config run code.

    Raises:
        ConfigError: the feature does not exist, or the config is another network's.
        WeightsError: see ``load_backbone``.
    """
    cfg = load_detection_config(config_file, overrides, trust)
    cfg.MODEL.DEVICE = device or default_device()
    for part in ("RESNETS", "FPN"):
        cfg.MODEL[part].NORM = resolve_norm(cfg, 1, part)
    file = None if weights == "random" else PathManager.get_local_path(weights)
    metadata = None if file is None else read_tensors(file, trust)[1]
    if metadata is not None:
        cfg.MODEL.JIGSAW.ORIGIN = ""
        apply_metadata(cfg, metadata, explicit=frozenset(overrides[::2]))
    plain = cfg.MODEL.BACKBONE.NAME == "build_resnet_backbone"
    if plain and feature.startswith("res"):
        cfg.MODEL.RESNETS.OUT_FEATURES = sorted({*cfg.MODEL.RESNETS.OUT_FEATURES, feature})
    with torch.random.fork_rng(devices=[]):  # it is made on the CPU
        torch.manual_seed(seed)
        backbone = build_backbone(cfg).to(cfg.MODEL.DEVICE).eval()
    names = list(backbone.output_shape())
    if feature and feature not in names:
        raise ConfigError(f"{config_file}: its backbone returns {', '.join(names)}, no {feature!r}")
    if file is not None:
        load_backbone(backbone, file, trust=trust)
    return backbone, cfg


def normalise(images: Tensor, cfg: CfgNode) -> Tensor:
    """RGB images uint8 (N, 3, H, W) -> what the config's network expects, float32.

    Raises:
        ConfigError: a network of other than 3 channels.
    """
    if len(cfg.MODEL.PIXEL_MEAN) != images.shape[1]:
        raise ConfigError(
            f"pictures have {images.shape[1]} channels, the network takes "
            f"{len(cfg.MODEL.PIXEL_MEAN)}: measure it on noise, without --images"
        )
    if cfg.INPUT.FORMAT == "BGR":
        images = images.flip(1)
    mean = torch.tensor(cfg.MODEL.PIXEL_MEAN).view(-1, 1, 1)
    return (images - mean) / torch.tensor(cfg.MODEL.PIXEL_STD).view(-1, 1, 1)


def rgb_stream(cfg: CfgNode, stores: Sequence[str], seed: int = 0) -> JigsawBatches:
    """``jigsaw_stream`` of stores on disk, in RGB whatever the network takes: for figures."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    store = SampleStore(list(stores))
    cfg.INPUT.FORMAT = f"C{store.channels}" if "pixel_mean" in store.header else "RGB"
    fit_input(cfg, store)
    return jigsaw_stream(cfg, store)


def random_images(count: int, size: tuple[int, int], seed: int = 0, channels: int = 3) -> Tensor:
    """Standard normal float32 (count, channels, H, W): noise as if normalised already."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, *size, generator=rng)


def read_images(paths: Sequence[str], size: tuple[int, int], limit: int) -> Tensor:
    """Photos, scaled to cover ``size`` and cropped at the centre: uint8 RGB (N, 3, H, W).

    Args:
        paths: image files, and folders of them (taken in order of name).
        size: (H, W) in pixels.
        limit: most images read.

    Raises:
        ConfigError: no image among ``paths``, or one that cannot be read.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        files += [f for f in inside if not path.is_dir() or f.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise ConfigError(f"no images in {', '.join(map(str, paths))}")
    images = []
    for file in files[:limit]:
        try:
            image = Image.fromarray(read_image(str(file), format="RGB"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"image {file} cannot be read: {error}") from error
        images.append(np.array(ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR)))
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())
