"""The whole pipeline once, on a tiny set: what leaves pre-training is what arrives in detectors."""

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from helpers_jobs import tiny_set
from helpers_weights import C4, FPN, THIN

from jigsaw_d2.checkpoint.loading import load_backbone
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.detection.config import setup_finetune
from jigsaw_d2.tools import convert, extract, pretrain

ITERATIONS = 5


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Set, store, checkpoint and converted weights of a tiny job: a thin R50 on 64 pixels."""
    folder = tmp_path_factory.mktemp("job")
    data, store = tiny_set(folder / "set", train_images=12), folder / "store"
    argv = ["--json", str(data.train_json), "--images", str(data.train_images)]
    assert extract.main([*argv, "--output", str(store), "--workers", "0"]) == 0
    overrides = [
        *(*THIN, "MODEL.RESNETS.DEPTH", "50"),  # bottlenecks: Detectron2's C4 head knows no other
        *("DATASETS.TRAIN", repr((str(store),)), "OUTPUT_DIR", str(folder / "pretrain")),
        *("INPUT.JIGSAW.TEMPLATE_SIZE", "[64, 64]", "INPUT.JIGSAW.TEMPLATE_SPLIT", "[32, 32]"),
        *("SOLVER.MAX_ITER", str(ITERATIONS), "SOLVER.WARMUP_ITERS", "1"),
        *("SOLVER.IMS_PER_BATCH", "4", "MODEL.JIGSAW.ERF.NUM_IMAGES", "2"),
        *("MODEL.JIGSAW.ERF.PERIOD", "3", "DATALOADER.NUM_WORKERS", "0", "SEED", "1"),
    ]
    assert pretrain.main(["--config-file", "jigsaw_R_18_cpu.yaml", *overrides]) == 0
    checkpoint, weights = folder / "pretrain" / "model_final.pth", folder / "backbone.pkl"
    assert convert.main(["--input", str(checkpoint), "--output", str(weights)]) == 0
    return data, store, torch.load(checkpoint, weights_only=True), weights


def test_pre_training_learned_something_from_every_kind_of_region(job):
    _, store, state, _ = job
    assert len(SampleStore(store)) > 20
    assert state["iteration"] == ITERATIONS - 1
    weights = state["model"]["erf_weights"]
    assert weights.shape == (4, 2, 2)
    torch.testing.assert_close(weights.sum(0), torch.ones(2, 2))
    assert weights.max() < 1  # the ERF was measured: no cell looks at its own region alone


@pytest.mark.parametrize("config", [C4, FPN])
def test_every_backbone_tensor_arrives(job, config, tmp_path):
    data, _, checkpoint, weights = job
    expected = {
        name.removeprefix("backbone."): tensor
        for name, tensor in checkpoint["model"].items()
        if name.startswith("backbone.") and not name.endswith("num_batches_tracked")
    }
    overrides = ["MODEL.DEVICE", "cpu", *data.overrides(), "OUTPUT_DIR", str(tmp_path)]
    cfg = setup_finetune(config, str(weights), overrides, match_architecture=True)
    detector = build_model(cfg)
    report = load_backbone(detector, weights)
    state = detector.state_dict()
    stages = ("backbone.bottom_up.", "backbone.", "roi_heads.")
    names = {name: next(p + name for p in stages if p + name in state) for name in expected}
    assert set(names.values()) == set(report.filled)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(state[names[name]].numpy(), tensor.float().numpy(), name)
