"""Weights for timm and for the bare module, loaded there with strict=True."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from helpers_weights import RESNET_18, convert, pretrain_config, save_checkpoint

from jigsaw_d2.checkpoint.convert import convert_checkpoint
from jigsaw_d2.checkpoint.reading import read_tensors
from jigsaw_d2.io import WeightsError

IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("network", ["convnext_atto", "efficientnet_b0", "vit_tiny_patch16_224"])
def test_timm_loads_it_strictly(network: str, tmp_path: Path) -> None:
    """And its own features are then the pre-training's."""
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    kwargs = [["dynamic_img_size", True]] if network.startswith("vit") else []
    name = ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", network]
    feature = "res4" if kwargs else "res5"
    keys = ["MODEL.TIMM.KWARGS", str(kwargs), "MODEL.JIGSAW.IN_FEATURE", feature]
    cfg = pretrain_config(*name, *keys)
    model = build_model(cfg).eval()
    checkpoint = save_checkpoint(tmp_path / "c.pth", cfg, model)
    convert_checkpoint(checkpoint, tmp_path / "w.pth", format="timm")
    path = str(tmp_path / "w.pth")
    theirs = timm.create_model(network, checkpoint_path=path, **dict(kwargs)).eval()
    with torch.no_grad():
        maps = theirs.forward_intermediates(IMAGES, intermediates_only=True)
        assert torch.equal(maps[-1], model.backbone(IMAGES)[feature])


def test_a_resnet_of_detectron2s_is_timms_too(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    weights = convert(tmp_path, *RESNET_18)
    convert_checkpoint(weights, tmp_path / "r18.pth", format="timm")
    theirs = timm.create_model("resnet18", checkpoint_path=str(tmp_path / "r18.pth"))
    stem = read_tensors(weights)[0]["stem.conv1.weight"]
    assert torch.equal(theirs.conv1.weight, torch.from_numpy(stem))


@pytest.mark.parametrize("library", ["resnet", "timm"])
def test_of_a_pyramid_timm_has_the_network_below(library: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    levels = "['res3', 'res4', 'res5']"
    keys = ["MODEL.BACKBONE.NAME", f"build_{library}_fpn_backbone", "MODEL.TIMM.NAME", "resnet18"]
    keys += ["MODEL.RESNETS.OUT_FEATURES", levels, "MODEL.FPN.IN_FEATURES", levels]
    keys += ["MODEL.JIGSAW.IN_FEATURES", "['p3', 'p4', 'p5']"]
    cfg = pretrain_config(*RESNET_18, *keys)
    model = build_model(cfg)
    checkpoint = save_checkpoint(tmp_path / "c.pth", cfg, model)
    convert_checkpoint(checkpoint, tmp_path / "w.pth", format="timm")
    theirs = timm.create_model("resnet18", checkpoint_path=str(tmp_path / "w.pth"))
    ours = next(p for n, p in model.named_parameters() if n.endswith("conv1.weight"))
    assert torch.equal(theirs.conv1.weight, ours)
    read_tensors(tmp_path / "w.pth")


def test_the_bare_module_and_what_is_not_timms(tmp_path: Path) -> None:
    name = ["MODEL.BACKBONE.NAME", "build_torchvision_backbone"]
    cfg = pretrain_config(*name, "MODEL.TORCHVISION.NAME", "mobilenet_v3_small")
    model = build_model(cfg)
    checkpoint = save_checkpoint(tmp_path / "c.pth", cfg, model)
    convert_checkpoint(checkpoint, tmp_path / "bare.pth", format="state_dict")
    other = build_model(cfg).backbone
    other.load_state_dict(torch.load(tmp_path / "bare.pth", weights_only=True), strict=True)
    assert torch.equal(
        next(other.net.children())[0].weight, next(model.backbone.net.children())[0].weight
    )
    with pytest.raises(WeightsError, match="timm has no such network.*build_timm_backbone"):
        convert_checkpoint(checkpoint, tmp_path / "t.pth", format="timm")
