"""Detectron2's dataset mapper over images that are arrays of any number of channels."""

import copy
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from jigsaw_d2.data.arrays import make_reader
from jigsaw_d2.io import ConfigError, DataError


class ArrayMapper(DatasetMapper):
    """As Detectron2's, in these steps:

    1. read the array as INPUT.FORMAT and INPUT.READER say, as float32: Detectron2 resizes uint8 by
       Pillow, which would take a fourth channel for transparency;
    2. augment it and the annotations; 3. keep boxes, masks and keypoints as the config asks.
    """

    def __init__(self, cfg: CfgNode, is_train: bool = True) -> None:
        super().__init__(cfg, is_train)
        self._reader = make_reader(cfg)
        if cfg.MODEL.LOAD_PROPOSALS or cfg.MODEL.META_ARCHITECTURE in (
            "PanopticFPN",
            "SemanticSegmentor",
        ):
            raise ConfigError(
                f"INPUT.FORMAT {cfg.INPUT.FORMAT}: arrays are for detectors with boxes, masks or "
                "keypoints, without proposals from files or semantic segmentation"
            )

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            dataset_dict: one record of a dataset, which stays as it is.

        Returns:
            Its copy with "image", float32 (C, H, W), and in training "instances".
        """
        record = copy.deepcopy(dataset_dict)
        try:
            image = self._reader(record["file_name"]).astype(np.float32)
        except DataError as error:
            raise DataError(f"{record['file_name']}: {error}") from None
        utils.check_image_size(record, image)
        augmented = T.AugInput(image)
        transforms = self.augmentations(augmented)
        image = augmented.image
        record["image"] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            self._transform_annotations(record, transforms, image.shape[:2])
        return record
