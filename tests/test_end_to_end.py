"""The whole pipeline once, on a tiny set: what leaves pre-training is what arrives in detectors."""

import pickle

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from helpers_jobs import tiny_set

from jigsaw_d2.checkpoint.loading import load_backbone
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.detection.config import setup_finetune
from jigsaw_d2.tools import convert, extract, pretrain

ITERATIONS = 5
SMALL_DETECTOR = [
    *("MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.001"),
    *(
        "INPUT.MIN_SIZE_TRAIN",
        "(96,)",
        "INPUT.MAX_SIZE_TRAIN",
        "160",
        "DATALOADER.NUM_WORKERS",
        "0",
    ),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "50", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8", "MODEL.BACKBONE.FREEZE_AT", "0"),
]
DETECTORS = {
    "C4": "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml",
    "FPN": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Set, store, checkpoint and converted weights of a tiny job: a thin R50 on 64 pixels."""
    folder = tmp_path_factory.mktemp("job")
    data = tiny_set(folder / "set", train_images=12, val_images=2)
    store = folder / "store"
    argv = ["--json", str(data.train_json), "--images", str(data.train_images)]
    assert extract.main([*argv, "--output", str(store), "--workers", "0"]) == 0
    overrides = [
        # Bottlenecks: Detectron2's C4 head knows no other block. Thin: seconds count.
        *("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.STEM_OUT_CHANNELS", "16"),
        *("MODEL.RESNETS.WIDTH_PER_GROUP", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
        *("DATASETS.TRAIN", repr((str(store),)), "OUTPUT_DIR", str(folder / "pretrain")),
        *("INPUT.JIGSAW.TEMPLATE_SIZE", "[64, 64]", "INPUT.JIGSAW.TEMPLATE_SPLIT", "[32, 32]"),
        *("SOLVER.MAX_ITER", str(ITERATIONS), "SOLVER.WARMUP_ITERS", "1"),
        *("SOLVER.IMS_PER_BATCH", "4", "MODEL.JIGSAW.ERF.NUM_IMAGES", "2"),
        *("MODEL.JIGSAW.ERF.PERIOD", "3", "DATALOADER.NUM_WORKERS", "0", "SEED", "1"),
    ]
    assert pretrain.main(["--config-file", "jigsaw_R_18_cpu.yaml", *overrides]) == 0
    checkpoint, weights = folder / "pretrain" / "model_final.pth", folder / "backbone.pkl"
    assert convert.main(["--input", str(checkpoint), "--output", str(weights)]) == 0
    return data, store, checkpoint, weights


def test_pre_training_learned_something_from_every_kind_of_region(job):
    _, store, checkpoint, _ = job
    assert len(SampleStore(store)) > 20
    state = torch.load(checkpoint, weights_only=True)
    assert state["iteration"] == ITERATIONS - 1
    weights = state["model"]["erf_weights"]
    assert weights.shape == (4, 2, 2)
    torch.testing.assert_close(weights.sum(0), torch.ones(2, 2))
    assert weights.max() < 1  # the ERF was measured: no cell looks at its own region alone


@pytest.mark.parametrize("kind", DETECTORS)
def test_every_backbone_tensor_arrives_and_a_step_is_taken(job, kind):
    data, _, checkpoint, weights = job
    trained = torch.load(checkpoint, weights_only=True)["model"]
    expected = {
        name.removeprefix("backbone."): tensor
        for name, tensor in trained.items()
        if name.startswith("backbone.") and not name.endswith("num_batches_tracked")
    }
    with open(weights, "rb") as stream:
        assert set(pickle.load(stream)["model"]) == set(expected)

    overrides = [*SMALL_DETECTOR, *data.overrides(), "OUTPUT_DIR", str(checkpoint.parent / kind)]
    cfg = setup_finetune(DETECTORS[kind], str(weights), overrides, match_architecture=True)
    torch.manual_seed(0)
    detector = build_model(cfg)
    report = load_backbone(detector, weights)
    state = detector.state_dict()
    stages = ("backbone.bottom_up.", "backbone.", "roi_heads.")
    names = {name: next(p + name for p in stages if p + name in state) for name in expected}
    assert set(names.values()) == set(report.filled)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(state[names[name]].numpy(), tensor.float().numpy(), name)
    _take_a_step(detector, cfg)


def _take_a_step(detector, cfg):
    optimizer = build_optimizer(cfg, detector)
    before = [p.detach().clone() for p in detector.parameters()]
    batch = next(iter(build_detection_train_loader(cfg)))
    with EventStorage():
        losses = detector.train()(batch)
    loss = sum(losses.values())
    assert torch.isfinite(loss)
    loss.backward()
    optimizer.step()
    changed = [not torch.equal(old, new) for old, new in zip(before, detector.parameters())]
    assert np.mean(changed) > 0.9
