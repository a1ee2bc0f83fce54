"""What tensors say about their network, against what a config says."""

import pytest
from detectron2.modeling import build_backbone
from helpers_weights import RESNET_18, pretrain_config

from jigsaw_d2.weights.architecture import (
    Architecture,
    ArchitectureError,
    check_architecture,
    norm_family,
    read_architecture,
)

DEFORM = ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, False, True, True]"]


def shapes_of(*overrides: str) -> dict[str, tuple[int, ...]]:
    cfg = pretrain_config(*overrides)
    return {name: tuple(v.shape) for name, v in build_backbone(cfg).state_dict().items()}


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        RESNET_18,
        ["MODEL.RESNETS.NORM", "GN"],
        ["MODEL.RESNETS.NUM_GROUPS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "4"],
        DEFORM,
        ["MODEL.RESNETS.DEPTH", "101", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"],
    ],
)
def test_tensors_and_config_agree(overrides: list[str]) -> None:
    said = Architecture.from_config(pretrain_config(*overrides).MODEL)
    found = read_architecture(shapes_of(*overrides))
    check_architecture(said, shapes_of(*overrides))
    assert {key: getattr(said, key) for key in found} == found


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["MODEL.RESNETS.DEPTH", "101"], "depth: said 101, the tensors are 50"),
        (["MODEL.RESNETS.NORM", "GN"], "norm: said GN, the tensors are BN"),
        (["MODEL.RESNETS.NUM_GROUPS", "2"], "num_groups: said 2, the tensors are 1"),
        (["MODEL.RESNETS.STEM_OUT_CHANNELS", "32"], "stem_out_channels: said 32"),
        (DEFORM, "deform_on_per_stage"),
    ],
)
def test_a_wrong_word_is_found_out(overrides: list[str], named: str) -> None:
    said = Architecture.from_config(pretrain_config(*overrides).MODEL)
    with pytest.raises(ArchitectureError, match=named):
        check_architecture(said, shapes_of())


def test_other_norms_than_batch_norm_look_like_group_norm() -> None:
    """Layer norm has the same tensors as group norm; batch norm or none at all has not."""
    shapes = shapes_of("MODEL.RESNETS.NORM", "GN")
    check_architecture(Architecture.from_config(pretrain_config(*_norm("LN")).MODEL), shapes)
    for norm in ("BN", ""):
        with pytest.raises(ArchitectureError, match="norm"):
            check_architecture(
                Architecture.from_config(pretrain_config(*_norm(norm)).MODEL), shapes
            )


def _norm(name: str) -> list[str]:
    return ["MODEL.RESNETS.NORM", name]


def test_a_missing_block_is_no_depth() -> None:
    shapes = {name: s for name, s in shapes_of().items() if not name.startswith("res4.5.")}
    with pytest.raises(ArchitectureError, match=r"\(3, 4, 5, 3\) bottleneck blocks"):
        read_architecture(shapes)


def test_foreign_tensors() -> None:
    with pytest.raises(ArchitectureError, match="no ResNet.*found fc.weight"):
        read_architecture({"fc.weight": (10, 4)})


def test_a_network_cut_short_keeps_its_depth() -> None:
    """A pre-training on res4 builds no res5."""
    shapes = {name: s for name, s in shapes_of().items() if not name.startswith("res5.")}
    assert read_architecture(shapes)["depth"] == 50


def test_batch_norms_are_one_family() -> None:
    assert {norm_family(norm) for norm in ("BN", "SyncBN", "FrozenBN")} == {"BN"}
    assert norm_family("GN") == "GN"


def test_a_registered_backbone_is_known_by_name_alone() -> None:
    model = pretrain_config("MODEL.BACKBONE.NAME", "build_mine").MODEL
    said = Architecture.from_config(model)
    assert said == Architecture(backbone="build_mine") and not said.is_resnet
    assert said.config_keys() == {}
    check_architecture(said, {"any.weight": (1,)})


def test_dict_round_trip_and_unknown_keys() -> None:
    said = Architecture.from_config(pretrain_config().MODEL)
    assert Architecture.from_dict(said.to_dict()) == said
    with pytest.raises(ArchitectureError, match="unknown keys.*colour"):
        Architecture.from_dict({"colour": 3})


def test_config_keys_leave_out_what_a_basic_block_lacks() -> None:
    keys = Architecture.from_config(pretrain_config(*RESNET_18).MODEL).config_keys()
    assert "MODEL.RESNETS.WIDTH_PER_GROUP" not in keys
    assert keys["MODEL.RESNETS.RES2_OUT_CHANNELS"] == 64
