"""ViTDet, Swin and MViT of Detectron2's main branch, which release 0.6 lacks: the whole way."""

from pathlib import Path

import pytest
from detectron2.config import instantiate
from helpers_run import tiny_options

from jigsaw_d2.checkpoint.convert import convert_checkpoint
from jigsaw_d2.checkpoint.loading import load_backbone
from jigsaw_d2.detection.lazy import load_lazy_config
from jigsaw_d2.tools import pretrain

DETECTOR = """
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.modeling.backbone.{module} import *
cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
model, dataloader, train = cfg.model, cfg.dataloader, cfg.train
"""
VIT = """
model.backbone = L(SimpleFeaturePyramid)(
    net=L(ViT)(
        img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2, window_size=2,
        window_block_indexes=[0], use_rel_pos=True, out_feature="last_feat",
    ),
    in_feature="last_feat", out_channels=256, scale_factors=(4.0, 2.0, 1.0, 0.5),
    top_block=L(LastLevelMaxPool)(), norm="LN", square_pad=64,
)
"""
SWIN = """
model.backbone.bottom_up = L(SwinTransformer)(
    embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=4,
)
model.backbone.in_features = ("p0", "p1", "p2", "p3")
"""
MVIT = """
model.backbone.bottom_up = L(MViT)(
    img_size=64, embed_dim=16, depth=4, last_block_indexes=(0, 1, 2, 3), adaptive_window_size=8,
)
model.backbone.in_features = ("scale2", "scale3", "scale4", "scale5")
"""
LOWER = "backbone.bottom_up."


@pytest.mark.parametrize(
    ("module", "backbone", "feature", "detector_size", "new"),
    [
        ("vit", VIT, "last_feat", "model.backbone.net.img_size=128", set()),
        (
            "swin",
            SWIN,
            "p3",
            "model.backbone.bottom_up.pretrain_img_size=128",
            {f"{LOWER}norm{i}.{part}" for i in range(3) for part in ("weight", "bias")},
        ),
        (
            "mvit",
            MVIT,
            "scale5",
            "model.backbone.bottom_up.img_size=128",
            {f"{LOWER}scale{i}_norm.{part}" for i in (2, 3, 4) for part in ("weight", "bias")},
        ),
    ],
)
def test_pretrained_converted_and_loaded_into_a_larger_detector(
    module: str,
    backbone: str,
    feature: str,
    detector_size: str,
    new: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One step at 64 pixels; relative positions are interpolated, norms of other outputs new."""
    pytest.importorskip(f"detectron2.modeling.backbone.{module}", reason="Detectron2 main's")
    monkeypatch.setattr("detectron2.engine.defaults.collect_env_info", str)  # seconds
    program = tmp_path / "own.py"
    program.write_text(DETECTOR.format(module=module) + backbone)
    options = tiny_options(
        tmp_path,
        "SOLVER.MAX_ITER",
        1,
        "MODEL.JIGSAW.IN_FEATURE",
        feature,
        "SOLVER.OPTIMIZER",
        "AdamW",
        "SOLVER.BASE_LR",
        0.001,
    )
    options = options[: (at := options.index("MODEL.BACKBONE.NAME"))] + options[at + 2 :]
    given = ["--config-file", "Base-JigsawPretrain.yaml", "--backbone-from", str(program)]
    assert pretrain.main([*given, *options]) == 0
    weights = tmp_path / "w.pkl"
    convert_checkpoint(tmp_path / "run", weights, trust=True)
    detector = instantiate(load_lazy_config(str(program), weights, [detector_size]).model)
    report = load_backbone(detector, weights)
    assert not report.mismatch and set(report.new_outputs) == new
    bottom = detector.backbone.net if module == "vit" else detector.backbone.bottom_up
    assert len(report.filled) == len(bottom.state_dict()) - len(new)
