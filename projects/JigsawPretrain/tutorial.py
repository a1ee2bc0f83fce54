#!/usr/bin/env python
"""Jigsaw pre-training step by step, from boxes to a detector, in about a minute of a CPU.

Read it from top to bottom: each function is one step of the paper, and prints what it made.

    python projects/JigsawPretrain/tutorial.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from benchmark.demo_data import DemoOptions, make_demo_set
from jigsaw_d2.checkpoint.convert import convert_checkpoint
from jigsaw_d2.checkpoint.loading import load_backbone
from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.data.build import build_jigsaw_train_loader
from jigsaw_d2.data.extraction import ExtractionOptions, extract_samples
from jigsaw_d2.data.samples import GROUPS
from jigsaw_d2.data.sources import CocoSource
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.detection.config import setup_finetune
from jigsaw_d2.engine.trainer import JigsawTrainer
from jigsaw_d2.modeling import losses
from jigsaw_d2.modeling.erf import erf_region_sums, region_weights
from jigsaw_d2.modeling.meta_arch import JigsawPretrainer
from jigsaw_d2.tools.pipeline import DetectionSet


def step_1_samples(folder: Path) -> tuple[DetectionSet, SampleStore]:
    """Sec. 3.1: every annotated box, enlarged at random, becomes a sample; so do empty places."""
    options = DemoOptions(train_images=24, val_images=4)
    data = make_demo_set(folder / "set", options)
    source = CocoSource(data.train_json, data.train_images)
    # workers=0: in this process, so that this script needs no main guard on any platform
    extract_samples(source, folder / "store", ExtractionOptions(workers=0, overwrite=True))
    store = SampleStore(folder / "store")
    shapes = [GROUPS[code] for code in store.groups]
    print(
        f"1. {len(store)} samples of {len(store.categories)} classes and background; square-like,"
    )
    print(f"   tall and wide: {[shapes.count(group) for group in GROUPS]}")
    return data, store


def step_2_config(folder: Path) -> CfgNode:
    """The paper's settings, shrunk: ResNet-18, Jigsaw images of 96 x 96 pixels, 8 steps."""
    cfg = get_jigsaw_cfg("jigsaw_R_18_cpu.yaml")
    cfg.DATASETS.TRAIN = (str(folder / "store"),)
    cfg.INPUT.JIGSAW.TEMPLATE_SIZE = [96, 96]
    cfg.INPUT.JIGSAW.TEMPLATE_SPLIT = [32, 32]
    cfg.MODEL.JIGSAW.ERF.NUM_IMAGES = 4
    cfg.MODEL.JIGSAW.ERF.PERIOD = 4
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.SOLVER.MAX_ITER = 8
    cfg.SOLVER.WARMUP_ITERS = 2
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.OUTPUT_DIR = str(folder / "pretrain")
    print(
        f"2. template {cfg.INPUT.JIGSAW.TEMPLATE_SIZE}, split at {cfg.INPUT.JIGSAW.TEMPLATE_SPLIT}"
    )
    return cfg


def step_3_jigsaw_images(cfg: CfgNode, store: SampleStore) -> dict:
    """Sec. 3.2: two square-like samples, a tall and a wide one, in one image."""
    batch = next(iter(build_jigsaw_train_loader(cfg, store=store)))
    names = [*store.categories, "background"]
    shown = [names[c] for c in batch["gt_classes"][0].tolist()]
    print(f"3. a batch {tuple(batch['image'].shape)}; the first image shows, R1 to R4: {shown}")
    return batch


def step_4_soft_labels(cfg: CfgNode, model: JigsawPretrainer, batch: dict) -> None:
    """Sec. 3.3: where a cell sees beyond its region, the neighbours' labels join in (Eq. 1-2)."""
    template = JigsawTemplate(*cfg.INPUT.JIGSAW.TEMPLATE_SIZE, *cfg.INPUT.JIGSAW.TEMPLATE_SPLIT)
    images = model.preprocess(batch["image"])
    sums = erf_region_sums(model.backbone, images, template)
    regions = template.cell_regions(stride=32)
    weights = region_weights(sums, regions, cfg.MODEL.JIGSAW.TAU)
    print(f"4. cell (0, 0) is in R1; its ERF over R1..R4: {rounded(sums[0, 0] / sums[0, 0].sum())}")
    print(f"   so the weights of its four labels are {rounded(weights[:, 0, 0])}")
    labels = losses.soft_labels(weights, batch["gt_classes"], model.num_classes + 1)
    assert torch.allclose(labels.sum(1), torch.ones_like(labels[:, 0]))
    with torch.no_grad():
        logits = model.cell_logits(images)
    loss = losses.erf_adaptive_loss(logits, batch["gt_classes"], weights, regions)
    print(f"   loss of the untrained network: {loss:.3f}")


def rounded(values: torch.Tensor) -> list[float]:
    """For printing."""
    return [round(float(value), 3) for value in values]


def step_5_train(cfg: CfgNode, store: SampleStore) -> Path:
    """Sec. 4.1: Detectron2's trainer, the paper's schedule; the ERF is measured anew on the way."""
    trainer = JigsawTrainer(cfg, store)
    trainer.resume_or_load(resume=False)
    trainer.train()
    checkpoint = Path(cfg.OUTPUT_DIR) / "model_final.pth"
    print(f"5. {cfg.SOLVER.MAX_ITER} steps done: {checkpoint.name}")
    return checkpoint


def step_6_detector(data: DetectionSet, checkpoint: Path) -> torch.nn.Module:
    """The backbone moves into a detector: every tensor, or an error; what else it needs is set."""
    weights = checkpoint.parent / "backbone.pkl"
    metadata = convert_checkpoint(checkpoint, weights, force=True)
    overrides = [*data.overrides(), "OUTPUT_DIR", str(checkpoint.parent.parent / "detector")]
    cfg = setup_finetune("finetune/faster_rcnn_R_18_FPN_small.yaml", weights, overrides)
    detector = build_model(cfg)
    report = load_backbone(detector, weights)
    print(f"6. {len(report.filled)} tensors in a Faster R-CNN; input {metadata.input_format}, mean")
    print(f"   {rounded(torch.tensor(cfg.MODEL.PIXEL_MEAN))}; then finetune_net.py")
    return detector


def main(folder: Path) -> torch.nn.Module:
    """All steps; returns the detector, ready to be trained."""
    data, store = step_1_samples(folder)
    cfg = step_2_config(folder)
    batch = step_3_jigsaw_images(cfg, store)
    cfg.MODEL.JIGSAW.NUM_CLASSES = len(store.categories)
    step_4_soft_labels(cfg, build_model(cfg), batch)
    checkpoint = step_5_train(cfg, store)
    return step_6_detector(data, checkpoint)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
