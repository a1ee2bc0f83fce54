"""``python -m jigsaw_d2 erf``: any Detectron2 config, noise or images; files and words."""

import json

import cv2
import numpy as np
import pytest
import torch
from helpers_networks import TINY_RESNET, tiny_fpn
from helpers_weights import FPN

from jigsaw_d2.__main__ import main
from jigsaw_d2.modeling.erf import erf_maps
from jigsaw_d2.visualization.inputs import random_images


def erf(folder, *arguments, opts=()):
    command = ["erf", "--config-file", FPN, "--device", "cpu", "--output", str(folder)]
    tiny = [*map(str, TINY_RESNET), "MODEL.FPN.OUT_CHANNELS", "8"]
    return main([*command, *arguments, "--opts", *tiny, *opts])


def test_pyramid_of_the_zoo_on_noise(tmp_path, capsys):
    weights, network = tmp_path / "detector.pth", tiny_fpn(seed=3)
    tensors = {f"backbone.{k}": v for k, v in network.state_dict().items()}
    torch.save({"model": tensors}, weights)
    options = ["--feature", "p4", "--size", "64", "96", "--num-images", "2"]
    assert erf(tmp_path, *options, "--weights", str(weights), "--save-maps") == 0
    printed = capsys.readouterr().out
    assert "absolute value" in printed and "p4: 4x6 cells, stride 16" in printed
    report = json.loads((tmp_path / "erf.json").read_text())
    assert report["input"] == "standard normal noise" and len(report["cells"]) == 9
    assert (tmp_path / "erf.png").stat().st_size > 10_000
    maps = np.load(tmp_path / "erf.npz")
    assert maps["cells"].tolist()[4] == [2, 3]
    expected = erf_maps(network, random_images(2, (64, 96)), [(2, 3)], "p4")
    np.testing.assert_allclose(maps["maps"][4], expected[0], rtol=1e-4, atol=1e-7)


def test_real_images_and_one_cell(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "b.jpg"):
        cv2.imwrite(str(tmp_path / name), rng.integers(0, 256, (50, 70, 3), np.uint8))
    options = ["--feature", "p5", "--size", "64", "64", "--cells", "centre", "--grad", "relu"]
    assert erf(tmp_path, *options, "--images", str(tmp_path), "--seed", "1") == 0
    printed = capsys.readouterr().out
    assert "positive part" in printed and "averaged over 2 image(s)" in printed
    assert len(json.loads((tmp_path / "erf.json").read_text())["cells"]) == 1
    four = ("MODEL.PIXEL_MEAN", "[1, 1, 1, 1]")
    assert erf(tmp_path, *options, opts=four) == 0
    assert erf(tmp_path, *options, "--images", str(tmp_path), opts=four) == 2
    assert "4: measure it on noise" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["p9"], "p2, p3, p4, p5, p6"),
        (["p4", "--size", "50", "64"], "multiples of 32"),
        (["p4", "--num-images", "0"], "must be positive"),
        (["p4", "--weights", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_mistakes_in_one_line(tmp_path, capsys, options, message):
    assert erf(tmp_path, "--feature", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
