"""The backbone and the passport in a checkpoint of Jigsaw pre-training."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import yaml

from jigsaw_d2.config import AUTO_NORM
from jigsaw_d2.errors import JigsawError
from jigsaw_d2.weights.architecture import Architecture, read_architecture
from jigsaw_d2.weights.imagenet_weights import RESNET_NAME, to_array
from jigsaw_d2.weights.passport import Passport

_BACKBONE = "backbone."


class TrainingWeightsError(JigsawError, ValueError):
    """A checkpoint that lacks what its passport needs."""


def from_training(data: Mapping[str, Any], where: str) -> tuple[dict[str, np.ndarray], Passport]:
    """Backbone (names without prefix, float32) and passport of a checkpoint.

    Classifier, ERF buffers and the counters of batch norm are left out.

    Args:
        data: what the trainer writes; of it ``model``, ``jigsaw`` and ``iteration`` are read.
        where: opens the message of an error.

    Raises:
        TrainingWeightsError: a key is missing, or the ResNet holds tensors of no stage.
    """
    arrays = {
        name.removeprefix(_BACKBONE): to_array(value)
        for name, value in data["model"].items()
        if name.startswith(_BACKBONE) and not name.endswith("num_batches_tracked")
    }
    try:
        passport = _passport(data)
    except (KeyError, TypeError, yaml.YAMLError) as error:
        raise TrainingWeightsError(
            f"{where}: the checkpoint lacks what a passport is made of ({error!r}); was it written "
            "by train_net.py?"
        ) from None
    architecture = passport.architecture
    if architecture.is_resnet:
        stray = [name for name in arrays if not RESNET_NAME.match(name)]
        if stray:
            raise TrainingWeightsError(
                f"{where}: the ResNet holds tensors of no stage: {stray[:4]}"
            )
        if architecture.norm == AUTO_NORM:  # chosen when training started
            found = read_architecture({name: array.shape for name, array in arrays.items()})
            passport = replace(passport, architecture=replace(architecture, norm=found["norm"]))
    return arrays, passport


def _passport(data: Mapping[str, Any]) -> Passport:
    record = data["jigsaw"]
    config = yaml.safe_load(record["config"])
    model, inputs, store = config["MODEL"], config["INPUT"], record["store"]
    return Passport(
        origin="jigsaw",
        architecture=Architecture.from_config(model),
        input_format=inputs["FORMAT"],
        pixel_mean=tuple(float(v) for v in model["PIXEL_MEAN"]),
        pixel_std=tuple(float(v) for v in model["PIXEL_STD"]),
        categories=tuple(store["categories"]),
        template={
            "size": [int(v) for v in inputs["JIGSAW"]["TEMPLATE_SIZE"]],
            "split": [int(v) for v in inputs["JIGSAW"]["TEMPLATE_SPLIT"]],
        },
        objective=str(model["JIGSAW"]["OBJECTIVE"]),
        tau=float(model["JIGSAW"]["TAU"]),
        iterations=int(data["iteration"]) + 1,
        images_seen=int(record["images_seen"]),
        dataset=str(store["dataset"]),
        dataset_hash=str(store["image_ids_hash"]),
        code_version=str(record["code_version"]),
    )
