"""Networks and images for the ERF commands: any config, photos, Jigsaw images."""

import cv2
import numpy as np
import pytest
import torch
from helpers_networks import TINY_RESNET
from helpers_store import make_store
from helpers_weights import C4, FPN, THIN, convert

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.io import ConfigError
from jigsaw_d2.visualization import inputs

TINY = [*TINY_RESNET, "MODEL.FPN.OUT_CHANNELS", 8]


def load(config, feature, **options):
    return inputs.load_network(config, feature, overrides=TINY, device="cpu", **options)


def test_zoo_configs():
    network, cfg = load(FPN, "p4")
    assert network.output_shape()["p4"].stride == 16 and not network.training
    assert cfg.INPUT.FORMAT == "BGR"
    network, _ = load(C4, "res5")  # which C4 keeps outside its backbone
    assert set(network.output_shape()) == {"res4", "res5"}
    with pytest.raises(ConfigError, match="p2, p3, p4, p5, p6, no 'p9'"):
        load(FPN, "p9")


def test_seed_decides_random_weights():
    state = torch.get_rng_state()
    name = "res4.0.conv1.weight"
    first, same, other = (load(C4, "res4", seed=s)[0].state_dict()[name] for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_weights_bring_what_they_require(tmp_path):
    """A zoo config is written for MSRA's weights: our weights change input, stride and norm."""
    weights = str(convert(tmp_path, *THIN))
    overrides = [*THIN, "MODEL.FPN.OUT_CHANNELS", "8"]
    network, cfg = inputs.load_network(FPN, "p4", weights, overrides, device="cpu")
    assert cfg.INPUT.FORMAT == "RGB" and cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    assert network.bottom_up.res3[0].conv1.stride == (1, 1)
    with pytest.raises(ConfigError, match="INPUT.FORMAT: config BGR, weights RGB"):
        inputs.load_network(FPN, "p4", weights, [*THIN, "INPUT.FORMAT", "BGR"])


def test_normalise_follows_the_config():
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    images[:, 0] = 200  # red
    red = inputs.normalise(images, get_jigsaw_cfg("Base-JigsawPretrain.yaml"))[0, 0, 0, 0]
    assert red.item() == pytest.approx((200 - 123.675) / 58.395)
    # Detectron2's own: BGR, mean 103.53, 116.28, 123.675, std 1
    red = inputs.normalise(images, get_jigsaw_cfg())[0, 2, 0, 0]
    assert red.item() == pytest.approx(200 - 123.675)


def test_photos_cover_the_size(tmp_path):
    for name, shape in (("a.png", (40, 100)), ("b.png", (10, 8))):
        image = np.zeros((*shape, 3), np.uint8)
        image[..., 2] = 250  # red, as OpenCV writes
        image[:, : shape[1] // 4] = 0
        cv2.imwrite(str(tmp_path / name), image)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    images = inputs.read_images([str(tmp_path)], (32, 32), limit=5)
    assert (images.shape, images.dtype) == ((2, 3, 32, 32), torch.uint8)
    assert (images[0, 0] > 240).all()  # RGB; the crop is the centre
    assert len(inputs.read_images([str(tmp_path)], (32, 32), limit=1)) == 1
    for path, message in (
        ("notes.txt", "notes.txt cannot be read"),
        ("empty", "no images in .*em"),
    ):
        with pytest.raises(ConfigError, match=message):
            inputs.read_images([str(tmp_path / path)], (32, 32), limit=1)


def test_streams_of_jigsaw_images(tmp_path):
    store = make_store(tmp_path / "store", n_per_group=4)
    cfg = get_jigsaw_cfg("Base-JigsawPretrain.yaml", ["SEED", 5, "INPUT.FORMAT", "BGR"])
    batch = inputs.jigsaw_stream(cfg, store)[range(7, 12, 2)]
    assert batch["image"].shape == (3, 3, 224, 224)
    again = inputs.jigsaw_stream(cfg, store)[range(9, 10)]  # a function of position
    assert torch.equal(again["image"][0], batch["image"][1])
    rgb = inputs.rgb_stream(cfg, [str(tmp_path / "store")], seed=5)[range(9, 10)]
    assert torch.equal(rgb["image"][0].flip(0), batch["image"][1])
