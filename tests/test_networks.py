"""Every shipped network: one step of pre-training, export, and the export loaded back."""

import pytest
import torch
from helpers_store import make_store

from jigsaw_d2.checkpoint.convert import convert_checkpoint
from jigsaw_d2.checkpoint.loading import load_backbone
from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.engine.trainer import JigsawTrainer

NETWORKS = [
    *("jigsaw_R_18.yaml", "jigsaw_R_50.yaml", "jigsaw_R_101.yaml", "jigsaw_X_101_32x4d.yaml"),
    *("jigsaw_R_50_DCN.yaml", "jigsaw_R_50_GN.yaml"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data") / "store"
    make_store(folder, n_per_group=2)
    return str(folder)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_step_export_and_load(name, store, tmp_path):
    options = ["MODEL.DEVICE", "cpu", "INPUT.JIGSAW.TEMPLATE_SIZE", "[64, 64]", "SEED", "0"]
    options += ["INPUT.JIGSAW.TEMPLATE_SPLIT", "[32, 32]", "SOLVER.IMS_PER_BATCH", "2"]
    options += ["MODEL.JIGSAW.OBJECTIVE", "block_wise"]  # the ERF has tests of its own
    options += ["SOLVER.AMP.ENABLED", "False", "MODEL.JIGSAW.CHANNELS_LAST", "False"]  # no trial
    options += ["SOLVER.REFERENCE_BATCH_SIZE", "0", "SOLVER.MAX_ITER", "1"]
    options += ["DATALOADER.NUM_WORKERS", "0", "DATASETS.TRAIN", f"('{store}',)"]
    cfg = get_jigsaw_cfg(name, [*options, "OUTPUT_DIR", str(tmp_path / "run")])
    trainer = JigsawTrainer(cfg)
    model = trainer.checkpointer.model
    before = {n: p.clone() for n, p in model.named_parameters()}
    trainer.train()
    assert not [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    weights = tmp_path / "weights.pth"
    convert_checkpoint(tmp_path / "run" / "model_final.pth", weights)

    trained = {n: v.clone() for n, v in model.backbone.state_dict().items()}
    with torch.no_grad():
        for value in model.backbone.state_dict().values():
            value.zero_()
    load_backbone(model, weights, input_format="RGB")
    for n, value in model.backbone.state_dict().items():
        assert n.endswith("num_batches_tracked") or torch.equal(value, trained[n]), n
