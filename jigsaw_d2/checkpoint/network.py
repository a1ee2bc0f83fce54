"""What a backbone is, and what it computes: features of one fixed picture, told by a few numbers.

Names and shapes of tensors say nothing about strides, norms, input or order of channels. A network
that gives a fixed picture the features that the pre-training gave it agrees in all of them.
"""

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone.resnet import DeformBottleneckBlock
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from jigsaw_d2.checkpoint.metadata import STAGES, WeightsMetadata, norm_family
from jigsaw_d2.config import AUTO_NORM, in_features
from jigsaw_d2.modeling.backbones import LIBRARIES, build_backbone, library_of

logger = logging.getLogger(__name__)

# Of a feature's norm. The same network on another machine differs by some 1e-12: features are
# computed in float64, in which the weights are exact.
TOLERANCE = 1e-4
_SIDE = 64  # pixels of the picture; a network of one input size alone gets that of its template
_FREQUENCIES = tuple(math.sqrt(prime) for prime in (2, 3, 5, 7, 11, 13, 17, 19))


def build_pretrained(cfg: CfgNode, arrays: Mapping[str, np.ndarray]) -> nn.Module:
    """The backbone of a pre-training's config with the tensors ``arrays``, on the CPU.

    Of a ResNet all stages are outputs. Global random states stay as they are.

    Raises:
        ConfigError: nobody has registered it here.
    """
    cfg = cfg.clone()
    resnets = cfg.MODEL.RESNETS
    if resnets.NORM == AUTO_NORM or norm_family(resnets.NORM) == "BN":
        resnets.NORM = "BN"
    stages = [stage for stage in STAGES if any(name.startswith(stage + ".") for name in arrays)]
    resnets.OUT_FEATURES = stages or resnets.OUT_FEATURES
    for library in LIBRARIES:
        cfg.MODEL[library.upper()].WEIGHTS = ""
    with torch.random.fork_rng(devices=[]):
        backbone = build_backbone(cfg)
    prefix = find_prefix(backbone.state_dict(), arrays)
    return fill(backbone.get_submodule(prefix[:-1]), arrays)


def fill(module: nn.Module, arrays: Mapping[str, np.ndarray]) -> nn.Module:
    """Copy the arrays whose names and shapes ``module`` has into it; returns it."""
    state = module.state_dict()
    with torch.no_grad():
        for name, array in arrays.items():
            if name in state and tuple(state[name].shape) == array.shape:
                state[name].copy_(torch.from_numpy(array))
    return module


def strides_in_1x1(module: nn.Module) -> bool | None:
    """Whether the bottlenecks of a ResNet in ``module`` stride in their 1x1; None without such."""
    for name, block in module.named_modules():
        if name.endswith("res3.0") and hasattr(block, "conv3"):
            return block.conv1.stride == (2, 2)
    return None


def deformable_kind(module: nn.Module) -> dict[str, Any]:
    """Keys of ``Architecture`` on how a ResNet in ``module`` deforms, which no shapes tell."""
    blocks = [m for m in module.modules() if isinstance(m, DeformBottleneckBlock)]
    modulated = any(block.deform_modulated for block in blocks)
    groups = max((block.conv2.deformable_groups for block in blocks), default=1)
    return {"deform_modulated": modulated, "deform_num_groups": groups}


def find_prefix(names: Iterable[str], known: Collection[str] = ()) -> str:
    """What precedes the names of ``known`` in ``names``: "", "backbone.", "backbone.net.", ...

    The prefix under which most of them are found; where none is, what Detectron2's detectors have.
    """
    names, counts = list(names), Counter()
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in known:
                counts[".".join([*parts[:i], ""])] += 1
    if counts:
        return min(counts, key=lambda prefix: (-counts[prefix], len(prefix)))
    prefix = ""
    for part in ("backbone.", "bottom_up."):
        if any(name.startswith(prefix + part) for name in names):
            prefix += part
    return prefix


def picture(height: int, width: int, input_format: str, channels: int) -> Tensor:
    """The fixed picture, uint8 values as float64 (channels, height, width), as a format has it."""
    k = np.arange(channels * height * width, dtype=np.uint64)
    values = (k * k * np.uint64(2654435761) >> np.uint64(13)) % np.uint64(256)
    pixels = torch.from_numpy(values.astype(np.float64).reshape(channels, height, width))
    return pixels.flip(0) if input_format == "BGR" else pixels


@torch.no_grad()
def compute_features(
    backbone: nn.Module, image: Tensor, head: nn.Module | None = None
) -> dict[str, Tensor]:
    """Features of one normalised image (channels, H, W) in float64, or float32 where that fails.

    Args:
        backbone: is left in eval mode, in that precision, and, if it runs there, on the CPU.
        head: a detector's res5 that it applies to regions of res4; here to all of it.
    """
    own = next(backbone.parameters()).device
    # Where float64 is what it says; a GPU for what no CPU has, as Detectron2's deformable stages.
    ways = [(torch.device("cpu"), torch.float64), (own, torch.float64), (own, torch.float32)]
    for device, dtype in dict.fromkeys(ways):
        images = image[None].to(device, dtype)
        try:
            with torch.compiler.set_stance("force_eager"):
                features = backbone.to(device, dtype).eval()(images)
                if not isinstance(features, Mapping):
                    raise TypeError(f"its output is no dict of features: {type(features).__name__}")
                features = dict(features)
                if head is not None and "res5" not in features:
                    features["res5"] = head.to(device, dtype).eval()(features["res4"])
            return features
        except RuntimeError:
            if dtype == torch.float32:
                raise
    raise AssertionError


def describe(backbone: nn.Module, metadata: WeightsMetadata, cfg: CfgNode) -> dict[str, Any]:
    """Plain values for ``WeightsMetadata.network``, of a pre-trained backbone by itself.

    A network that cannot run on the picture is described without features, and the log says why.
    """
    channels = len(metadata.pixel_mean)
    network: dict[str, Any] = {
        "backbone": cfg.MODEL.BACKBONE.NAME,
        "input_channels": channels,
        "config": {},
        "batch_norm": any(isinstance(m, _BatchNorm) for m in backbone.modules()),
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "in_feature": str(cfg.MODEL.JIGSAW.IN_FEATURE),  # of several, the finest
        "features": {},
    }
    if cfg.MODEL.JIGSAW.BACKBONE_FROM:
        network["backbone_from"] = cfg.MODEL.JIGSAW.BACKBONE_FROM
    library = library_of(cfg.MODEL.BACKBONE.NAME)
    if library:
        node = cfg.MODEL[library.upper()]
        keys = {"NAME": node.NAME, "KWARGS": [list(p) for p in node.KWARGS]}
        network["config"] = {f"MODEL.{library.upper()}.{key}": keys[key] for key in keys}
    sizes = [(_SIDE, _SIDE)]
    if metadata.template:
        sizes.append(tuple(metadata.template["size"]))
    for height, width in sizes:
        image = picture(height, width, metadata.input_format, channels)
        try:
            features = compute_features(backbone, normalise(image, metadata))
        except Exception as error:  # a backbone of anyone's
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        network["picture"] = [height, width]
        network["features"] = {name: numbers(value) for name, value in features.items()}
        cells = {n: features[n].shape[2:].numel() for n in in_features(cfg) if n in features}
        network["in_feature"] = max(cells, key=cells.get, default=network["in_feature"])
        return network
    logger.warning(
        "the backbone does not run on a picture of %dx%d pixels (%s): what it computes will not be "
        "compared when its weights are loaded",
        *(*sizes[-1], reason),
    )
    return network


def normalise(image: Tensor, source: Any) -> Tensor:
    """(image - mean) / std, (channels, H, W), by the ``pixel_mean`` and ``pixel_std`` of source."""
    mean, std = (
        torch.as_tensor(value, dtype=torch.float64, device="cpu").reshape(-1, 1, 1)
        for value in (source.pixel_mean, source.pixel_std)
    )
    return (image - mean) / std


def numbers(feature: Tensor) -> dict[str, Any]:
    """Its shape, norm, and some sums over all values, each weighted by a cosine of the position."""
    values = feature.double().flatten().cpu().numpy()
    position = np.arange(values.size, dtype=np.float64)
    sums = [float(values @ np.cos(frequency * position)) for frequency in _FREQUENCIES]
    return {
        "shape": list(feature.shape[1:]),
        "norm": float(f"{np.linalg.norm(values):.9e}"),
        "sums": [float(f"{value:.9e}") for value in sums],
    }


def difference(said: Mapping[str, Any], feature: Tensor) -> float:
    """Norm of the difference to the described feature, of the same shape, over its norm.

    An estimate: the mean square of the sums is half that of the norm, for want of correlation.
    """
    found = numbers(feature)
    apart = np.subtract(found["sums"], said["sums"])
    scale = said["norm"] or 1.0
    value = max(
        math.sqrt(2 * float(np.mean(apart**2))) / scale, abs(found["norm"] - said["norm"]) / scale
    )
    return value if math.isfinite(value) else math.inf
