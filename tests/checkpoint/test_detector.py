"""A whole detector as a start: recognised, taken with its norm, loaded in every tensor or not."""

from pathlib import Path

import pytest
import torch
from helpers_weights import FPN, THIN, build_detector, randomise, small_detection_config

from jigsaw_d2.checkpoint.detector import ORIGIN, load_detector
from jigsaw_d2.checkpoint.reading import is_detector
from jigsaw_d2.detection.config import apply_metadata, read_metadata
from jigsaw_d2.io import CheckpointError, ConfigError, WeightsError

TRAINED = ("MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.STRIDE_IN_1X1", "False", *THIN)


def trained(folder: Path, *overrides: str) -> tuple[torch.nn.Module, Path]:
    """(detector, its checkpoint with config.yaml), as Detectron2's trainer leaves them."""
    cfg = small_detection_config(FPN, *TRAINED, *overrides)
    model = randomise(build_detector(cfg))
    (folder / "config.yaml").write_text(cfg.dump())
    path = folder / "model_final.pth"
    torch.save({"model": model.state_dict(), "optimizer": {"state": {}}, "iteration": 9}, path)
    return model, path


def test_every_tensor_is_taken_and_frozen_norms_take_those_that_trained(tmp_path: Path) -> None:
    model, path = trained(tmp_path)
    expected = model.state_dict()
    for norm in ("BN", "FrozenBN"):
        cfg = small_detection_config(FPN, *TRAINED, "MODEL.RESNETS.NORM", norm)
        other = build_detector(cfg, seed=2)
        load_detector(other, path)
        for name, value in other.state_dict().items():
            assert name.endswith("num_batches_tracked") or torch.equal(value, expected[name]), name


def test_another_detector_is_refused_in_words_and_nothing_loaded(tmp_path: Path) -> None:
    path = trained(tmp_path)[1]
    masks = ("MODEL.MASK_ON", "True", "MODEL.ROI_HEADS.NUM_CLASSES", "3")
    other = build_detector(small_detection_config(FPN, *TRAINED, *masks), seed=2)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_detector(other, path)
    assert "in the network, not in the file: roi_heads.mask_head" in str(error.value)
    # 80 classes and background in the file, 3 here
    assert "predictor.cls_score.bias: file (81,), network (4,)" in str(error.value)
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in before.items())
    load_detector(other, path, strict=False)
    assert torch.equal(
        other.state_dict()["backbone.fpn_lateral2.weight"],
        torch.load(path, weights_only=True)["model"]["backbone.fpn_lateral2.weight"],
    )


def test_the_config_beside_it_says_how_it_is_used(tmp_path: Path) -> None:
    path = trained(tmp_path, "MODEL.PIXEL_STD", "[2.0, 2.0, 2.0]")[1]
    metadata = read_metadata(path)
    assert (metadata.origin, metadata.architecture.norm, metadata.input_format) == (
        ORIGIN, "BN", "BGR",
    )  # fmt: skip
    assert len(metadata.digest) == 64 and metadata == read_metadata(path)

    def used(*overrides: str):
        cfg = small_detection_config(FPN, *THIN, *overrides)
        apply_metadata(cfg, metadata, explicit=frozenset(overrides[::2]))
        return cfg.MODEL

    model = used()  # the zoo's config says FrozenBN and stride in the 1x1
    assert (model.RESNETS.NORM, model.RESNETS.STRIDE_IN_1X1) == ("BN", False)
    assert model.PIXEL_STD == [2.0, 2.0, 2.0]
    assert used("MODEL.RESNETS.NORM", "FrozenBN").RESNETS.NORM == "FrozenBN"
    with pytest.raises(ConfigError, match="config GN, weights BN"):
        used("MODEL.RESNETS.NORM", "GN")


@pytest.mark.parametrize("content", [None, "MODEL: {}", "[", "MODEL: !!python/name:os.system"])
def test_a_detector_whose_config_is_missing_or_none(content: str | None, tmp_path: Path) -> None:
    path = trained(tmp_path)[1]
    config = tmp_path / "config.yaml"
    config.unlink() if content is None else config.write_text(content)
    with pytest.raises(CheckpointError, match="config.yaml must tell how its input was"):
        read_metadata(path)


def test_a_backbone_alone_is_no_detector() -> None:
    assert not is_detector(["backbone.stem.conv1.weight", "predictor.weight"])
    assert is_detector(["backbone.bottom_up.stem.conv1.weight", "head.cls_score.weight"])


@pytest.mark.parametrize("frozen", [True, False])
def test_a_detector_on_torchvisions_resnet_is_one_too(frozen: bool, tmp_path: Path) -> None:
    """Whose tensors end in the names of torchvision's ImageNet files."""
    name = ("MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone")
    name += ("MODEL.TORCHVISION.NAME", "resnet18")
    model, path = trained(tmp_path, *name, "MODEL.TORCHVISION.FREEZE_NORM", str(frozen))
    metadata = read_metadata(path)
    assert metadata.origin == ORIGIN
    cfg = small_detection_config(FPN, *TRAINED, *name)
    apply_metadata(cfg, metadata)
    assert cfg.MODEL.TORCHVISION.FREEZE_NORM is frozen
    other = build_detector(cfg, seed=2)
    load_detector(other, path)
    state = other.state_dict()
    assert all(torch.equal(value, state[n]) for n, value in model.state_dict().items())
