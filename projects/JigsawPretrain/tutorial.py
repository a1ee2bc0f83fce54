#!/usr/bin/env python
"""Jigsaw pre-training step by step, from boxes to a detector, in about a minute of a CPU.

python projects/JigsawPretrain/tutorial.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch
from detectron2.modeling import build_model

from benchmark.demo_data import DemoOptions, make_demo_set
from jigsaw_d2.checkpoint.convert import convert_checkpoint
from jigsaw_d2.checkpoint.loading import load_backbone
from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.data.build import build_jigsaw_train_loader
from jigsaw_d2.data.extraction import ExtractionOptions, extract_samples
from jigsaw_d2.data.sources import CocoSource
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.detection.config import setup_finetune
from jigsaw_d2.engine.trainer import JigsawTrainer
from jigsaw_d2.modeling import losses
from jigsaw_d2.modeling.erf import erf_region_sums, region_weights


def main(folder: Path) -> torch.nn.Module:
    """Read it from top to bottom; returns the detector, ready to be trained."""
    # Sec. 3.1: every annotated box, enlarged at random, becomes a sample; so do empty places.
    data = make_demo_set(folder / "set", DemoOptions(train_images=24, val_images=4))
    source = CocoSource(data.train_json, data.train_images)
    # workers=0: in this process, so that this script needs no main guard on any platform
    extract_samples(source, folder / "store", ExtractionOptions(workers=0, overwrite=True))
    store = SampleStore(folder / "store")
    names = [*store.categories, "background"]
    print(f"1. {len(store)} samples of {', '.join(names)}")

    # The paper's settings, shrunk: ResNet-18, Jigsaw images of 96 x 96 pixels, 8 steps.
    settings = {
        "DATASETS.TRAIN": (str(folder / "store"),),
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.JIGSAW.TEMPLATE_SIZE": [96, 96],
        "INPUT.JIGSAW.TEMPLATE_SPLIT": [32, 32],
        "MODEL.JIGSAW.ERF.NUM_IMAGES": 4,
        "MODEL.JIGSAW.ERF.PERIOD": 4,
        "MODEL.JIGSAW.NUM_CLASSES": len(store.categories),
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.MAX_ITER": 8,
        "SOLVER.WARMUP_ITERS": 2,
        "OUTPUT_DIR": str(folder / "pretrain"),
    }
    pairs = [str(item) for pair in settings.items() for item in pair]
    cfg = get_jigsaw_cfg("jigsaw_R_18_cpu.yaml", pairs)
    template = JigsawTemplate(*cfg.INPUT.JIGSAW.TEMPLATE_SIZE, *cfg.INPUT.JIGSAW.TEMPLATE_SPLIT)
    print(f"2. {template}")

    # Sec. 3.2: two square-like samples, a tall and a wide one, in one image.
    batch = next(iter(build_jigsaw_train_loader(cfg, store=store)))
    shown = [names[c] for c in batch["gt_classes"][0].tolist()]
    print(f"3. a batch {tuple(batch['image'].shape)}; the first image shows, R1 to R4: {shown}")

    # Sec. 3.3: where a cell sees beyond its region, the neighbours' labels join in (Eq. 1-2).
    model = build_model(cfg)
    images = model.preprocess(batch["image"])
    sums, regions = erf_region_sums(model.backbone, images, template), template.cell_regions(32)
    weights = region_weights(sums, regions, cfg.MODEL.JIGSAW.TAU)
    share = sums[0, 0] / sums[0, 0].sum()
    print(f"4. cell (0, 0) is in R1; its ERF over R1..R4: {rounded(share)}")
    print(f"   so the weights of its four labels are {rounded(weights[:, 0, 0])}")
    with torch.no_grad():
        logits = model.cell_logits(images)["res5"]
    loss = losses.erf_adaptive_loss(logits, batch["gt_classes"], weights, regions)
    print(f"   loss of the untrained network: {loss:.3f}")

    # Sec. 4.1: Detectron2's trainer, the paper's schedule; the ERF is measured anew on the way.
    trainer = JigsawTrainer(cfg, store)
    trainer.resume_or_load(resume=False)
    trainer.train()
    checkpoint = folder / "pretrain" / "model_final.pth"
    print(f"5. {cfg.SOLVER.MAX_ITER} steps done: {checkpoint.name}")

    # The backbone moves into a detector: every tensor, or an error; what else it needs is set.
    converted = folder / "backbone.pkl"
    metadata = convert_checkpoint(checkpoint, converted, force=True)
    overrides = [*data.overrides(), "OUTPUT_DIR", str(folder / "detector")]
    cfg = setup_finetune("finetune/faster_rcnn_R_18_FPN_small.yaml", converted, overrides)
    detector = build_model(cfg)
    report = load_backbone(detector, converted)
    print(f"6. {len(report.filled)} tensors in a Faster R-CNN; input {metadata.input_format}, mean")
    print(f"   {cfg.MODEL.PIXEL_MEAN}; then finetune_net.py")
    return detector


def rounded(values: torch.Tensor) -> list[float]:
    """For printing."""
    return [round(float(value), 3) for value in values]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
