"""The optimizers of both trainings: what is decayed, and at what rate."""

import pytest
import torch
from detectron2.config import CfgNode
from torch import nn

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.detection.finetune import FinetuneTrainer
from jigsaw_d2.engine.optimizer import build_optimizer, layer_factors
from jigsaw_d2.engine.trainer import JigsawTrainer
from jigsaw_d2.io import ConfigError


class Transformer(nn.Module):
    """Position embedding, two blocks, a last norm; and a head outside of the backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.pos_embed = nn.Parameter(torch.zeros(4))
        block = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
        self.backbone.blocks = nn.ModuleList([block, nn.Linear(4, 4)])
        self.backbone.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


def config(*overrides: object) -> CfgNode:
    solver = ["SOLVER.BASE_LR", 0.5, "SOLVER.WEIGHT_DECAY", 0.1, "SOLVER.WEIGHT_DECAY_NORM", 0.0]
    return get_jigsaw_cfg("", ["MODEL.DEVICE", "cpu", *solver, *overrides])


def settings(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple]:
    """{parameter: (rate, decay)}."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found[names[parameter]] = (pytest.approx(group["lr"]), group["weight_decay"])
    return found


def test_adamw_decays_neither_norms_nor_embeddings_and_slows_lower_blocks() -> None:
    """Two blocks: factors 1/8 for what is below, 1/4, 1/2, and 1 above and outside."""
    model = Transformer()
    cfg = config("SOLVER.OPTIMIZER", "AdamW", "SOLVER.LAYER_DECAY", 0.5)
    optimizer = build_optimizer(cfg, model)
    assert type(optimizer) is torch.optim.AdamW
    found = settings(optimizer, model)
    assert len(found) == len(list(model.parameters()))
    assert found["backbone.pos_embed"] == (0.5 / 8, 0.0)
    assert found["backbone.blocks.0.1.weight"] == (0.5 / 4, 0.1)
    assert found["backbone.blocks.0.0.weight"] == (0.5 / 4, 0.0)
    assert found["backbone.blocks.1.bias"] == (0.5 / 2, 0.1)
    assert found["backbone.norm.weight"] == (0.5, 0.0)
    assert found["head.weight"] == (0.5, 0.1)


def test_sgd_is_the_papers() -> None:
    model = Transformer()
    optimizer = build_optimizer(config(), model)
    assert type(optimizer) is torch.optim.SGD
    found = settings(optimizer, model)
    assert found["backbone.pos_embed"] == (0.5, 0.1) and found["backbone.norm.bias"] == (0.5, 0.0)


@pytest.mark.parametrize("trainer", [JigsawTrainer, FinetuneTrainer])
def test_both_trainings_build_it(trainer: type) -> None:
    optimizer = trainer.build_optimizer(config("SOLVER.OPTIMIZER", "AdamW"), Transformer())
    assert type(optimizer) is torch.optim.AdamW


@pytest.mark.parametrize(("key", "value"), [("OPTIMIZER", "Adam"), ("LAYER_DECAY", 1.5)])
def test_mistakes(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{key} .*{value}"):
        build_optimizer(config(f"SOLVER.{key}", value), Transformer())


def test_blocks_of_a_resnet() -> None:
    net = nn.Module()
    net.stem, net.res2 = nn.Linear(1, 1, bias=False), nn.Sequential(nn.Linear(1, 1, bias=False))
    net.res3 = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    # stem below three blocks: res2.0, res3.0, res3.1
    assert list(layer_factors(net, 0.5).values()) == [1 / 16, 1 / 8, 1 / 4, 1 / 2]
