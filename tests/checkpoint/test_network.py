"""What a backbone computes, compared at load time; where its tensors lie in a network."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_backbone, build_model
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from helpers_weights import (
    FPN,
    THIN,
    build_detector,
    convert,
    pretrain_config,
    pretrained,
    save_checkpoint,
    small_detection_config,
)
from torch import Tensor, nn

from jigsaw_d2.checkpoint.convert import convert_checkpoint
from jigsaw_d2.checkpoint.formats import from_msra
from jigsaw_d2.checkpoint.loading import load_backbone
from jigsaw_d2.checkpoint.metadata import WeightsMetadata
from jigsaw_d2.checkpoint.network import difference, find_prefix, numbers, picture
from jigsaw_d2.checkpoint.reading import read_backbone
from jigsaw_d2.detection.config import apply_metadata
from jigsaw_d2.io import ConfigError, WeightsError
from jigsaw_d2.modeling.trainable import set_aside_unused
from jigsaw_d2.tools.convert import main


@BACKBONE_REGISTRY.register()
def build_stairs(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Two levels, each output with a norm of its own, as Swin has them."""
    return Stairs(cfg.MODEL.RESNETS.OUT_FEATURES)


class Stairs(Backbone):
    def __init__(self, outputs: list[str], kernel: int = 3, norms: int = 4) -> None:
        super().__init__()
        self.low = Conv2d(3, 8, kernel, stride=4, padding=kernel // 2)
        self.high = Conv2d(8, 16, 3, stride=8, padding=1)
        self.outputs, self.size_divisibility_ = outputs, 32
        for name, channels in (("res4", 8), ("res5", 16)):
            if name in outputs:
                self.add_module(f"norm_{name}", nn.GroupNorm(norms, channels))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        low = self.low(images)
        found = {"res4": low, "res5": self.high(low.relu())}
        return {name: getattr(self, f"norm_{name}")(found[name]) for name in self.outputs}

    def output_shape(self) -> dict[str, ShapeSpec]:
        shapes = {"res4": ShapeSpec(8, stride=4), "res5": ShapeSpec(16, stride=32)}
        return {name: shapes[name] for name in self.outputs}


def stairs(folder: Path) -> Path:
    """Converted weights of a pre-training of its last output."""
    outputs = ("MODEL.RESNETS.OUT_FEATURES", "['res5']")
    cfg = pretrain_config("MODEL.BACKBONE.NAME", "build_stairs", *outputs)
    torch.manual_seed(0)
    model = build_model(cfg)
    nn.init.normal_(model.backbone.norm_res5.weight)
    checkpoint = save_checkpoint(folder / "c.pth", cfg, model)
    convert_checkpoint(checkpoint, folder / "w.pkl", force=True)
    return folder / "w.pkl"


class Detector(nn.Module):
    """A backbone with a head."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Conv2d(8, 1, 1)


class Wrapped(Backbone):
    """A backbone within another, under ``net``, as in a simple feature pyramid."""

    def __init__(self, net: Backbone) -> None:
        super().__init__()
        self.net, self.lateral = net, nn.Conv2d(16, 4, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"p5": self.lateral(self.net(images)["res5"])}


class TestParity:
    def test_the_same_network_under_any_wrapper(self, tmp_path: Path) -> None:
        weights = stairs(tmp_path)
        held, metadata = read_backbone(weights)
        assert metadata.network["parameters"] == sum(a.size for a in held.values())
        assert metadata.network["features"]["res5"]["shape"] == [16, 2, 2]
        for network in (Stairs(["res5"]), Wrapped(Stairs(["res5"]))):
            report = load_backbone(network, weights)
            assert len(report.filled) == 6 and not report.mismatch and not report.new_outputs
        assert report.new_modules == ("lateral",)

    def test_shapes_that_fit_are_not_enough(self, tmp_path: Path) -> None:
        """Another number of groups in a norm, of the same tensors."""
        other = Stairs(["res5"], norms=2)
        before = other.low.weight.clone()
        with pytest.raises(
            WeightsError, match=r"Other features.*\(1\):\n    res5: .* % of its norm"
        ):
            load_backbone(other, stairs(tmp_path))
        assert torch.equal(other.low.weight, before)

    def test_outputs_that_the_pretraining_did_not_use_are_new(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        network = Stairs(["res4", "res5"])
        report = load_backbone(network, stairs(tmp_path))
        assert report.new_outputs == ("norm_res4.weight", "norm_res4.bias")[::-1]
        assert "did not use: norm_res4.bias, norm_res4.weight" in caplog.text
        assert torch.equal(network.norm_res4.weight, torch.ones(8))

    def test_they_are_set_aside_where_they_are_built(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As a LazyConfig's backbone does, which was written for a detector."""
        outputs = ("MODEL.RESNETS.OUT_FEATURES", "['res4', 'res5']")
        cfg = pretrain_config("MODEL.BACKBONE.NAME", "build_stairs", *outputs)
        model = build_model(cfg)
        set_aside_unused(model)
        fixed = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert fixed == ["backbone.norm_res4.weight", "backbone.norm_res4.bias"]
        assert "not trained; a detector starts them new: norm_res4.weight" in caplog.text
        checkpoint = save_checkpoint(tmp_path / "c.pth", cfg, model, set_aside=fixed)
        convert_checkpoint(checkpoint, tmp_path / "w.pkl")
        held, _ = read_backbone(tmp_path / "w.pkl")
        assert len(held) == 6 and not any("norm_res4" in name for name in held)
        assert load_backbone(Stairs(["res4", "res5"]), tmp_path / "w.pkl").new_outputs
        assert len(load_backbone(Stairs(["res5"]), tmp_path / "w.pkl").filled) == 6

    def test_of_several_classified_outputs_the_finest_counts(self, tmp_path: Path) -> None:
        outputs = ("MODEL.RESNETS.OUT_FEATURES", "['res4', 'res5']")
        classified = ("MODEL.JIGSAW.IN_FEATURES", "['res4', 'res5']", *outputs)
        classified += ("MODEL.JIGSAW.SHARED_CLASSIFIER", "False")
        cfg = pretrain_config("MODEL.BACKBONE.NAME", "build_stairs", *classified)
        model = build_model(cfg)
        set_aside_unused(model)
        assert all(p.requires_grad for p in model.parameters())
        convert_checkpoint(save_checkpoint(tmp_path / "c.pth", cfg, model), tmp_path / "w.pkl")
        held, metadata = read_backbone(tmp_path / "w.pkl")
        assert len(held) == 8 and metadata.network["in_feature"] == "res4"

    def test_what_a_coarser_output_needs_is_not_set_aside(self) -> None:
        """A detector that took it for trained would have a random stage."""
        outputs = ("MODEL.RESNETS.OUT_FEATURES", "['res4', 'res5']")
        lower = ("MODEL.JIGSAW.IN_FEATURE", "res4", *outputs)
        model = build_model(pretrain_config("MODEL.BACKBONE.NAME", "build_stairs", *lower))
        with pytest.raises(ConfigError, match="4 parameters.* no gradient.*: high.weight"):
            set_aside_unused(model)

    def test_nor_is_a_convolution_of_a_finer_output(self) -> None:
        """Its detector would train it from random weights below norms that are frozen."""
        outputs = ("MODEL.RESNETS.OUT_FEATURES", "['res4', 'res5']")
        model = build_model(pretrain_config("MODEL.BACKBONE.NAME", "build_stairs", *outputs))
        model.backbone.norm_res4 = nn.Conv2d(8, 8, 1)
        with pytest.raises(ConfigError, match="2 parameters.* no gradient.*: norm_res4.weight"):
            set_aside_unused(model)

    def test_conversion_names_them_where_it_is_told_the_detector(
        self, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        (tmp_path / "x.py").write_text(
            "from detectron2.config import LazyCall as L\n"
            "from test_network import Detector, Stairs\n"
            "model = L(Detector)(backbone=L(Stairs)(outputs=['res4', 'res5']))\n"
            "dataloader, train = {}, {}\n"
        )
        weights = stairs(tmp_path)
        arguments = ["--input", str(weights), "--output", str(tmp_path / "w2.pkl")]
        plain = ["--write-config", str(tmp_path / "plain.py")]
        assert main([*arguments, "--config-file", str(tmp_path / "x.py"), *plain]) == 0
        said = "fills 6 tensors of that detector; new in it: norm_res4.bias, norm_res4.weight, head"
        assert said.replace("norm", "backbone.norm") in capsys.readouterr().out

    def test_an_output_above_the_trained_one_is_refused(self, tmp_path: Path) -> None:
        """As are tensors on which a trained output depends."""
        cfg = pretrain_config(*THIN, "MODEL.JIGSAW.IN_FEATURE", "res4")
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
        torch.manual_seed(0)
        model = nn.ModuleDict({"backbone": build_backbone(cfg)})
        save_checkpoint(tmp_path / "c.pth", cfg, model)
        metadata = convert_checkpoint(tmp_path / "c.pth", tmp_path / "w.pkl")
        assert set(metadata.network["features"]) == {"res2", "res3", "res4"}
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"]
        with pytest.raises(
            WeightsError, match="In the network, not in the file.*\n    res5.0.conv1"
        ):
            load_backbone(build_backbone(cfg), tmp_path / "w.pkl")

    def test_files_of_version_1_have_no_features(self, tmp_path: Path) -> None:
        _, metadata = read_backbone(stairs(tmp_path))
        values = metadata.to_dict() | {"format_version": 1}
        del values["network"]
        old = WeightsMetadata.from_dict(values)
        assert old.network is None and "network" not in old.to_dict()
        assert WeightsMetadata.from_dict(old.to_dict()) == old


def test_the_picture_and_its_numbers() -> None:
    """The same everywhere, in the order of the format; the estimate is near the true difference."""
    rgb, bgr = (picture(64, 48, form, 3) for form in ("RGB", "BGR"))
    assert torch.equal(rgb.flip(0), bgr) and rgb.shape == (3, 64, 48)
    assert rgb.flatten()[:4].tolist() == [0, 187, 239, 154]  # k * k * 2654435761 >> 13, mod 256
    assert 120 < float(rgb.mean()) < 135 and 70 < float(rgb.std()) < 78  # 127.5, 256 / sqrt(12)
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(1, 64, 8, 8, generator=generator)
    moved = feature + 0.25 * torch.randn(feature.shape, generator=generator)
    said = numbers(feature)
    assert difference(said, feature) < 1e-8
    assert 0.1 < difference(said, moved) < 0.5
    assert difference(said, feature * math.nan) == math.inf


def test_where_a_backbone_lies() -> None:
    names = ["detr.net.0.stem.weight", "detr.net.0.res2.weight", "detr.head.weight", "weight"]
    assert find_prefix(names, {"stem.weight", "res2.weight"}) == "detr.net.0."
    assert find_prefix(["stem.weight", "res2.weight"], {"stem.weight"}) == ""
    assert find_prefix(["backbone.bottom_up.x", "backbone.fpn.x"]) == "backbone.bottom_up."
    assert find_prefix(["backbone.x", "roi_heads.x"]) == "backbone." and find_prefix(["x"]) == ""


# ---- whoever builds a ResNet


@BACKBONE_REGISTRY.register()
def build_renamed_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    return build_resnet_backbone(cfg, input_shape)


def test_a_resnet_under_another_name_takes_its_stride_along(tmp_path: Path) -> None:
    """The zoo's configs stride in the 1x1; weights trained in the 3x3 say so."""
    weights = convert(tmp_path, *THIN, "MODEL.BACKBONE.NAME", "build_renamed_backbone")
    _, metadata = read_backbone(weights)
    assert metadata.network["backbone"] == "build_renamed_backbone"
    assert metadata.required_config()["MODEL.RESNETS.STRIDE_IN_1X1"] is False
    cfg = small_detection_config(FPN, *THIN)
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1
    apply_metadata(cfg, metadata)
    assert not load_backbone(build_detector(cfg), weights).mismatch


def test_what_no_word_is_said_of_is_found_out(tmp_path: Path) -> None:
    """One convolution of sixteen dilated; every tensor fits."""
    weights = convert(tmp_path, *THIN)
    other = build_backbone(pretrain_config(*THIN))
    other.res5[1].conv2.dilation = other.res5[1].conv2.padding = (2, 2)
    with pytest.raises(WeightsError, match=r"Other features of a fixed picture \(1\):\n    res5: "):
        load_backbone(other, weights)


def test_a_backbone_that_nobody_registered(tmp_path: Path) -> None:
    cfg = pretrain_config(*THIN)
    checkpoint = save_checkpoint(tmp_path / "c.pth", cfg, pretrained(cfg))
    data = torch.load(checkpoint, weights_only=True)
    data["jigsaw"]["config"] = data["jigsaw"]["config"].replace(
        "build_resnet_backbone", "build_far"
    )
    torch.save(data, checkpoint)
    with pytest.raises(ConfigError, match="'build_far' found in .* --register the module"):
        convert_checkpoint(checkpoint, tmp_path / "w.pkl")
    data["jigsaw"]["config"] = data["jigsaw"]["config"].replace("REGISTER: []", "REGISTER: [far]")
    torch.save(data, checkpoint)
    with pytest.raises(ConfigError, match="its run had --register far: give the same"):
        convert_checkpoint(checkpoint, tmp_path / "w.pkl")


# ---- Caffe2's files


def caffe2(norm: str, **keys: int) -> dict[str, np.ndarray]:
    """Zeros under the names of FAIR's files, in which a norm is called bn or gn."""
    pairs = [(f"MODEL.RESNETS.{key.upper()}", str(value)) for key, value in keys.items()]
    cfg = pretrain_config(*(part for pair in pairs for part in pair), "MODEL.RESNETS.NORM", "GN")
    with torch.device("meta"):
        state = build_backbone(cfg).state_dict()
    branches = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}
    branches |= {"shortcut": "branch1"}
    found = {}
    for name, value in state.items():
        *parts, last = name.split(".")
        head = [p for p in parts if p not in ("norm", "stem")]
        head = head if head == ["conv1"] else [branches.get(p, p) for p in head]
        if "norm" in parts:
            last = norm + {"weight": "_s", "bias": "_b"}[last]
        key = "_".join([*head, last if "norm" in parts else "w"])
        found["res_" + key if key.startswith("conv1_bn") else key] = np.zeros(value.shape, "f4")
    return found


def test_fairs_resnext_divides_and_strides_in_the_3x3() -> None:
    """As its zoo config, faster_rcnn_X_101_32x8d_FPN_3x.yaml, has it."""
    wide = {"depth": 101, "num_groups": 32, "width_per_group": 1, "res2_out_channels": 32}
    _, metadata = from_msra(caffe2("bn", **wide))
    assert metadata.pixel_std == (57.375, 57.12, 58.395) and metadata.input_format == "BGR"
    assert metadata.architecture.stride_in_1x1 is False
    assert metadata.architecture.norm == "BN" and metadata.architecture.num_groups == 32
    _, metadata = from_msra(caffe2("bn", **(wide | {"depth": 152})))  # X-152-32x8d-IN5k
    assert metadata.pixel_std == (1.0,) * 3 and metadata.architecture.stride_in_1x1 is False


def test_fairs_group_norm_is_no_batch_norm() -> None:
    """As Misc/mask_rcnn_R_50_FPN_3x_gn.yaml has it; no statistics are made up."""
    arrays, metadata = from_msra(caffe2("gn", depth=50))
    assert metadata.architecture.norm == "GN" and metadata.pixel_std == (1.0,) * 3
    assert metadata.architecture.stride_in_1x1 is False
    assert not [name for name in arrays if "running" in name] and len(arrays) == 53 * 3
