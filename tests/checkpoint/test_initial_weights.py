"""MODEL.WEIGHTS of a pre-training: such a start fills the whole backbone, or nothing."""

import pytest
import torch
from helpers_run import tiny_cfg

from jigsaw_d2.checkpoint.convert import convert_checkpoint
from jigsaw_d2.engine.trainer import JigsawTrainer
from jigsaw_d2.io import WeightsError

RESNET = ("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 18)
RESNET += ("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "SOLVER.MAX_ITER", 1)
RESNET += ("MODEL.JIGSAW.OBJECTIVE", "block_wise", "SOLVER.IMS_PER_BATCH", 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step; its checkpoint, its conversion, torchvision's form of it."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = JigsawTrainer(tiny_cfg(folder, *RESNET))
    trainer.train()
    checkpoint = folder / "run" / "model_final.pth"
    convert_checkpoint(checkpoint, folder / "weights.pkl")
    convert_checkpoint(checkpoint, folder / "torchvision.pth", format="torchvision")
    return folder, trainer.checkpointer.model


@pytest.mark.parametrize("file", ["run/model_final.pth", "weights.pkl", "torchvision.pth"])
def test_every_accepted_form_fills_the_backbone(trained, tmp_path, file):
    folder, model = trained
    trainer = JigsawTrainer(tiny_cfg(tmp_path, *RESNET, "MODEL.WEIGHTS", folder / file))
    trainer.resume_or_load(resume=False)
    ours = trainer.checkpointer.model.backbone.state_dict()
    for name, value in model.backbone.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(ours[name], value), name
    assert trainer.start_iter == 0  # a start, no resume
    assert not torch.equal(trainer.checkpointer.model.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize(
    "overrides, message",
    [
        # eight blocks more, of two convolutions with a norm of four tensors each
        (("MODEL.RESNETS.DEPTH", 34), r"not in the file \(80\):\n    res2.2.conv1"),
        (("INPUT.FORMAT", "BGR"), "input_format: file RGB, network BGR"),
    ],
)
def test_another_network_or_input_is_refused_whole(trained, tmp_path, overrides, message):
    torch.manual_seed(5)
    folder, _ = trained
    trainer = JigsawTrainer(
        tiny_cfg(tmp_path, *RESNET, "MODEL.WEIGHTS", folder / "weights.pkl", *overrides)
    )
    before = {n: v.clone() for n, v in trainer.checkpointer.model.state_dict().items()}
    with pytest.raises(WeightsError, match=message):
        trainer.resume_or_load()
    after = trainer.checkpointer.model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
