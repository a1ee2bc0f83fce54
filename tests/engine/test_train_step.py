"""train_step.py: accumulation, precision, clipping and the check of the loss, on small networks."""

import math

import pytest
import torch
from detectron2.solver import build_optimizer
from torch import nn

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.engine.optimizer import start_momentum
from jigsaw_d2.engine.precision import Precision
from jigsaw_d2.engine.train_step import LossReport, TrainStep


class Toy(nn.Module):
    """Mean over images of a squared score; group norm, so that images do not see each other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 1, 3)
        )

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        return {"loss_toy": self.layers(batch["image"]).float().pow(2).mean()}


def batches(number: int, size: int) -> list[dict]:
    """``number`` batches that together are always the same eight images."""
    images = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    return [{"image": part} for part in images.split(size)][:number]


def never(*args: object) -> None:
    raise AssertionError("a finite loss was called bad")


def step_of(model: nn.Module, data: list[dict], dtype: torch.dtype | None = None) -> tuple:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = TrainStep(model, optimizer, Precision("cpu", dtype), accumulation_steps=len(data))
    step.feed(data)
    return step, step.run(never)


@pytest.mark.parametrize("passes", [2, 4, 8])
def test_accumulated_gradient_is_that_of_the_large_batch(passes):
    whole, parts = Toy(), Toy()
    _, scalars = step_of(whole, batches(1, 8))
    _, accumulated = step_of(parts, batches(passes, 8 // passes))
    assert accumulated["total_loss"] == pytest.approx(scalars["total_loss"], rel=1e-6)
    for ours, theirs in zip(parts.parameters(), whole.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_mixed_precision_agrees_with_float32(dtype, tolerance):
    """Within a few roundings of the type: 2^-8 and 2^-11, relative."""
    plain, mixed = Toy(), Toy()
    _, scalars = step_of(plain, batches(1, 8))
    step, ours = step_of(mixed, batches(1, 8), dtype)
    assert ours["total_loss"] == pytest.approx(scalars["total_loss"], rel=tolerance)
    assert all(p.dtype == torch.float32 for p in mixed.parameters())
    if dtype is torch.float16:
        assert step.grad_scaler.get_scale() > 1
    for got, expected in zip(mixed.parameters(), plain.parameters()):
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.02)


def test_an_overflow_of_scaled_gradients_skips_the_update_and_halves_the_scale():
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = TrainStep(model, optimizer, Precision("cpu", torch.float16))
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    step.feed(batches(1, 8))
    before = [p.clone() for p in model.parameters()]
    step.run(never)  # the loss itself is finite
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert step.grad_scaler.get_scale() == 2.0**59


def test_a_bad_loss_is_reported_before_anything_changes():
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = TrainStep(model, optimizer, Precision("cpu"))
    step.feed([{"image": torch.full((2, 3, 9, 9), math.inf)}])
    before = [p.clone() for p in model.parameters()]

    def stop(mean: dict, own: dict) -> None:
        assert math.isnan(mean["total_loss"]) and math.isnan(own["total_loss"])
        raise FloatingPointError

    with pytest.raises(FloatingPointError):
        step.run(stop)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert len(step.batches) == 1 and "torch" in step.random_state


def test_momentum_survives_a_first_step_that_loss_scaling_skips():
    """The fused SGD of PyTorch leaves its buffers as memory was found, often nan or worse."""

    def sgd(model: nn.Module, fused: bool) -> torch.optim.Optimizer:
        options = {"momentum": 0.9, "weight_decay": 0.1, "fused": fused}
        return start_momentum(torch.optim.SGD(model.parameters(), lr=0.1, **options))

    ends = []
    for fused in (True, False):
        model = Toy()
        optimizer = sgd(model, fused)
        scaler = torch.amp.GradScaler("cpu")
        for batch in ({"image": torch.full((2, 3, 9, 9), math.inf)}, *batches(2, 4)):
            optimizer.zero_grad()
            scaler.scale(model(batch)["loss_toy"]).backward()
            scaler.step(optimizer)
            scaler.update()
            if fused and len(batch["image"]) == 2:  # skipped
                buffers = [state["momentum_buffer"] for state in optimizer.state.values()]
                assert len(buffers) == 6 and not any(buffer.any() for buffer in buffers)
        ends.append([p.detach().clone() for p in model.parameters()])
    for fused, plain in zip(*ends):
        torch.testing.assert_close(fused, plain)


def test_gradients_are_clipped_as_detectron2_does():
    cfg = get_jigsaw_cfg(
        "jigsaw_R_50.yaml",
        ["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "1e-4"]
        + ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value"],
    )
    model = Toy()
    step = TrainStep(model, build_optimizer(cfg, model), Precision("cpu"))
    step.feed(batches(1, 8))
    step.run(never)
    assert max(p.grad.abs().max().item() for p in model.parameters()) <= 1e-4 * (1 + 1e-6)


def test_decay_is_what_each_kind_of_parameter_is_told():
    """P4: 1e-4 on every parameter by default; norms and biases have their own keys."""
    model = Toy()

    def decays(*options: str) -> dict[str, float]:
        cfg = get_jigsaw_cfg("jigsaw_R_50.yaml", list(options))
        groups = build_optimizer(cfg, model).param_groups
        of = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
        return {name: of[id(p)] for name, p in model.named_parameters()}

    assert set(decays().values()) == {1e-4}
    special = decays("SOLVER.WEIGHT_DECAY_NORM", "0.0", "SOLVER.WEIGHT_DECAY_BIAS", "0.5")
    assert special["layers.0.weight"] == 1e-4 and special["layers.1.weight"] == 0.0
    assert special["layers.0.bias"] == 0.5 and special["layers.3.bias"] == 0.5


def test_report_keeps_every_scalar():
    mean, own = LossReport({"a": torch.tensor(1.5), "b": 2.0}, torch.device("cpu")).wait()
    assert mean == own == {"a": 1.5, "b": 2.0}
