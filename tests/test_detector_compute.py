"""What enters a detector's backbone is counted: the right images, with their padding, once."""

import pytest
import torch
from detectron2.modeling import GeneralizedRCNNWithTTA
from helpers_weights import FPN, THIN, build_detector, small_detection_config

from jigsaw_d2.cost import backbone_flops
from jigsaw_d2.detection.detector_compute import counted_images, record_compute, unwrapped

# Padded to one size and to a multiple of 32: two of 64 x 64.
IMAGES = [{"image": torch.zeros(3, 40, 60)}, {"image": torch.zeros(3, 64, 33)}]


def test_images_are_counted_with_their_padding() -> None:
    detector = build_detector(small_detection_config(FPN, *THIN))
    with counted_images(detector, training=False) as count:
        detector(IMAGES)
    detector(IMAGES)  # outside: not counted
    assert (count.images, count.pixels) == (2, 2 * 64 * 64)
    with counted_images(detector, training=True) as count:
        detector(IMAGES)  # evaluation within training: not a training image
    assert count.images == 0


def test_flops_are_the_backbones_per_pixel(tmp_path) -> None:
    detector = build_detector(small_detection_config(FPN, *THIN))
    with counted_images(detector, training=False) as count:
        detector(IMAGES)
    expected = backbone_flops(detector.backbone, 64, 64) * 2
    assert count.flops_per_pixel * count.pixels == pytest.approx(expected, rel=1e-3)
    record_compute(str(tmp_path), "evaluation", count, seconds=2.0, forwards=1)
    text = (tmp_path / "cost.json").read_text()
    assert '"images": 2' in text and '"seconds": 2.0' in text


def test_nothing_counted_is_nothing_recorded(tmp_path) -> None:
    detector = build_detector(small_detection_config(FPN, *THIN))
    with counted_images(detector, training=False) as count:
        pass
    record_compute(str(tmp_path), "evaluation", count, seconds=2.0, forwards=1)
    assert not (tmp_path / "cost.json").exists()


def test_wrappers_are_seen_through() -> None:
    cfg = small_detection_config(FPN, *THIN)
    detector = build_detector(cfg)
    assert unwrapped(GeneralizedRCNNWithTTA(cfg, detector)) is detector is unwrapped(detector)
