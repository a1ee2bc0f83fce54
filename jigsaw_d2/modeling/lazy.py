"""Backbones of Detectron2's LazyConfigs, Python programs that say what to build."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from omegaconf import DictConfig, OmegaConf

from jigsaw_d2.config import in_features
from jigsaw_d2.io import ConfigError


def read_lazy_config(
    path: str, overrides: Sequence[str] = (), read: DictConfig | None = None
) -> DictConfig:
    """The LazyConfig in ``path``, or of that name in the zoo, with KEY=VALUE ``overrides``.

    ``read``: it has been read already; changed in place.

    Raises:
        ConfigError: there is none, or it fails.
    """
    try:
        if read is None:
            read = LazyConfig.load(path) if Path(path).is_file() else model_zoo.get_config(path)
        if not isinstance(read, DictConfig):
            raise TypeError("a YAML config, or none at all")
        return LazyConfig.apply_overrides(read, list(overrides))
    except Exception as error:  # a LazyConfig is a program of anyone's
        raise ConfigError(f"{path}: no LazyConfig: {type(error).__name__}: {error}") from error


def nodes(node: Any, place: str = "") -> Iterator[tuple[DictConfig, str]]:
    """Every node with keys in ``node``, and its dotted place."""
    if isinstance(node, DictConfig):
        yield node, place
        for key in node:
            if not OmegaConf.is_interpolation(node, key):
                yield from nodes(node[key], f"{place}.{key}".lstrip("."))


@BACKBONE_REGISTRY.register()
def build_lazy_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """``model.backbone`` of MODEL.JIGSAW.BACKBONE_FROM; of a pyramid the network at its bottom.

    Such configs are made for fine-tuning. Here batch norms become MODEL.RESNETS.NORM, ``freeze_at``
    is MODEL.BACKBONE.FREEZE_AT, a first layer of 3 channels takes those of the images, and the
    features of MODEL.JIGSAW.IN_FEATURE(S) are outputs, such as the res5 of a C4 detector.

    Raises:
        ConfigError: no such config, no backbone in it, or one that cannot be built so.
    """
    path, norm = cfg.MODEL.JIGSAW.BACKBONE_FROM, cfg.MODEL.RESNETS.NORM
    node = OmegaConf.select(read_lazy_config(path), "model.backbone")
    if not isinstance(node, DictConfig):
        raise ConfigError(f"MODEL.JIGSAW.BACKBONE_FROM {path!r}: no model.backbone in it")
    for inner in ("bottom_up", "net"):  # an FPN's, and a ViTDet's
        node = node.get(inner, node)
    for part, _ in nodes(node):
        if "BN" in norm and "BN" in str(part.get("norm", "")):
            part.norm = norm
        for key in ("in_channels", "in_chans"):
            if part.get(key) == 3:
                part[key] = input_shape.channels
    if "freeze_at" in node:
        node.freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if "out_features" in node:
        node.out_features = list(dict.fromkeys([*node.out_features, *in_features(cfg)]))
    try:
        backbone = instantiate(node)
        if not isinstance(backbone, Backbone):
            raise TypeError(f"{type(backbone).__name__} is no detectron2.modeling.Backbone")
    except Exception as error:
        raise ConfigError(
            f"MODEL.JIGSAW.BACKBONE_FROM {path!r}: its backbone cannot be built with the features "
            f"{', '.join(in_features(cfg))} of MODEL.JIGSAW.IN_FEATURE(S) "
            f"({type(error).__name__}: {error})"
        ) from error
    return backbone
