"""Position embeddings of another grid."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from helpers_weights import convert_checkpoint, pretrain_config, save_checkpoint
from torch import Tensor, nn

from jigsaw_d2.checkpoint.loading import load_backbone
from jigsaw_d2.checkpoint.positions import resize_positions
from jigsaw_d2.io import WeightsError


class Patches(Backbone):
    """Patches of 16 pixels with an embedding of their position, of a pre-training's image size."""

    def __init__(self, image: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 4, 16, stride=16)
        self.pos_embed = nn.Parameter(torch.randn(1, (image // 16) ** 2, 4))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.proj(images)
        return {"res4": x + self.pos_embed.transpose(1, 2).reshape(1, 4, *x.shape[2:])}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"res4": ShapeSpec(4, stride=16)}


@BACKBONE_REGISTRY.register()
def build_patches(cfg, input_shape) -> Backbone:
    return Patches(cfg.INPUT.JIGSAW.TEMPLATE_SIZE[0])


def test_a_vit_of_224_is_loaded_at_1024(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """14 x 14 cells become 64 x 64, as Detectron2's get_abs_pos interpolates them; it is said."""
    cfg = pretrain_config("MODEL.BACKBONE.NAME", "build_patches", "MODEL.JIGSAW.IN_FEATURE", "res4")
    model = build_model(cfg)
    checkpoint = save_checkpoint(tmp_path / "c.pth", cfg, model)
    metadata = convert_checkpoint(checkpoint, tmp_path / "w.pkl")
    # it runs at its own size alone, which is then the picture's
    assert metadata.network["picture"] == [224, 224]
    assert not load_backbone(Patches(224), tmp_path / "w.pkl").interpolated
    network = Patches(1024)
    report = load_backbone(network, tmp_path / "w.pkl")
    assert report.interpolated == ("pos_embed",) and "as ViTDet does: pos_embed" in caplog.text
    grid = model.backbone.pos_embed.reshape(1, 14, 14, 4).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(64, 64), mode="bicubic", align_corners=False)
    assert torch.equal(network.pos_embed, expected.permute(0, 2, 3, 1).reshape(1, -1, 4))
    network.proj = nn.Conv2d(3, 8, 16)
    with pytest.raises(WeightsError, match="Other shapes"):  # channels are no grid
        load_backbone(network, tmp_path / "w.pkl")


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("blocks.0.attn.rel_pos_h", (27, 8), (127, 8)),
        ("layers.0.attn.relative_position_bias_table", (169, 3), (529, 3)),  # windows of 7 and 12
        ("pos_embed", (1, 197, 8), (1, 4097, 8)),  # a class token and 14 x 14, 64 x 64
        ("absolute_pos_embed", (1, 8, 14, 14), (1, 8, 64, 20)),
    ],
)
def test_every_kind(name: str, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """A constant stays the constant; the class token stays itself."""
    array = np.full(before, 0.5, np.float32)
    if before[1] == 197:
        array[:, 0] = 7
    resized = resize_positions(name, array, after)
    assert resized.shape == after and resized.dtype == np.float32
    if before[1] == 197:
        assert (resized[:, 0] == 7).all()
        resized = resized[:, 1:]
    assert np.allclose(resized, 0.5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("fc.weight", (9, 4), (16, 4)),
        ("pos_embed", (1, 9, 4), (1, 16, 8)),
        ("pos_embed", (1, 9, 4), (1, 15, 4)),
        ("pos_embed", (1, 9, 4), (16, 4)),
        ("rel_pos_w", (9, 4), (16, 8)),
    ],
)
def test_what_is_no_grid(name: str, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    assert resize_positions(name, np.zeros(before, np.float32), after) is None
