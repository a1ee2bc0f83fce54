"""The passport's form, its demands and its seal."""

from dataclasses import replace

import numpy as np
import pytest
import yaml
from helpers_weights import pretrain_config

from jigsaw_d2.weights.architecture import Architecture
from jigsaw_d2.weights.passport import Passport, PassportError, compare_passports

ARRAYS = {"stem.conv1.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}


def passport(**changes: object) -> Passport:
    made = Passport(
        origin="jigsaw",
        architecture=Architecture.from_config(pretrain_config().MODEL),
        input_format="RGB",
        pixel_mean=(123.675, 116.28, 103.53),
        pixel_std=(58.395, 57.12, 57.375),
        categories=("a", "b"),
        template={"size": [224, 224], "split": [64, 64]},
        objective="erf_adaptive",
        tau=0.7,
        iterations=10,
        images_seen=5120,
        dataset="toy",
        dataset_hash="00",
        code_version="0.1.0",
    )
    return replace(made, **changes)


def test_round_trips() -> None:
    made = passport().sealed(ARRAYS)
    assert Passport.from_dict(made.to_dict()) == made
    assert Passport.from_yaml(made.to_yaml()) == made
    yaml.safe_load(made.to_yaml())  # plain values only


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2, this code reads 1"),
        ({"origin": "moon"}, "origin 'moon'"),
        ({"input_format": "YUV"}, "neither RGB nor BGR"),
        ({"pixel_std": [1.0, 1.0, 0.0]}, "every std positive"),
        ({"pixel_mean": [1.0]}, "equally long"),
        ({"pixel_mean": "red"}, "could not convert"),
        ({"colour": 1}, r"unknown keys \['colour'\]"),
        ({"architecture": {"shape": 1}}, "unknown keys"),
    ],
)
def test_impossible_values(change: dict, message: str) -> None:
    with pytest.raises(PassportError, match=message):
        Passport.from_dict(passport().to_dict() | change)


def test_missing_key_and_no_mapping() -> None:
    values = passport().to_dict()
    del values["categories"]
    with pytest.raises(PassportError, match=r"w.pkl: missing keys \['categories'\]"):
        Passport.from_dict(values, "w.pkl")
    with pytest.raises(PassportError, match="expected a mapping, found list"):
        Passport.from_dict([], "w.pkl")
    with pytest.raises(PassportError, match="no YAML"):
        Passport.from_yaml("{")


def test_demands() -> None:
    """Batch norm is frozen in detection (Sec. 4.1), group norm stays."""
    demands = passport().demands()
    assert demands["MODEL.RESNETS.NORM"] == "FrozenBN"
    assert demands["INPUT.FORMAT"] == "RGB"
    assert demands["MODEL.PIXEL_STD"] == [58.395, 57.12, 57.375]
    assert demands["MODEL.RESNETS.STRIDE_IN_1X1"] is False
    group = passport(architecture=replace(passport().architecture, norm="GN"))
    assert group.demands()["MODEL.RESNETS.NORM"] == "GN"


@pytest.mark.parametrize(
    "change",
    [
        {"pixel_mean": (103.53, 116.28, 123.675)},
        {"pixel_std": (1.0, 1.0, 1.0)},
        {"input_format": "BGR"},
        {"architecture": Architecture()},
        {"iterations": 11},
        {"categories": ("b", "a")},
    ],
)
def test_seal_breaks_with_any_word(change: dict) -> None:
    sealed = passport().sealed(ARRAYS)
    sealed.check_seal(ARRAYS)
    with pytest.raises(PassportError, match="changed after they were written"):
        replace(sealed, **change).check_seal(ARRAYS)


@pytest.mark.parametrize(
    "arrays",
    [
        {"stem.conv1.weight": np.arange(6, dtype=np.float32).reshape(3, 2)},
        {"stem.conv1.weight": np.arange(1, 7, dtype=np.float32).reshape(2, 3)},
        {"stem.conv2.weight": ARRAYS["stem.conv1.weight"]},
        {},
        ARRAYS | {"more": np.zeros(1, np.float32)},
    ],
)
def test_seal_breaks_with_any_tensor(arrays: dict) -> None:
    with pytest.raises(PassportError, match="changed after they were written"):
        passport().sealed(ARRAYS).check_seal(arrays)


def test_compare_names_both_values() -> None:
    assert compare_passports(passport(), passport(input_format="BGR")) == [
        "input_format: RGB / BGR"
    ]
    assert compare_passports(passport(), passport()) == []
