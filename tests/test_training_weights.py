"""Backbone and passport out of a training checkpoint, and checkpoints that lack something."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_weights import THIN, pretrain_config, pretrained, save_checkpoint

from jigsaw_d2.weights.training_weights import TrainingWeightsError, from_training


@pytest.fixture()
def data(tmp_path: Path) -> dict:
    cfg = pretrain_config(*THIN)
    path = save_checkpoint(tmp_path / "c.pth", cfg, pretrained(cfg))
    return torch.load(path, weights_only=True)


def test_arrays_are_copies(data: dict) -> None:
    """Writing into the arrays leaves the checkpoint alone."""
    arrays, _ = from_training(data, "c.pth")
    arrays["stem.conv1.weight"][:] = 7
    assert not (data["model"]["backbone.stem.conv1.weight"] == 7).any()


@pytest.mark.parametrize(
    "remove",
    [
        lambda data: data["jigsaw"].pop("config"),
        lambda data: data["jigsaw"].pop("store"),
        lambda data: data["jigsaw"].pop("images_seen"),
        lambda data: data.pop("iteration"),
        lambda data: data["jigsaw"].update(config="{"),
        lambda data: data.update(jigsaw=3),
    ],
)
def test_what_a_passport_is_made_of_must_be_there(data: dict, remove: Callable) -> None:
    remove(data)
    with pytest.raises(TrainingWeightsError, match="c.pth: the checkpoint lacks"):
        from_training(data, "c.pth")


def test_tensors_of_no_stage(data: dict) -> None:
    """A ResNet's file never carries a name that could match in a head."""
    data["model"]["backbone.predictor.weight"] = torch.zeros(1)
    with pytest.raises(TrainingWeightsError, match="of no stage: .'predictor.weight'"):
        from_training(data, "c.pth")
