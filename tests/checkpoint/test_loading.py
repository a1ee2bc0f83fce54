"""Strict loading: the detector's features equal the pre-training's, or nothing is loaded at all."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from helpers_networks import tiny_backbone, tiny_fpn
from helpers_weights import (
    C4,
    FPN,
    MASK,
    RESNET_18,
    RETINANET,
    THIN,
    THIN_GN,
    build_detector,
    convert,
    convert_model,
    pretrain_config,
    rewrite,
    small_detection_config,
)
from torch import nn

from jigsaw_d2.checkpoint.convert import convert_checkpoint
from jigsaw_d2.checkpoint.loading import LoadReport, load_backbone
from jigsaw_d2.checkpoint.reading import read_converted
from jigsaw_d2.detection.config import SCRATCH_METADATA, apply_metadata
from jigsaw_d2.io import WeightsError

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
GN = ["MODEL.RESNETS.NORM", "GN"]
DCN = ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, True, True, True]"]
X101 = ["MODEL.RESNETS.DEPTH", "101", "MODEL.RESNETS.NUM_GROUPS", "32"]
X101 += ["MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
NETWORKS = {
    "R18": (RESNET_18, [FPN, MASK, RETINANET]),  # Detectron2 has no C4 head of basic blocks
    "R50": ([], [C4, FPN, MASK, RETINANET]),
    "X101": (X101, [C4, FPN, MASK, RETINANET]),
    "GN": ([*THIN_GN, *GN], [C4, FPN, MASK, RETINANET]),
    "DCN": ([*THIN, *DCN], [FPN, MASK, RETINANET]),  # nor one with deformable convolution
    "DCNv2": ([*THIN, *DCN, "MODEL.RESNETS.DEFORM_MODULATED", "True"], [FPN]),
    "stride in 1x1, BGR": (
        [*THIN, "MODEL.RESNETS.STRIDE_IN_1X1", "True", "INPUT.FORMAT", "BGR"],
        [C4, FPN],
    ),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_features_equal_the_pretrainings(network: str, tmp_path: Path) -> None:
    """One picture file, read as either config says, through both: res2..res5 to 1e-5."""
    overrides, detectors = NETWORKS[network]
    cfg = pretrain_config(*overrides)
    model, weights = convert_model(tmp_path, *overrides)
    tensors, metadata = read_converted(weights)
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "picture.png"), picture)
    with torch.no_grad():
        expected = model.backbone(model.preprocess(_read(tmp_path / "picture.png", cfg)[None]))
    for name in detectors:
        detection = small_detection_config(name)
        apply_metadata(detection, metadata, match_architecture=True)
        detector = build_detector(detection)
        assert len(load_backbone(detector, weights).filled) == len(tensors)
        features = _features(detector, _read(tmp_path / "picture.png", detection))
        assert set(features) >= {"res4", "res5"}
        for stage, feature in features.items():
            scale = expected[stage].abs().max()
            difference = float((feature - expected[stage]).abs().max() / scale)
            assert scale > 0.1 and difference < 1e-5, (name, stage, difference)
    swapped = _features(detector, _read(tmp_path / "picture.png", detection).flip(0))
    assert (swapped["res5"] - expected["res5"]).abs().max() > 1e-3  # RGB for BGR would be seen


def test_features_while_the_detector_trains(tmp_path: Path) -> None:
    """With gradients frozen batch norm is computed in another way; the features are the same."""
    model, weights = convert_model(tmp_path, *THIN)
    detector = build_detector(rgb_config(FPN, *THIN, "MODEL.BACKBONE.FREEZE_AT", "0")).train()
    load_backbone(detector, weights)
    with torch.no_grad():
        expected = model.backbone(IMAGES)
    for stage, feature in detector.backbone.bottom_up(IMAGES).items():
        assert feature.requires_grad
        difference = (feature - expected[stage]).abs().max() / expected[stage].abs().max()
        assert difference < 1e-5, stage


def rgb_config(name: str, *overrides: str) -> CfgNode:
    """A small detection config with the input that the weights of these tests want."""
    input_keys = SCRATCH_METADATA.required_config()
    flat = [str(part) for item in input_keys.items() for part in item]
    stride = ["MODEL.RESNETS.STRIDE_IN_1X1", "False"]
    return small_detection_config(name, *flat, *stride, *overrides)


def _read(path: Path, cfg: CfgNode) -> torch.Tensor:
    """uint8 (3, H, W) in the order of the config's INPUT.FORMAT, as Detectron2's mapper reads."""
    image = read_image(str(path), format=cfg.INPUT.FORMAT)
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


@torch.no_grad()
def _features(detector: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    images = detector.preprocess_image([{"image": image}]).tensor
    features = getattr(detector.backbone, "bottom_up", detector.backbone)(images)
    if "res5" not in features:  # C4 applies res5 to regions of res4; here to all of it
        features["res5"] = detector.roi_heads.res5(features["res4"])
    return features


def test_plain_detectron2_loads_it_without_our_code(tmp_path: Path) -> None:
    """In a process that never imports us: all backbone tensors of a zoo model are the file's."""
    pkl = convert(tmp_path, name="weights.pkl")
    convert_checkpoint(pkl, tmp_path / "weights.pth")
    script = f"""
import logging, sys, pickle, torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
held = pickle.load(open("weights.pkl", "rb"))["model"]
for name, weights in (({C4!r}, "weights.pkl"), ({FPN!r}, "weights.pkl"), ({FPN!r}, "weights.pth")):
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = "cpu", 16
    model = build_model(cfg)
    logging.getLogger("fvcore").handlers[:] = [logging.StreamHandler(sys.stdout)]
    extra = DetectionCheckpointer(model).load(weights)
    assert "jigsaw_metadata" in extra
    state, used = model.state_dict(), set()
    for key in state:
        if "bottom_up" in key or ("C4" in name and key.startswith(("backbone", "roi_heads.res5"))):
            short = key
            for prefix in ("backbone.", "bottom_up.", "roi_heads."):
                short = short.removeprefix(prefix)
            assert torch.equal(state[key], torch.as_tensor(held[short])), key
            used.add(short)
    assert used == set(key for key in held if " " not in key), set(held) - used
    print("equal", len(used))
assert not [name for name in sys.modules if name.startswith("jigsaw")]
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    # 53 convolutions, each with a norm of four tensors
    assert done.stdout.count("equal 265\n") == 3
    # what that process did not check, it at least reads in its log
    assert done.stdout.count("not used by the model") == 3
    assert "these weights need INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [123" in done.stdout


class TestRefusals:
    """Both sides are listed, and the detector stays as it was."""

    @pytest.fixture()
    def weights(self, tmp_path: Path) -> Path:
        return convert(tmp_path, *THIN)

    def refused(self, weights: Path, *overrides: str, config: str = FPN) -> str:
        detector = build_detector(rgb_config(config, *THIN, *overrides))
        before = {name: value.clone() for name, value in detector.state_dict().items()}
        with pytest.raises(WeightsError) as error:
            load_backbone(detector, weights)
        after = detector.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        return str(error.value)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("res4.3.conv2.weight", None, "In the network, not in the file (1):\n    res4.3.conv2"),
            (
                "res4.3.conv4.weight",
                (2, 2),
                "In the file, not in the network (1):\n    res4.3.conv4",
            ),
            (
                "res4.3.conv2.weight",
                (8, 8, 3, 3),
                "res4.3.conv2.weight: file (8, 8, 3, 3), network (32, 32, 3, 3)",
            ),
        ],
    )
    def test_tensors(self, name: str, value: tuple | None, message: str, weights: Path) -> None:
        def change(data: dict) -> None:
            data["model"].pop(name, None)
            data["model"] |= {name: np.zeros(value, np.float32)} if value else {}

        assert message in self.refused(rewrite(weights, change, seal=True))
        report = load_backbone(build_detector(rgb_config(FPN, *THIN)), weights, strict=False)
        assert len(report.filled) == 265 - ("conv2" in name)  # insisting loads what fits

    @pytest.mark.parametrize(
        ("trained", "built", "message"),
        [
            (
                THIN,
                [*THIN, "MODEL.RESNETS.DEPTH", "101"],
                "DEPTH: file 50, network 101; finetune_net.py --match-architecture takes it",
            ),
            (THIN, [*THIN, *DCN], "MODEL.JIGSAW.NEW_OFFSETS True starts the offsets at zero"),
            # two statistics a norm
            (THIN_GN, [*THIN_GN, *GN], "In the file, not in the network (106)"),
            ([*THIN_GN, *GN], THIN_GN, "In the network, not in the file (106)"),
        ],
    )
    def test_networks(self, trained: list, built: list, message: str, tmp_path: Path) -> None:
        said = self.refused(convert(tmp_path, *trained), *built)
        assert message in said and len(said.splitlines()) < 20  # not every tensor's name

    def test_a_c4_detector_of_basic_blocks(self, tmp_path: Path) -> None:
        weights = convert(tmp_path, *RESNET_18)
        message = self.refused(weights, *RESNET_18, config=C4)
        assert "C4 detectors have no basic blocks, as depth 18 and 34: choose FPN" in message

    @pytest.mark.parametrize(
        ("key", "value", "line"),
        [
            ("MODEL.PIXEL_MEAN", "[1, 2, 3]", "pixel_mean: file (123.675, 116.28, 103.53), netw"),
            ("MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]", "pixel_std: file (58.395, 57.12, 57.375), netw"),
            ("INPUT.FORMAT", "BGR", "input_format: file RGB, network BGR"),
            ("MODEL.RESNETS.STRIDE_IN_1X1", "True", "stride_in_1x1: file False, network True"),
        ],
    )
    @pytest.mark.parametrize("config", [FPN, RETINANET])
    def test_another_use(self, config: str, key: str, value: str, line: str, weights: Path) -> None:
        """A detector built without us, whose every shape fits."""
        message = self.refused(weights, key, value, config=config)
        assert f"Used otherwise than in the pre-training (1):\n    {line}" in message


def test_a_detector_without_res5_takes_the_rest_and_says_so(tmp_path: Path, caplog) -> None:
    """Detectron2's RPN on C4 builds stem to res4; its features equal the pre-training's."""
    model, weights = convert_model(tmp_path, *THIN)
    # trainable batch norm has the same tensors, and a counter, which stays
    rpn = ["COCO-Detection/rpn_R_50_C4_1x.yaml", *THIN, "MODEL.RESNETS.NORM", "BN"]
    detector = build_detector(rgb_config(*rpn))
    with caplog.at_level("WARNING"):
        report = load_backbone(detector, weights)
    # res5 has ten convolutions, each with a norm of four tensors
    assert len(report.filled) == 265 - 50 and len(report.no_room) == 50
    assert "the network has no res5; left out 50 tensors" in caplog.text
    assert report.new_modules == ("proposal_generator.rpn_head",)
    with torch.no_grad():
        ours, theirs = detector.backbone(IMAGES)["res4"], model.backbone(IMAGES)["res4"]
    assert torch.allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max()))


def test_other_models_weights_fill_a_backbone_by_itself_alone(tmp_path: Path) -> None:
    """What has no metadata cannot tell a whole model how its input was normalised."""
    detector = build_detector(rgb_config(FPN, *THIN))
    torch.save({"model": detector.state_dict()}, tmp_path / "detector.pth")
    other = build_detector(rgb_config(FPN, *THIN), seed=2)
    with pytest.raises(WeightsError, match="without metadata.*convert_weights.py"):
        load_backbone(other, tmp_path / "detector.pth")
    report = load_backbone(other.backbone, tmp_path / "detector.pth")
    assert not report.mismatch and not report.new_modules
    for name, value in detector.backbone.state_dict().items():  # the pyramid too
        assert torch.equal(other.backbone.state_dict()[name], value), name


def test_offsets_start_at_zero_where_asked(tmp_path: Path) -> None:
    """Zero offsets are a plain convolution: features equal those of the plain network."""
    weights = convert(tmp_path, *THIN)
    plain = build_detector(rgb_config(FPN, *THIN))
    deformable = build_detector(rgb_config(FPN, *THIN, *DCN), seed=2)
    load_backbone(plain, weights)
    with pytest.raises(WeightsError, match="conv2_offset"):
        load_backbone(deformable, weights)
    report = load_backbone(deformable, weights, new_offsets=True)
    assert len(report.new_offsets) == 2 * (4 + 6 + 3)  # weight and bias in each block of res3-res5
    image = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0))
    one, other = _features(plain, image), _features(deformable, image)
    for stage in one:
        assert torch.allclose(one[stage], other[stage], atol=1e-5 * float(one[stage].abs().max()))


class TestBackboneByItself:
    """As for the ERF: weights of any Detectron2 model, under all their names."""

    def load(self, backbone: nn.Module, tensors: dict, folder: Path) -> LoadReport:
        torch.save({"model": tensors}, folder / "w.pth")
        return load_backbone(backbone, folder / "w.pth")

    @pytest.mark.parametrize("naming", ["bare", "checkpoint of ours", "pyramid", "C4"])
    def test_every_naming(self, naming: str, tmp_path: Path) -> None:
        source = tiny_backbone(seed=1).state_dict()
        prefix = {"bare": "", "pyramid": "backbone.bottom_up."}.get(naming, "backbone.")
        tensors = {
            ("roi_heads." if naming == "C4" and k.startswith("res5") else prefix) + k: value
            for k, value in source.items()
        }
        backbone = tiny_backbone(seed=2)
        tensors |= {"roi_heads.box_predictor.bias": torch.zeros(3)} if prefix else {}
        report = self.load(backbone, tensors, tmp_path)
        assert not report.mismatch and len(report.filled) == 265
        assert all(torch.equal(backbone.state_dict()[k], source[k]) for k in report.filled)

    def test_a_pyramid_from_a_detector_and_from_our_file(self, tmp_path: Path, caplog) -> None:
        source = tiny_fpn(seed=1).state_dict()
        pyramid = tiny_fpn(seed=2)
        report = self.load(pyramid, {f"backbone.{k}": v for k, v in source.items()}, tmp_path)
        assert not report.new_modules
        assert all(torch.equal(pyramid.state_dict()[k], source[k]) for k in report.filled)
        ours = {k.removeprefix("bottom_up."): v for k, v in source.items() if "bottom_up" in k}
        with caplog.at_level("WARNING"):
            report = self.load(tiny_fpn(seed=2), ours, tmp_path)
        assert len(report.filled) == 265 and "fpn_lateral2" in report.new_modules
        assert "new, with random weights: fpn_lateral2" in caplog.text
        plain = tiny_backbone(seed=3)  # has no use for what the file's pyramid adds
        assert not self.load(
            plain, {f"backbone.{k}": v for k, v in source.items()}, tmp_path
        ).mismatch
