"""cost.py: hand counts of multiply-accumulates, and a cost log that survives kills and crowds."""

import json
import multiprocessing

import pytest
import torch
from detectron2.modeling import build_backbone
from torch import nn

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.cost import (
    CostLog,
    backbone_macs,
    format_cost_logs,
    read_cost_log,
    record_stage,
)
from jigsaw_d2.io import CheckpointError, ConfigError
from jigsaw_d2.tools.cost import main


def bottleneck_stage(cells: int, inside: int, width: int, blocks: int, stride: int) -> int:
    """MACs of one stage of a ResNet-50, stride in the first block's 3x3 convolution.

    ``cells``: of the stage's output, along one side; ``inside``: channels that enter it.
    """
    out, area, before = 4 * width, cells**2, (cells * stride) ** 2
    first = before * inside * width  # 1x1 at the incoming resolution
    first += area * (9 * width * width + width * out)  # 3x3 that strides, 1x1
    first += area * inside * out  # 1x1 of the shortcut, striding
    rest = area * (out * width + 9 * width * width + width * out)
    return first + (blocks - 1) * rest


def macs_of(config: str) -> int:
    cfg = get_jigsaw_cfg(config, ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", "BN"])
    return backbone_macs(build_backbone(cfg), 224, 224)


def test_resnet_50_by_hand():
    # 7x7 convolution, 3 -> 64 channels, 112 x 112 cells out.
    by_hand = 112**2 * 49 * 3 * 64
    by_hand += bottleneck_stage(56, 64, 64, 3, 1)
    by_hand += bottleneck_stage(28, 256, 128, 4, 2)
    by_hand += bottleneck_stage(14, 512, 256, 6, 2)
    by_hand += bottleneck_stage(7, 1024, 512, 3, 2)
    assert macs_of("jigsaw_R_50.yaml") == by_hand == 4_087_136_256
    # With ImageNet's classifier, 2048 x 1000, the figure that everyone quotes.
    assert round((by_hand + 2048 * 1000) / 1e9, 2) == 4.09


def test_deformable_stages_cost_their_offsets_on_top():
    plain, deformable = macs_of("jigsaw_R_50.yaml"), macs_of("jigsaw_R_50_DCN.yaml")
    # Offsets: a 3x3 convolution to 18 channels in each block, at the block's output resolution.
    offsets = sum(
        blocks * cells**2 * 9 * width * 18
        for blocks, cells, width in ((4, 28, 128), (6, 14, 256), (3, 7, 512))
    )
    assert deformable == plain + offsets


def test_counting_leaves_the_network_as_it_was():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    # 6 x 6 cells, 3x3 kernel, 3 -> 4 channels.
    assert backbone_macs(net, 8, 8) == 36 * 9 * 3 * 4
    assert [m.training for m in net.modules()] == [True, True, False, True]
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_stages_add_up(tmp_path):
    record_stage(tmp_path, "extraction", images=5, seconds=1.5, device="CPU", workers=2)
    record_stage(tmp_path, "pretraining", images=8, pixels=800, flops=1e12, seconds=2, device="CPU")
    total = record_stage(
        tmp_path, "pretraining", images=8, pixels=800, flops=1e12, seconds=3, device="GPU"
    )
    assert total["images"] == 16 and total["pixels"] == 1600 and total["flops"] == 2 * 10**12
    assert total["seconds"] == 5 and total["devices"] == {"CPU": 2.0, "GPU": 3.0}
    stages = read_cost_log(tmp_path)["stages"]
    assert stages["pretraining"] == total
    assert stages["extraction"]["workers"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["cost.json"]  # no temporary left


def _record_many(folder: str) -> None:
    for _ in range(50):
        record_stage(folder, "evaluation", images=1, seconds=0.25)


def test_processes_that_record_at_once_lose_nothing(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(_record_many, [str(tmp_path)] * 4, chunksize=1)
    entry = read_cost_log(tmp_path)["stages"]["evaluation"]
    assert entry["images"] == 200 and entry["seconds"] == 50


def test_folders_without_cost_log_or_with_a_damaged_one(tmp_path):
    assert read_cost_log(tmp_path) == {"version": 1, "stages": {}}
    with pytest.raises(CheckpointError, match=f"{tmp_path} holds no cost.json"):
        format_cost_logs([tmp_path])
    (tmp_path / "cost.json").write_text('{"version": 1')
    with pytest.raises(CheckpointError, match="cost.json is not a cost log"):
        read_cost_log(tmp_path)
    with pytest.raises(
        ConfigError, match="'training' of a cost log; the stages are extraction, pr"
    ):
        record_stage(tmp_path, "training")


def test_only_the_main_rank_writes(tmp_path):
    quiet = CostLog(tmp_path, "CPU", writes=False)
    quiet.record("pretraining", seconds=2.0, images=3)
    assert quiet.seconds == {"pretraining": 2.0} and not list(tmp_path.iterdir())
    CostLog(tmp_path, "CPU").record("pretraining", seconds=2.0, images=3)
    assert json.loads((tmp_path / "cost.json").read_text())["stages"]["pretraining"]["images"] == 3


# ---- the table


def test_command_sums_folders_and_compares(tmp_path, capsys):
    run, store, pixels = tmp_path / "run", tmp_path / "store", 10 * 224 * 224
    record_stage(store, "extraction", images=60, pixels=10**6, seconds=6, device="GPU")
    assert "ImageNet" not in format_cost_logs([store])  # nothing to compare it with
    record_stage(run, "extraction", images=40, pixels=9 * 10**6, seconds=30, device="CPU")
    record_stage(run, "pretraining", images=1000, pixels=pixels, flops=2e11, seconds=3600)
    record_stage(run, "erf_refresh", images=10, pixels=pixels, flops=0, seconds=0, device="CPU")
    assert main([str(store), str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line.split("  ")[0]: line.split() for line in lines if line}
    assert table["extraction"][1:] == ["100", "10.0", "0", "0.010", "CPU;", "GPU"]
    assert table["pretraining"][1:4] == ["1,000", "0.5", "0.0002"]
    assert table["all"][1] == "1,110" and table["all"][4] == "1.010"
    # 128,116,700 images of 224x224 against the pixels of 20.
    assert table["ImageNet, 100 epochs"][-2] == f"{128_116_700 / 20:,.4g}"
