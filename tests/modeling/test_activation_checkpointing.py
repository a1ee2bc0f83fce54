"""memory.py: activations computed twice give the same gradients and statistics."""

import copy

import pytest
import torch
from detectron2.modeling import build_backbone
from torch import nn

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.io import ConfigError
from jigsaw_d2.modeling.activation_checkpointing import checkpoint_activations


def resnet18() -> nn.Module:
    options = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
    cfg = get_jigsaw_cfg("jigsaw_R_50.yaml", [*options, "MODEL.RESNETS.NORM", "BN"])
    torch.manual_seed(0)
    return build_backbone(cfg).train()


class Kept:
    """Bytes that autograd keeps between the passes."""

    def __init__(self) -> None:
        self.bytes = 0

    def __enter__(self) -> "Kept":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor


def step(backbone: nn.Module) -> int:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with Kept() as kept:
        loss = backbone(images)["res5"].square().mean()
    loss.backward()
    return kept.bytes


def test_gradients_and_statistics_are_the_same_with_less_kept():
    plain = resnet18()
    saving = copy.deepcopy(plain)
    assert checkpoint_activations(saving) == 8  # two blocks in each of four stages
    kept, kept_saving = step(plain), step(saving)
    assert kept_saving < 0.5 * kept
    state, state_saving = plain.state_dict(), saving.state_dict()
    assert list(state) == list(state_saving)
    for name in state:
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(state[name], state_saving[name]), name
    gradients = {n: p.grad for n, p in plain.named_parameters()}
    for name, parameter in saving.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-7)


def test_evaluation_is_left_alone():
    plain = resnet18().eval()
    saving = copy.deepcopy(plain)
    checkpoint_activations(saving)
    assert step(plain) == step(saving)


def test_a_backbone_without_blocks_is_refused():
    with pytest.raises(ConfigError, match="ACTIVATION_CHECKPOINTING: this backbone has no blocks"):
        checkpoint_activations(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()))
