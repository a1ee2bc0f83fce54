"""torchvision's and MSRA's files, in both directions; random weights stand for the real ones."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from detectron2.modeling import build_backbone
from helpers_weights import (
    C4,
    FPN,
    RESNET_18,
    build_detector,
    convert,
    convert_model,
    pretrain_config,
    randomise,
    small_detection_config,
)
from torch import nn

from jigsaw_d2.checkpoint.convert import convert_checkpoint
from jigsaw_d2.checkpoint.formats import from_torchvision, name_from_torchvision, to_torchvision
from jigsaw_d2.checkpoint.loading import load_backbone
from jigsaw_d2.checkpoint.metadata import Architecture
from jigsaw_d2.checkpoint.reading import read_backbone, read_converted
from jigsaw_d2.detection.config import apply_metadata
from jigsaw_d2.io import CheckpointError, ConfigError, WeightsError

IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
X101 = ["MODEL.RESNETS.DEPTH", "101", "MODEL.RESNETS.NUM_GROUPS", "32"]
X101 += ["MODEL.RESNETS.WIDTH_PER_GROUP", "4"]


def resnext101_32x4d() -> nn.Module:
    """torchvision has the parts but no function of this name; its hub cousins are built so."""
    block = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(block, [3, 4, 23, 3], groups=32, width_per_group=4)


BUILDERS = {
    "resnet18": (torchvision.models.resnet18, RESNET_18),
    "resnet50": (torchvision.models.resnet50, []),
    "resnet101": (torchvision.models.resnet101, ["MODEL.RESNETS.DEPTH", "101"]),
    "resnext101_32x4d": (resnext101_32x4d, X101),
}


@torch.no_grad()
def same_features(model: nn.Module, images: torch.Tensor, ours: torch.Tensor) -> bool:
    """Whether what torchvision's classifier sees are ``ours``, pooled."""
    model.fc = nn.Identity()
    theirs = model.eval()(images)
    return torch.allclose(ours.mean((2, 3)), theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext101_32x4d"])
def test_ours_load_strictly_into_torchvision(name: str, tmp_path: Path) -> None:
    """strict=True, and the pooled features are those of the pre-training."""
    build, overrides = BUILDERS[name]
    model, weights = convert_model(tmp_path, *overrides)
    convert_checkpoint(weights, tmp_path / "tv.pth", format="torchvision")
    theirs = build()
    theirs.load_state_dict(torch.load(tmp_path / "tv.pth", weights_only=True), strict=True)
    with torch.no_grad():
        assert same_features(theirs, IMAGES, model.backbone(IMAGES)["res5"])
    arrays, metadata = read_converted(tmp_path / "tv.pth")  # still ours, not taken for ImageNet's
    expected, said = read_backbone(weights)
    assert metadata == said and set(arrays) == set(expected)
    assert all(np.array_equal(arrays[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", BUILDERS)
def test_names_and_shapes_of_every_network(name: str) -> None:
    """Both ways, without the numbers: strict loading, and the metadata of torchvision's file."""
    build, overrides = BUILDERS[name]
    with torch.device("meta"):
        theirs = build()
    zeros = {key: np.zeros(tuple(v.shape), np.float32) for key, v in theirs.state_dict().items()}
    arrays, metadata = from_torchvision(zeros)
    architecture = Architecture.from_config(pretrain_config(*overrides).MODEL)
    assert metadata.architecture == architecture
    theirs.load_state_dict(to_torchvision(arrays, architecture), strict=True, assign=True)


def test_torchvisions_file_gets_its_metadata(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = randomise(torchvision.models.resnet50())
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    metadata = convert_checkpoint(tmp_path / "resnet50.pth", tmp_path / "w.pkl")
    assert metadata.origin == "imagenet"
    assert metadata.required_config()["INPUT.FORMAT"] == "RGB"
    assert metadata.required_config()["MODEL.RESNETS.STRIDE_IN_1X1"] is False
    detection = small_detection_config(C4)
    apply_metadata(detection, metadata, match_architecture=True)
    detector = build_detector(detection)
    load_backbone(detector, tmp_path / "w.pkl")
    with torch.no_grad():
        res5 = detector.roi_heads.res5(detector.backbone(IMAGES)["res4"])
    assert same_features(theirs, IMAGES, res5)
    # Others train torchvision's networks too, and then it is not ImageNet that they come from.
    named = convert_checkpoint(tmp_path / "resnet50.pth", tmp_path / "w2.pkl", origin="theirs")
    assert (named.origin, named.dataset, metadata.dataset) == ("theirs", "", "ImageNet-1k")
    for path, origin in (("w2.pkl", "mine"), ("resnet50.pth", "jigsaw")):
        with pytest.raises(ConfigError, match=f"origin '{origin}', but the file says"):
            convert_checkpoint(tmp_path / path, tmp_path / "w3.pkl", origin=origin)


BRANCHES = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}


def to_msra(name: str, statistics: bool = True) -> str:
    """Our name -> Caffe2's: res2.0.conv1.norm.weight -> res2_0_branch2a_bn_s, as in R-50.pkl."""
    norm = {"weight": "gamma", "bias": "beta"} if statistics else {"weight": "s", "bias": "b"}
    *parts, last = name.split(".")
    if parts[0] == "stem":
        head = "res_conv1" if "norm" in parts else "conv1"
    else:
        head = "_".join(BRANCHES.get(part, part) for part in parts if part != "norm")
    return f"{head}_bn_{norm.get(last, last)}" if "norm" in parts else f"{head}_w"


@pytest.mark.parametrize("statistics", [True, False])
def test_msras_file_gets_its_metadata(statistics: bool, tmp_path: Path) -> None:
    """Stride in the 1x1, BGR, std 1; with or without the statistics of batch norm."""
    cfg = pretrain_config("MODEL.RESNETS.STRIDE_IN_1X1", "True", "MODEL.RESNETS.NORM", "FrozenBN")
    torch.manual_seed(0)
    backbone = randomise(build_backbone(cfg))
    if not statistics:  # what such files mean: scale and shift alone
        for key, value in backbone.state_dict().items():
            if "running" in key:
                value.fill_(0.0 if key.endswith("mean") else 1 - 1e-5)
    data = {
        to_msra(key, statistics): value.numpy()
        for key, value in backbone.state_dict().items()
        if statistics or "running" not in key
    }
    data |= {"fc1000_w": np.zeros((1000, 8), np.float32), "conv1_w_momentum": np.zeros(1)}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(data, protocol=2))
    metadata = convert_checkpoint(tmp_path / "R-50.pkl", tmp_path / "w.pth")
    assert metadata.required_config() == {
        "INPUT.FORMAT": "BGR",
        "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
        "MODEL.RESNETS.NORM": "FrozenBN",
        "MODEL.RESNETS.STRIDE_IN_1X1": True,
    }
    detection = small_detection_config(FPN)  # made for MSRA's files: nothing changes
    before = detection.clone()
    apply_metadata(detection, metadata)
    assert detection == before
    detector = build_detector(detection)
    load_backbone(detector, tmp_path / "w.pth")
    with torch.no_grad():
        ours, theirs = detector.backbone.bottom_up(IMAGES)["res5"], backbone(IMAGES)["res5"]
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_files_of_detectron2s_own_converter(tmp_path: Path) -> None:
    """convert-torchvision-to-d2.py renames, and leaves the classifier as stem.fc."""
    state = torchvision.models.resnet18().state_dict()
    model = {
        (name if name.startswith("stem.fc") else name_from_torchvision(name)): value.numpy()
        for name, value in ({"stem.fc.weight": state.pop("fc.weight")} | state).items()
    }
    data = {"model": model, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps(data))
    arrays, metadata = read_backbone(tmp_path / "R-18.pkl")
    assert metadata.architecture.depth == 18 and metadata.input_format == "RGB"
    assert not [name for name in arrays if "fc" in name]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["MODEL.RESNETS.STRIDE_IN_1X1", "True"], "stride_in_1x1 is True"),
        (["MODEL.RESNETS.NORM", "GN"], "norm is GN"),
        (["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, True, True, True]"], "deform_on_per_stage"),
        (["MODEL.RESNETS.RES2_OUT_CHANNELS", "128"], "res2_out_channels is 128"),
    ],
)
def test_networks_that_torchvision_lacks(overrides: list[str], named: str, tmp_path: Path) -> None:
    weights = convert(tmp_path, *overrides)
    with pytest.raises(WeightsError, match=named):
        convert_checkpoint(weights, tmp_path / "tv.pth", format="torchvision")
    assert not (tmp_path / "tv.pth").exists()


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "model.encoder_q."])
def test_a_resnet_within_another_module_is_read(tmp_path, prefix):
    model = torchvision.models.resnet18()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"state_dict": {**state, "head.weight": torch.zeros(2)}}, tmp_path / "outer.pth")
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    outer, bare = (read_backbone(tmp_path / name)[0] for name in ("outer.pth", "bare.pth"))
    assert outer.keys() == bare.keys()
    assert all((outer[name] == bare[name]).all() for name in bare)


def test_two_resnets_in_one_file_are_named(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    both = {p + name: value for p in ("encoder_q.", "encoder_k.") for name, value in state.items()}
    torch.save(both, tmp_path / "moco.pth")
    with pytest.raises(CheckpointError, match="several ResNets .encoder_q., encoder_k.."):
        read_backbone(tmp_path / "moco.pth")


def test_other_channels_than_imagenets_are_refused(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    torch.save({**state, "conv1.weight": torch.zeros(64, 4, 7, 7)}, tmp_path / "four.pth")
    with pytest.raises(WeightsError, match="conv1 sees 4 channels"):
        read_backbone(tmp_path / "four.pth")
