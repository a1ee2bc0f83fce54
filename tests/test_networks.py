"""Every shipped network: one step of pre-training, export, and the export loaded back."""

import pytest
import torch
from helpers_store import make_store

from jigsaw_d2.checkpoint.convert import convert_checkpoint
from jigsaw_d2.checkpoint.loading import load_backbone
from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.engine.trainer import JigsawTrainer

NETWORKS = {
    "jigsaw_R_18.yaml": ("resnet18", 11_176_512),
    "jigsaw_R_50.yaml": ("resnet50", 23_508_032),
    "jigsaw_R_101.yaml": ("resnet101", 42_500_160),
    "jigsaw_X_101_32x4d.yaml": (None, None),
    "jigsaw_R_50_DCN.yaml": (None, None),
    "jigsaw_R_50_GN.yaml": (None, None),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data") / "store"
    make_store(folder, n_per_group=2)
    return str(folder)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_step_export_and_load(name, store, tmp_path):
    options = {
        "MODEL.DEVICE": "cpu",
        "INPUT.JIGSAW.TEMPLATE_SIZE": "[64, 64]",
        "INPUT.JIGSAW.TEMPLATE_SPLIT": "[32, 32]",
        "MODEL.JIGSAW.OBJECTIVE": "block_wise",  # the ERF has tests of its own
        "SOLVER.IMS_PER_BATCH": "2",
        "SOLVER.REFERENCE_BATCH_SIZE": "0",
        "SOLVER.MAX_ITER": "1",
        "DATALOADER.NUM_WORKERS": "0",
        "DATASETS.TRAIN": f"('{store}',)",
        "OUTPUT_DIR": str(tmp_path / "run"),
        "SEED": "0",
    }
    cfg = get_jigsaw_cfg(name, [word for pair in options.items() for word in pair])
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


@pytest.mark.parametrize("name", [n for n, (twin, _) in NETWORKS.items() if twin])
def test_sizes_are_torchvisions(name):
    """The same number of backbone parameters as torchvision's, without its classifier."""
    cfg = get_jigsaw_cfg(name, ["MODEL.DEVICE", "cpu", "MODEL.JIGSAW.NUM_CLASSES", "3"])
    cfg.MODEL.RESNETS.NORM = "BN"
    backbone = JigsawTrainer.build_model(cfg).backbone
    assert sum(p.numel() for p in backbone.parameters()) == NETWORKS[name][1]
