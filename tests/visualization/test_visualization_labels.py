"""``visualize.py labels``: weights and losses of one image, cell by cell."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from helpers_figures import run_figure
from helpers_networks import TINY_RESNET
from helpers_store import make_store

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.modeling.erf import region_weights
from jigsaw_d2.modeling.losses import erf_adaptive_loss, region_means
from jigsaw_d2.visualization.inputs import normalise, rgb_stream
from jigsaw_d2.visualization.labels import cell_losses, labels_figure, load_pretrainer

CONFIG = "Base-JigsawPretrain.yaml"
TINY = [*map(str, TINY_RESNET), "MODEL.RESNETS.OUT_FEATURES", "['res5']"]


@pytest.fixture()
def trained(tmp_path):
    """A pre-training network; its checkpoint and a store of its three classes in ``tmp_path``."""
    make_store(tmp_path / "store", n_per_group=4, classes=3)
    model = build_model(get_jigsaw_cfg(CONFIG, [*TINY, "MODEL.JIGSAW.NUM_CLASSES", "3"])).eval()
    model.erf_weights.copy_(region_weights(torch.rand(7, 7, 4), model.cell_regions))
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    return model


def visualize(folder, *arguments, weights="model_final.pth", store="store", opts=()):
    command = ["--config-file", CONFIG, "--weights", str(folder / weights), "--device", "cpu"]
    command += ["--store", str(folder / store), "--output", str(folder / "labels.png")]
    return run_figure("labels", [*command, *arguments, "--opts", *TINY, *opts])


def test_files(trained, tmp_path):
    status, out = visualize(tmp_path, "--position", "3", "8")
    assert status == 0, out
    assert [Path(line).name for line in out.splitlines()] == ["labels-3.png", "labels-8.png"]


def test_a_figure_for_each_classified_feature(trained, tmp_path):
    """Of 28x28 cells too, without numbers in them; with one classifier each."""
    opts = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", "4"]
    for key in ("MODEL.RESNETS.OUT_FEATURES", "MODEL.FPN.IN_FEATURES"):
        opts += [key, "['res3', 'res4', 'res5']"]
    opts += ["MODEL.JIGSAW.IN_FEATURES", "['p3', 'p4', 'p5']"]
    opts += ["MODEL.JIGSAW.SHARED_CLASSIFIER", "False"]
    cfg = get_jigsaw_cfg(CONFIG, [*TINY, *opts, "MODEL.JIGSAW.NUM_CLASSES", "3"])
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "pyramid.pth")
    status, out = visualize(tmp_path, weights="pyramid.pth", opts=opts)
    assert status == 0, out
    names = ["labels-p3.png", "labels-p4.png", "labels-p5.png"]
    assert [Path(line).name for line in out.splitlines()] == names


def test_loss_map_averages_to_the_loss(trained, tmp_path):
    model, cfg = load_pretrainer(CONFIG, str(tmp_path / "model_final.pth"), TINY)
    batch = rgb_stream(cfg, [str(tmp_path / "store")])[range(1)]
    images = normalise(batch["image"], cfg)
    losses = cell_losses(model, images, batch["gt_classes"][0])["res5"]
    regions = model.cell_regions
    with torch.no_grad():
        logits = model.cell_logits(images)["res5"]
        expected = erf_adaptive_loss(logits, batch["gt_classes"], model.erf_weights, regions)
    torch.testing.assert_close(region_means(losses, regions).mean(), expected)


def test_figure_shows_each_weight_on_one_scale(trained):
    image, maps = torch.zeros(3, 224, 224, dtype=torch.uint8), (
        trained.erf_weights,
        torch.ones(7, 7),
    )
    figure = labels_figure(image, list("abcd"), *maps, trained.cell_regions, trained.template)
    drawn = [axes.images[0] for axes in figure.axes if axes.images][1:5]
    for panel, weights in zip(drawn, trained.erf_weights):
        assert (panel.norm.vmin, panel.norm.vmax) == (0, 1)
        assert panel.get_array().tolist() == weights.tolist()


def test_mistakes_in_one_line(trained, tmp_path):
    torch.save({"model": trained.backbone.state_dict()}, tmp_path / "backbone.pth")
    make_store(tmp_path / "other", n_per_group=2, classes=5)
    for options, message in (
        ({"weights": "backbone.pth"}, "need its classifier"),
        ({"weights": "backbone"}, "no such file"),
        ({"store": "other"}, "knows 3 classes"),
    ):
        status, out = visualize(tmp_path, **options)
        assert status == 2 and message in out
