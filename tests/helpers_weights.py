"""Checkpoints, detectors and data of toy size for the tests of the hand-over."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from helpers_coco import annotation
from torch import nn

import jigsaw_d2.modeling.meta_arch  # noqa: F401  (registers JigsawPretrainer)
from jigsaw_d2.checkpoint.convert import convert_checkpoint
from jigsaw_d2.checkpoint.metadata import WeightsMetadata
from jigsaw_d2.checkpoint.reading import METADATA_KEY, NOTE, metadata_path
from jigsaw_d2.checkpoint.weight_files import read_weights
from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.detection.config import load_detection_config

# A ResNet-50 (or 101) in form with an eighth of its channels.
THIN = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "8"),
]
# Detector settings that only make it small: few proposals, thin heads, 64-pixel images.
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "20", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "8"),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", "20", "MODEL.RPN.POST_NMS_TOPK_TEST", "8"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "4", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "8"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "8", "INPUT.MIN_SIZE_TRAIN", "(64,)"),
    *("INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TRAIN", "96", "INPUT.MAX_SIZE_TEST", "96"),
    *("SOLVER.IMS_PER_BATCH", "1", "DATALOADER.NUM_WORKERS", "0"),
]
# The same for group norm, whose 32 groups ask for more.
THIN_GN = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "32"),
]
RESNET_18 = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
C4 = "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"
FPN = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
MASK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
CATEGORIES = ["cell", "plate", "rod"]


def pretrain_config(*overrides: str) -> CfgNode:
    """Configuration of a Jigsaw pre-training on the CPU, three categories, batch norm."""
    settings = ["MODEL.RESNETS.NORM", "BN", "MODEL.DEVICE", "cpu", "MODEL.JIGSAW.NUM_CLASSES", "3"]
    return get_jigsaw_cfg("jigsaw_R_50.yaml", [*settings, *overrides])


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norm tensors away from 0 and 1, so that a mix-up shows; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if "norm" in name and value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(0.8 + 0.4 * noise if name.endswith(("weight", "var")) else 0.2 * noise)
        elif "conv2_offset" in name:
            value.copy_(0.02 * torch.randn(value.shape, generator=generator))
    return model.eval()


def pretrained(cfg: CfgNode, seed: int = 0) -> nn.Module:
    """A ``JigsawPretrainer`` with all stages visible and every tensor different, in eval mode."""
    cfg = cfg.clone()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    torch.manual_seed(seed)
    return randomise(build_model(cfg), seed)


def save_checkpoint(path: Path, cfg: CfgNode, model: nn.Module, **extra: object) -> Path:
    """A checkpoint of the form that the trainer writes."""
    store = {"categories": CATEGORIES, "dataset": "toy_train", "image_ids_hash": "ab" * 32}
    jigsaw = {"config": cfg.dump(), "store": store, "images_seen": 320, "code_version": "0.1.0"}
    torch.save({"model": model.state_dict(), "iteration": 9, "jigsaw": jigsaw | extra}, path)
    return path


def convert(folder: Path, *overrides: str, name: str = "weights.pkl", seed: int = 0) -> Path:
    """Converted weights of an untrained pre-training model with these overrides."""
    return convert_model(folder, *overrides, name=name, seed=seed)[1]


def convert_model(
    folder: Path, *overrides: str, name: str = "weights.pkl", seed: int = 0
) -> tuple[nn.Module, Path]:
    """The model too."""
    cfg = pretrain_config(*overrides)
    model = pretrained(cfg, seed)
    checkpoint = save_checkpoint(folder / "model_final.pth", cfg, model)
    convert_checkpoint(checkpoint, folder / name, force=True)
    return model, folder / name


def rewrite(weights: Path, change: Callable[[dict], None], seal: bool = False) -> Path:
    """Alter what a converted ``.pkl`` holds; ``seal`` makes a new digest, as a liar would."""
    data = read_weights(weights)
    change(data)
    if seal:
        tensors = {name: v for name, v in data["model"].items() if not name.startswith(NOTE)}
        metadata = WeightsMetadata.from_dict(data[METADATA_KEY]).sealed(tensors)
        data[METADATA_KEY] = metadata.to_dict()
    weights.write_bytes(pickle.dumps(data))
    metadata_path(weights).unlink(missing_ok=True)
    return weights


def build_detector(cfg: CfgNode, seed: int = 1) -> nn.Module:
    """An untrained detector, in eval mode."""
    torch.manual_seed(seed)
    return build_model(cfg).eval()


def small_detection_config(name: str, *overrides: str) -> CfgNode:
    """A detection config with ``SMALL`` settings."""
    return load_detection_config(name, [*SMALL, *overrides])


def make_coco(folder: Path, images: int = 4, masks: bool = True, seed: int = 0) -> list[list[str]]:
    """A COCO-format set of dark 64-pixel images, two bright boxes each; as COCO_FILES lists it."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    records, annotations = [], []
    for i in range(images):
        picture = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
        for j in range(2):
            x, y = (int(v) for v in rng.integers(2, 30, 2))
            picture[y : y + 20, x : x + 24] = 180 + 20 * j
            one = annotation(i + 1, [x, y, 24, 20], j + 1) | {"id": len(annotations) + 1}
            square = [[x, y, x + 24, y, x + 24, y + 20, x, y + 20]]
            annotations.append(one | {"area": 480} | ({"segmentation": square} if masks else {}))
        cv2.imwrite(str(folder / "images" / f"{i}.png"), picture)
        records.append({"id": i + 1, "file_name": f"{i}.png", "height": 64, "width": 64})
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(CATEGORIES)]
    data = {"images": records, "annotations": annotations, "categories": categories}
    (folder / "train.json").write_text(json.dumps(data))
    return [[f"{folder.name}_set", str(folder / "train.json"), str(folder / "images")]]
