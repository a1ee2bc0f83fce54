"""The converter: what it accepts, writes, refuses; and that no altered file passes as whole."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import helpers_run  # noqa: F401  (registers build_tiny_backbone)
import numpy as np
import pytest
import torch
from helpers_weights import (
    CATEGORIES,
    THIN,
    convert,
    pretrain_config,
    pretrained,
    rewrite,
    save_checkpoint,
)

from jigsaw_d2.checkpoint.convert import convert_checkpoint
from jigsaw_d2.checkpoint.metadata import WeightsMetadata
from jigsaw_d2.checkpoint.reading import (
    METADATA_KEY,
    NOTE,
    metadata_path,
    read_backbone,
    read_converted,
)
from jigsaw_d2.checkpoint.weight_files import read_weights
from jigsaw_d2.io import CheckpointError, ConfigError, JigsawError, WeightsError


@pytest.fixture()
def checkpoint(tmp_path: Path) -> Path:
    cfg = pretrain_config(*THIN)
    return save_checkpoint(tmp_path / "model_0000009.pth", cfg, pretrained(cfg))


@pytest.mark.parametrize(("suffix", "kind"), [(".pkl", np.ndarray), (".pth", torch.Tensor)])
def test_what_a_converted_file_holds(
    suffix: str, kind: type, checkpoint: Path, tmp_path: Path
) -> None:
    """What Detectron2's own converters write: plain values, names without prefix."""
    weights = tmp_path / f"w{suffix}"
    convert_checkpoint(checkpoint, weights)
    if suffix == ".pkl":
        data = pickle.loads(weights.read_bytes())
    else:
        data = torch.load(weights, weights_only=True)
    assert data["__author__"] == "jigsaw_d2" and data["matching_heuristics"] is True
    assert {type(value) for value in data["model"].values()} == {kind}
    expected = backbone_tensors(torch.load(checkpoint, weights_only=True)["model"])
    notes = [name for name in data["model"] if name.startswith(NOTE)]
    assert len(notes) == 1 and not len(data["model"].pop(notes[0]))  # for Detectron2's own loading
    assert set(data["model"]) == set(expected)  # neither classifier nor ERF nor counters
    assert all(np.array_equal(data["model"][key], expected[key]) for key in expected)
    assert {name.split(".")[0] for name in expected} == {"stem", "res2", "res3", "res4", "res5"}


def backbone_tensors(state: dict) -> dict:
    return {
        name.removeprefix("backbone."): value
        for name, value in state.items()
        if name.startswith("backbone.") and "num_batches_tracked" not in name
    }


def test_the_metadata_says_all(checkpoint: Path, tmp_path: Path) -> None:
    metadata = convert_checkpoint(checkpoint, tmp_path / "w.pkl")
    assert (metadata.origin, metadata.categories) == ("jigsaw", tuple(CATEGORIES))
    assert (metadata.iterations, metadata.images_seen) == (10, 320)
    assert (metadata.objective, metadata.tau) == ("erf_adaptive", 0.7)
    assert metadata.template == {"size": [224, 224], "split": [64, 64]}
    assert (metadata.dataset, metadata.dataset_hash) == ("toy_train", "ab" * 32)
    architecture = metadata.architecture
    assert (architecture.depth, architecture.norm, architecture.stride_in_1x1) == (50, "BN", False)
    beside = WeightsMetadata.from_yaml((tmp_path / "w.pkl.yaml").read_text())
    assert beside == metadata == read_converted(tmp_path / "w.pkl")[1]


def test_a_folder_stands_for_its_last_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a folder without last_checkpoint"):
        convert_checkpoint(tmp_path, tmp_path / "w.pkl")
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth\n")
    assert convert_checkpoint(tmp_path, tmp_path / "w.pkl").iterations == 10
    (tmp_path / "last_checkpoint").write_text("model_0000019.pth")
    with pytest.raises(CheckpointError, match="model_0000019.pth: no such file"):
        convert_checkpoint(tmp_path, tmp_path / "other.pkl")


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "FrozenBN", "auto"])
def test_every_batch_norm_and_precision_converts(norm: str, tmp_path: Path) -> None:
    """A checkpoint of synchronised norm, made on many GPUs, in half precision, channels last."""
    cfg = pretrain_config(*THIN)
    model = pretrained(cfg).to(torch.bfloat16).to(memory_format=torch.channels_last)
    cfg.MODEL.RESNETS.NORM = norm
    convert_checkpoint(save_checkpoint(tmp_path / "c.pth", cfg, model), tmp_path / "w.pkl")
    arrays, metadata = read_converted(tmp_path / "w.pkl")
    assert metadata.architecture.norm == "BN" and "res2.0.conv1.norm.running_var" in arrays
    weight = arrays["res2.0.conv2.weight"]
    assert weight.dtype == np.float32 and weight.flags["C_CONTIGUOUS"]
    expected = model.backbone.res2[0].conv2.weight.float().detach().numpy()
    assert np.array_equal(weight, expected)


class TestOutputs:
    def test_refuses_to_overwrite(self, checkpoint: Path, tmp_path: Path) -> None:
        convert_checkpoint(checkpoint, tmp_path / "w.pkl")
        before = (tmp_path / "w.pkl").read_bytes()
        with pytest.raises(ConfigError, match="w.pkl exists; --force"):
            convert_checkpoint(checkpoint, tmp_path / "w.pkl")
        assert (tmp_path / "w.pkl").read_bytes() == before
        convert_checkpoint(checkpoint, tmp_path / "w.pkl", force=True)
        (tmp_path / "v.pkl.yaml").write_text("a user's own")
        with pytest.raises(ConfigError, match="v.pkl.yaml exists; --force"):
            convert_checkpoint(checkpoint, tmp_path / "v.pkl")
        assert not (tmp_path / "v.pkl").exists()

    def test_refuses_other_endings_and_formats(self, checkpoint: Path, tmp_path: Path) -> None:
        forms = (("w.onnx", "detectron2"), ("w.pkl", "torchvision"), ("w.pkl", "caffe"))
        for name, form in forms:
            with pytest.raises(ConfigError, match=f"{name}, format '{form}'.*written as .pkl or"):
                convert_checkpoint(checkpoint, tmp_path / name, format=form)
        assert os.listdir(tmp_path) == [checkpoint.name]


def test_converting_again_gives_the_same(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("a.pkl", "b.pkl"):
        convert_checkpoint(checkpoint, tmp_path / name)
    assert (tmp_path / "a.pkl").read_bytes() == (tmp_path / "b.pkl").read_bytes()
    again = convert_checkpoint(tmp_path / "a.pkl", tmp_path / "c.pth")
    assert again == read_converted(tmp_path / "a.pkl")[1]


class TestForeignInputs:
    @pytest.mark.parametrize(
        ("held", "message"),
        [
            (
                {"model": {"roi_heads.x": torch.zeros(1), "backbone.res2.x": torch.zeros(1)}},
                "found 2 tensors.*expected a checkpoint of Jigsaw",
            ),
            ([1, 2], "found a list"),
        ],
    )
    def test_other_things(self, held: object, message: str, tmp_path: Path) -> None:
        torch.save(held, tmp_path / "d.pth")
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(tmp_path / "d.pth", tmp_path / "w.pkl")

    def test_a_checkpoint_with_code_in_it(self, checkpoint: Path, tmp_path: Path) -> None:
        """Refused, and readable with trust."""
        data = torch.load(checkpoint, weights_only=True)
        torch.save(data | {"path": tmp_path}, checkpoint)
        with pytest.raises(CheckpointError, match="could run code"):
            convert_checkpoint(checkpoint, tmp_path / "w.pkl")
        convert_checkpoint(checkpoint, tmp_path / "w.pkl", trust=True)

    def test_weights_without_metadata(self, checkpoint: Path, tmp_path: Path) -> None:
        torch.save({"model": {}}, tmp_path / "w.pth")
        for path in (tmp_path / "w.pth", checkpoint):  # nothing vouches for a checkpoint's tensors
            with pytest.raises(CheckpointError, match="without metadata.*convert_weights.py --inp"):
                read_converted(path)


class TestVersion1:
    """Files of version 1 have their metadata as jigsaw_passport, in both formats."""

    @pytest.mark.parametrize("form", ["w.pkl", "w.pth", "tv.pth"])
    def test_opens(self, form: str, tmp_path: Path) -> None:
        weights = tmp_path / form
        format = "torchvision" if form == "tv.pth" else "detectron2"
        convert_checkpoint(convert(tmp_path, name="first.pkl"), weights, format=format)
        expected = read_converted(weights)
        data = read_weights(weights)
        values = data._metadata if format == "torchvision" else data
        values["jigsaw_passport"] = values.pop(METADATA_KEY)
        if form == "w.pkl":
            weights.write_bytes(pickle.dumps(data))
        else:
            torch.save(data, weights)
        arrays, metadata = read_converted(weights)
        assert metadata == expected[1]
        assert all(np.array_equal(arrays[name], expected[0][name]) for name in expected[0])


STRAY = {"backbone.predictor.weight": torch.zeros(1)}  # a name that could match in a head
NAN = float("nan")


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda data: data["jigsaw"].pop("config"), "0009.pth: the checkpoint lacks"),
        (lambda data: data.pop("iteration"), "0009.pth: the checkpoint lacks"),
        (lambda data: data["jigsaw"].update(config="{"), "0009.pth: the checkpoint lacks"),
        (lambda data: data.update(jigsaw=3), "0009.pth: the checkpoint lacks"),
        (lambda data: data["model"].update(STRAY), "of no stage: .'predictor.weight'"),
        (
            lambda data: data["model"]["backbone.res3.0.conv1.weight"].fill_(NAN),
            "NaN or infinity, the first is res3.0.conv1.weight",
        ),
    ],
)
def test_checkpoints_that_cannot_be_converted(
    checkpoint: Path, alter: Callable, message: str
) -> None:
    data = torch.load(checkpoint, weights_only=True)
    alter(data)
    torch.save(data, checkpoint)
    with pytest.raises((CheckpointError, WeightsError), match=message):
        read_backbone(checkpoint)


def change(key: str, value: object, part: str | None = None) -> Callable[[dict], None]:
    def apply(data: dict) -> None:
        metadata = data[METADATA_KEY]
        (metadata[part] if part else metadata)[key] = value

    return apply


MUTATIONS = {
    "mean": change("pixel_mean", [103.53, 116.28, 123.675]),
    "std": change("pixel_std", [1.0, 1.0, 1.0]),
    "order": change("input_format", "BGR"),
    "stride": change("stride_in_1x1", True, "architecture"),
    "depth": change("depth", 101, "architecture"),
    "norm": change("norm", "GN", "architecture"),
    "missing tensor": lambda data: data["model"].pop("res4.5.conv3.weight"),
    "extra tensor": lambda data: data["model"].update({"res4.9.x": np.zeros(1, np.float32)}),
    "wrong shape": lambda data: data["model"].update({"res4.5.conv3.weight": np.zeros((2, 2))}),
    "other values": lambda data: data["model"]["res2.0.conv1.weight"].__imul__(1.01),
    "categories": change("categories", CATEGORIES[::-1]),
    "iterations": change("iterations", 64000),
}


class TestMutations:
    """A file is refused whatever was altered in it: by what the tensors are, or by the seal."""

    @pytest.mark.parametrize("name", MUTATIONS)
    def test_altered(self, name: str, tmp_path: Path) -> None:
        weights = rewrite(convert(tmp_path, *THIN), MUTATIONS[name])
        with pytest.raises((CheckpointError, WeightsError)):
            read_converted(weights)
        with pytest.raises(JigsawError):
            convert_checkpoint(weights, tmp_path / "again.pkl")

    @pytest.mark.parametrize("name", ["depth", "norm"])
    def test_a_liar_with_a_seal_is_betrayed_by_the_tensors(self, name: str, tmp_path: Path) -> None:
        weights = rewrite(convert(tmp_path, *THIN), MUTATIONS[name], seal=True)
        with pytest.raises(WeightsError, match=f"{name}: said"):
            read_converted(weights)

    @pytest.mark.parametrize("name", ["mean", "depth"])
    def test_another_yaml_beside_the_file(self, name: str, tmp_path: Path) -> None:
        weights = convert(tmp_path, *THIN)
        data = read_weights(weights)
        MUTATIONS[name](data)
        beside = WeightsMetadata.from_dict(data[METADATA_KEY])
        metadata_path(weights).write_text(beside.to_yaml())
        with pytest.raises(CheckpointError, match="say different things"):
            read_converted(weights)
        metadata_path(weights).unlink()
        read_converted(weights)


def test_a_users_own_backbone_passes_with_all_its_tensors(tmp_path: Path) -> None:
    cfg = pretrain_config("MODEL.BACKBONE.NAME", "build_tiny_backbone")
    model = pretrained(cfg)
    cfg.MODEL.RESNETS.NORM = "auto"
    convert_checkpoint(save_checkpoint(tmp_path / "c.pth", cfg, model), tmp_path / "w.pkl")
    arrays, metadata = read_backbone(tmp_path / "w.pkl")
    assert set(arrays) == set(backbone_tensors(model.state_dict()))
    required = {"INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"}
    assert set(metadata.required_config()) == required
    with pytest.raises(WeightsError, match="backbone is build_tiny_backbone"):
        convert_checkpoint(tmp_path / "w.pkl", tmp_path / "tv.pth", format="torchvision")
