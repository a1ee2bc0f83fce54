"""On a real GPU: it computes what the CPU computes, and what is copied arrives whole."""

import pytest
import torch
from detectron2.modeling import build_model
from helpers_run import tiny_cfg

from jigsaw_d2.engine.precision import Precision
from jigsaw_d2.engine.train_step import DeviceBatches, LossReport, TrainStep
from jigsaw_d2.engine.trainer import JigsawTrainer
from jigsaw_d2.modeling.erf import measure_erf
from jigsaw_d2.modeling.losses import OBJECTIVES

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]


@pytest.fixture(autouse=True)
def exact_convolutions():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def twins(folder, objective: str = "erf_adaptive") -> tuple:
    """The same network on both devices, and a batch."""
    options = ("MODEL.JIGSAW.OBJECTIVE", objective, "MODEL.JIGSAW.NUM_CLASSES", 3)
    options += ("MODEL.BACKBONE.NAME", "build_plain_tiny_backbone", "MODEL.RESNETS.NORM", "BN")
    torch.manual_seed(0)
    cpu = build_model(tiny_cfg(folder, *options))
    gpu = build_model(tiny_cfg(folder, *options, "MODEL.DEVICE", "cuda"))
    gpu.load_state_dict(cpu.state_dict())
    images = torch.randint(256, (4, 3, 64, 64)).to(torch.uint8)
    return cpu, gpu, {"image": images, "gt_classes": torch.randint(4, (4, 4))}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_gradients_are_the_cpus(tmp_path, objective):
    cpu, gpu, batch = twins(tmp_path, objective)
    want, got = cpu(batch)["loss_jigsaw"], gpu(batch)["loss_jigsaw"]
    want.backward()
    got.backward()
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    for ours, theirs in zip(gpu.parameters(), cpu.parameters()):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=1e-3, atol=1e-6)


def test_receptive_fields_are_the_cpus(tmp_path):
    cpu, gpu, batch = twins(tmp_path)
    images = cpu.preprocess(batch["image"])
    sums = [measure_erf(m.backbone, images, m.template, with_maps=True) for m in (cpu, gpu)]
    torch.testing.assert_close(sums[1].region_sums.cpu(), sums[0].region_sums, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(sums[1].region_maps.cpu(), sums[0].region_maps, rtol=1e-3, atol=1e-6)


def test_scalars_arrive_however_long_the_device_works():
    device = torch.device("cuda")
    work = torch.randn(2048, 2048, device=device)
    for number in range(20):
        for _ in range(20):
            work = (work @ work).clamp(-1, 1)
        value = torch.full((), float(number), device=device) + 0 * work.sum()
        mean, own = LossReport({"total_loss": value, "data_time": 0.5}, device).wait()
        assert mean == own == {"total_loss": float(number), "data_time": 0.5}


def test_batches_arrive_whole_while_the_device_works():
    device = torch.device("cuda")
    made = [torch.full((8, 3, 256, 256), n, dtype=torch.uint8).pin_memory() for n in range(30)]
    classes = torch.zeros(8, 4, dtype=torch.int64).pin_memory()
    loader = ({"image": image, "gt_classes": classes} for image in made)
    batches, work, sums = DeviceBatches(loader, device), torch.randn(2048, 2048, device=device), []
    for _ in made:
        batch, moved = batches.take()
        assert not batch["image"].is_cuda and moved["image"].is_cuda
        for _ in range(20):
            work = (work @ work).clamp(-1, 1)
        sums.append(moved["image"].long().sum())
        batches.fetch_ahead()
        del moved
    size = made[0].numel()
    assert torch.stack(sums).tolist() == [n * size for n in range(len(made))]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision_trains_and_resumes(tmp_path, dtype):
    """float16's first steps overflow and are skipped; nothing of them may stay behind."""
    options = ("MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", dtype)
    trainer = JigsawTrainer(tiny_cfg(tmp_path, *options, "MODEL.JIGSAW.CHANNELS_LAST", True))
    trainer.train()
    losses = [value for value, _ in trainer.storage.history("total_loss").values()]
    assert len(losses) == 12 and losses[-1] < losses[0]
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000005.pth")
    resumed = JigsawTrainer(tiny_cfg(tmp_path, *options, "MODEL.JIGSAW.CHANNELS_LAST", True))
    resumed.resume_or_load()
    resumed.train()
    again = [value for value, _ in resumed.storage.history("total_loss").values()]
    assert again[-1] == pytest.approx(losses[-1], rel=1e-2)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_step_waits_for_nothing_but_its_report(tmp_path, dtype):
    _, gpu, batch = twins(tmp_path)
    pinned = {name: value.pin_memory() for name, value in batch.items()}
    optimizer = torch.optim.SGD(gpu.parameters(), lr=0.01, fused=True)
    step = TrainStep(gpu.train(), optimizer, Precision("cuda", dtype))
    step.feed([pinned] * 4)
    step.run(lambda mean, own: None)  # libraries start up in the first
    torch.cuda.set_sync_debug_mode("error")
    try:
        scalars = step.run(lambda mean, own: None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 < scalars["total_loss"] < 10
