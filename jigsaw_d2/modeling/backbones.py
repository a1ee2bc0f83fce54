"""Networks of timm and torchvision as Detectron2 backbones, bare and under its feature pyramid.

Registered for each LIBRARY, "timm" and "torchvision", are build_LIBRARY_backbone,
build_LIBRARY_fpn_backbone and, with RetinaNet's two coarser levels,
build_retinanet_LIBRARY_fpn_backbone. MODEL.TIMM and MODEL.TORCHVISION say which network;
MODEL.RESNETS is for Detectron2's ResNets alone.
Features are named as Detectron2's by stride: res2 (4), res3 (8), res4 (16), res5 (32).
"""

import contextlib
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import jigsaw_d2.modeling.lazy  # noqa: F401  (registers its builder)
from jigsaw_d2.config import keywords
from jigsaw_d2.io import ConfigError

LIBRARIES = ("timm", "torchvision")
_TRIAL_SIDE = 64  # pixels of the zero image that tells torchvision's strides


def feature_name(stride: int) -> str:
    """4 -> "res2", 8 -> "res3", ...; 2 -> "stem"; others by the number: 14 -> "stride14"."""
    power = math.log2(stride)
    return "stem" if stride == 2 else f"res{power:.0f}" if power.is_integer() else f"stride{stride}"


class LibraryBackbone(Backbone):
    """A network that returns feature maps in order, of which the last at each stride is kept."""

    def __init__(
        self,
        net: nn.Module,
        channels: Sequence[int],
        strides: Sequence[int],
        *,
        channels_last: bool = False,
        freeze_norm: bool = False,
    ) -> None:
        """
        Args:
            net: images float (N, C, H, W) -> sequence of feature maps.
            channels, strides: of each of them.
            channels_last: they are (N, h, w, channels), as Swin's are.
            freeze_norm: batch norms keep statistics and weights, as a detector's few images want.
        """
        super().__init__()
        self.net, self._channels_last, self._freeze_norm = net, channels_last, freeze_norm
        self._places = {feature_name(stride): i for i, stride in enumerate(strides)}
        self._shapes = {
            name: ShapeSpec(channels=channels[i], stride=strides[i])
            for name, i in self._places.items()
        }
        if freeze_norm:
            for norm in self._batch_norms():
                norm.requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images (N, C, H, W) -> {name: (N, channels, h, w)}."""
        maps = self.net(images)
        if self._channels_last:
            maps = [feature.permute(0, 3, 1, 2) for feature in maps]
        return {name: maps[i] for name, i in self._places.items()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature."""
        return dict(self._shapes)

    @property
    def size_divisibility(self) -> int:
        """Of the images: the coarsest stride, so that a pyramid's levels fit each other."""
        return max(shape.stride for shape in self._shapes.values())

    def train(self, mode: bool = True) -> "LibraryBackbone":
        """As any module's, but frozen norms stay as in evaluation."""
        super().train(mode)
        if self._freeze_norm:
            for norm in self._batch_norms():
                norm.eval()
        return self

    def _batch_norms(self) -> list[nn.Module]:
        return [module for module in self.net.modules() if isinstance(module, _BatchNorm)]


class Chain(nn.Module):
    """Modules one after the other; the outputs of some of them."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.kept: tuple[int, ...] = ()  # indices of parts

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, C, H, W) -> the outputs of the ``kept`` parts, of all where none is named."""
        outputs = []
        for i, part in enumerate(self.children()):
            images = part(images)
            if i in self.kept or not self.kept:
                outputs.append(images)
        return outputs


def build_from_timm(node: CfgNode, channels: int) -> LibraryBackbone:
    """MODEL.TIMM: any network that timm builds with ``features_only``.

    Raises:
        ConfigError: timm is not installed, or has no such network, or not its features.
    """
    timm = import_library("timm")
    options: dict[str, Any] = {
        "features_only": True,
        "in_chans": channels,
        **keywords(node.KWARGS),
    }
    if node.WEIGHTS:
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": node.WEIGHTS}}
    try:
        net = timm.create_model(node.NAME, **options)
        strides = net.feature_info.reduction()
        if node.OUT_FEATURES:
            last = {feature_name(stride): i for i, stride in enumerate(strides)}
            depth = max(last[_known(name, list(last))] for name in node.OUT_FEATURES) + 1
            if depth < len(strides):  # what lies above would learn nothing
                options["out_indices"] = tuple(net.feature_info.out_indices[:depth])
                net, strides = timm.create_model(node.NAME, **options), strides[:depth]
        widths = net.feature_info.channels()
    except ConfigError:
        raise
    except Exception as error:  # timm raises anything over a name or an argument
        raise ConfigError(
            f"MODEL.TIMM.NAME {node.NAME!r} with KWARGS {keywords(node.KWARGS)}: timm gives "
            f"no features of it ({type(error).__name__}: {error}); timm.list_models() names them"
        ) from error
    last = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")
    return LibraryBackbone(net, widths, strides, channels_last=last, freeze_norm=node.FREEZE_NORM)


def build_from_torchvision(node: CfgNode, channels: int) -> LibraryBackbone:
    """MODEL.TORCHVISION: a network of torchvision's that is a chain of modules up to its pooling.

    Raises:
        ConfigError: torchvision has no such network, or it is no chain, as a ViT is none.
    """
    models, options = import_library("torchvision").models, keywords(node.KWARGS)
    try:
        model = models.get_model(node.NAME, weights=None, **options)
        if node.WEIGHTS:
            model.load_state_dict(torch.load(node.WEIGHTS, "cpu", weights_only=True))
        net = Chain(_parts(model))
        if channels != 3:
            _replace_first_convolution(net, channels)
        last = hasattr(model, "permute")  # Swin's feature maps
        with torch.no_grad():
            maps = net.eval()(torch.zeros(1, channels, _TRIAL_SIDE, _TRIAL_SIDE))
        sides = [feature.shape[1 if last else 3] for feature in maps]
        finest = {side: i for i, side in enumerate(sides) if side < _TRIAL_SIDE}
        names = {feature_name(_TRIAL_SIDE // side): i for side, i in finest.items()}
    except Exception as error:
        raise ConfigError(
            f"MODEL.TORCHVISION.NAME {node.NAME!r} with KWARGS {options}: no "
            f"chain of modules from image to feature map ({type(error).__name__}: {error}); "
            "torchvision.models.list_models() names its networks, or take timm's"
        ) from error
    wanted = [_known(name, list(names)) for name in node.OUT_FEATURES] or list(names)
    depth = max(names[name] for name in wanted) + 1
    net = Chain(OrderedDict(list(net.named_children())[:depth]))
    net.kept = tuple(sorted(i for i in names.values() if i < depth))
    widths = [maps[i].shape[3 if last else 1] for i in net.kept]
    strides = [_TRIAL_SIDE // sides[i] for i in net.kept]
    return LibraryBackbone(net, widths, strides, channels_last=last, freeze_norm=node.FREEZE_NORM)


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules from the image to the last feature map, in their order."""
    if hasattr(model, "features"):
        return dict(model.features.named_children())
    parts: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        if isinstance(child, (nn.AdaptiveAvgPool2d, nn.Linear, nn.Dropout)):
            break
        inner = dict(child.named_children()) if name == "trunk_output" else {name: child}
        parts |= inner
    return parts


def _replace_first_convolution(net: nn.Module, channels: int) -> None:
    name, conv = next((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
    geometry = ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    options = {key: getattr(conv, key) for key in geometry} | {"bias": conv.bias is not None}
    parent, _, last = name.rpartition(".")
    setattr(net.get_submodule(parent), last, nn.Conv2d(channels, **options))


def _known(name: str, names: list[str]) -> str:
    if name not in names:
        raise ConfigError(f"OUT_FEATURES {name!r}: the network has {', '.join(names)}")
    return name


def import_library(library: str) -> Any:
    """timm or torchvision; raises ``ConfigError`` where it is not installed."""
    try:
        return __import__(library)
    except ImportError as error:
        raise ConfigError(
            f"MODEL.BACKBONE.NAME build_{library}_backbone needs {library}, which cannot be "
            f"imported ({error}): pip install {library}, or jigsaw_d2 with its extra [{library}]"
        ) from error


BUILDERS: dict[str, Callable[[CfgNode, int], LibraryBackbone]] = {
    "timm": build_from_timm,
    "torchvision": build_from_torchvision,
}


def build_backbone(cfg: CfgNode) -> Backbone:
    """Detectron2's, of any name that is registered here.

    Raises:
        ConfigError: MODEL.BACKBONE.NAME is not.
    """
    with unknown_explained(cfg):
        return modeling.build_backbone(cfg)


@contextlib.contextmanager
def unknown_explained(cfg: CfgNode) -> Iterator[None]:
    """A name that is in no registry of Detectron2's becomes a ``ConfigError``, which says the mend.

    That is to import the modules of --register which the run's settings keep.
    """
    try:
        yield
    except KeyError as error:
        if "registry" not in str(error):
            raise
        absent = [name for name in cfg.MODEL.JIGSAW.REGISTER if name not in sys.modules]
        modules = " ".join(f"--register {name}" for name in absent)
        mend = f"its run had {modules}: give the same" if absent else ""
        raise ConfigError(
            f"{error.args[0]} {mend or '--register the module that does it'}"
        ) from None


def library_of(builder: str) -> str:
    """ "timm" or "torchvision" of the name of a builder; "" of every other."""
    parts = builder.split("_")
    return next((library for library in LIBRARIES if library in parts), "")


def _register(library: str) -> None:
    def build_bare(cfg: CfgNode, input_shape: ShapeSpec) -> LibraryBackbone:
        return BUILDERS[library](cfg.MODEL[library.upper()], input_shape.channels)

    def build_fpn(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
        return _pyramid(cfg, build_bare(cfg, input_shape), LastLevelMaxPool())

    def build_retinanet_fpn(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
        bottom_up = build_bare(cfg, input_shape)
        name = cfg.MODEL.FPN.IN_FEATURES[-1]
        channels = bottom_up.output_shape()[_known(name, list(bottom_up.output_shape()))].channels
        return _pyramid(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS, name))

    for name, builder in (
        (f"build_{library}_backbone", build_bare),
        (f"build_{library}_fpn_backbone", build_fpn),
        (f"build_retinanet_{library}_fpn_backbone", build_retinanet_fpn),
    ):
        builder.__name__ = name  # under which the registry keeps it
        BACKBONE_REGISTRY.register(builder)


def _pyramid(cfg: CfgNode, bottom_up: LibraryBackbone, top_block: nn.Module) -> FPN:
    fpn, names = cfg.MODEL.FPN, list(bottom_up.output_shape())
    return FPN(
        bottom_up=bottom_up,
        in_features=[_known(name, names) for name in fpn.IN_FEATURES],
        out_channels=fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        top_block=top_block,
        fuse_type=fpn.FUSE_TYPE,
    )


for _library in LIBRARIES:
    _register(_library)
