"""The table of dev/detectron2_adaptations.py: its entries, and what they brought to the install."""

import importlib
import json
import random
from importlib import metadata
from pathlib import Path

import detectron2
import detectron2_adaptations as adaptations
import pytest
import torch
from detectron2 import model_zoo
from detectron2.data.common import MapDataset
from detectron2.engine import hooks
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead

PACKAGE = Path(detectron2.__file__).parent
ADAPTED = (PACKAGE / "jigsaw_adaptation.json").is_file()
ours_only = pytest.mark.skipif(not ADAPTED, reason="concerns our adaptation of Detectron2 0.6")


# ---- the entries


@pytest.mark.parametrize(
    "entry",
    [
        adaptations.Rewrite("*.py", "absent", "", "the reason"),
        adaptations.Rewrite("no_such.py", "present", "", "the reason"),
        adaptations.RemoveFiles("no_such_*.py", "the reason"),
        adaptations.AddFile("detectron2_ops.py", "no_such_folder/_C.py", "the reason"),
    ],
)
def test_an_entry_that_finds_nothing_fails_loudly(tmp_path, entry):
    (tmp_path / "a.py").write_text("present\n")
    with pytest.raises(adaptations.AdaptationError, match="the reason"):
        adaptations.apply_all(tmp_path, (entry,))
    assert (tmp_path / "a.py").read_text() == "present\n"


def test_entries_change_add_and_leave_out(tmp_path):
    (tmp_path / "a.py").write_text("x = np.bool\ny = np.bool_\nz = np.float\n")
    (tmp_path / "gone_1.py").write_text("")
    entries = (
        adaptations.Rewrite("*.py", r"\bnp\.(bool|float)\b", r"\1", "names"),
        adaptations.AddFile("detectron2_ops.py", "_C.py", "new"),
        adaptations.RemoveFiles("gone_*.py", "old"),
    )
    changes = adaptations.apply_all(tmp_path, entries)
    assert changes == ["a.py: names", "_C.py: new", "gone_1.py: old"]
    assert (tmp_path / "a.py").read_text() == "x = bool\ny = np.bool_\nz = float\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_C.py", "a.py"]


def test_digest_follows_the_table_and_the_added_files(tmp_path, monkeypatch):
    rewrite = adaptations.Rewrite("*.py", "a", "b", "reason")
    add = adaptations.AddFile("ops.py", "_C.py", "reason")
    monkeypatch.setattr(adaptations, "DEV", tmp_path)
    (tmp_path / "ops.py").write_text("one")
    first = adaptations.digest((rewrite, add))
    assert adaptations.digest((rewrite, add)) == first
    assert adaptations.digest((rewrite,)) != first
    (tmp_path / "ops.py").write_text("two")
    assert adaptations.digest((rewrite, add)) != first


# ---- what they brought


@ours_only
def test_each_entry_left_its_trace_in_the_installed_package():
    marker = json.loads((PACKAGE / "jigsaw_adaptation.json").read_text())
    reasons = [entry.reason for entry in adaptations.ADAPTATIONS]
    assert len(marker["changes"]) == len(reasons)
    assert all(map(str.endswith, marker["changes"], reasons))
    assert metadata.version("detectron2") == "0.6+jigsaw"


def test_zoo_configs_are_there_in_both_forms():
    for name in ("faster_rcnn_R_50_C4_1x", "faster_rcnn_R_50_FPN_1x", "retinanet_R_50_FPN_1x"):
        assert model_zoo.get_config(f"COCO-Detection/{name}.yaml").MODEL.META_ARCHITECTURE
    lazy = model_zoo.get_config("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
    assert lazy.model.backbone.bottom_up
    with pytest.raises(RuntimeError, match="not available in Model Zoo"):
        model_zoo.get_config_file("COCO-Detection/no_such.yaml")


@pytest.mark.parametrize(
    "module, name",
    [
        ("detectron2.projects.point_rend", "add_pointrend_config"),
        ("detectron2.projects.deeplab", "add_deeplab_config"),
        ("detectron2.projects.panoptic_deeplab", "add_panoptic_deeplab_config"),
        ("detectron2.export", "TracingAdapter"),
        ("detectron2.utils.analysis", "FlopCountAnalysis"),
    ],
)
def test_bundled_projects_and_tools_import(module, name):
    if not ADAPTED:
        pytest.importorskip("panopticapi" if "panoptic" in module else "detectron2")
    assert hasattr(importlib.import_module(module), name)


@ours_only
def test_scheduler_hook_saves_and_restores_plain_schedulers():
    def hook():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3)
        return hooks.LRScheduler(optimizer, scheduler), optimizer, scheduler

    first, optimizer, scheduler = hook()
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    state = first.state_dict()
    assert state["last_epoch"] == 4
    second, _, restored = hook()
    second.load_state_dict(state)
    assert restored.last_epoch == 4 and restored.get_last_lr() == scheduler.get_last_lr()


def test_map_dataset_falls_back_where_its_function_gives_none():
    dataset = MapDataset([0, 1, 2, 3], lambda x: None if x == 1 else x)
    expected = random.Random(42).sample((0, 2, 3), k=1)[0]
    assert dataset[1] == expected
    assert dataset[3] == 3


def test_heads_with_group_norm_are_built():
    """FCOS's norm is group norm by default; RetinaNet's where MODEL.RETINANET.NORM asks for it."""
    levels = [ShapeSpec(channels=64, stride=8)] * 2
    options = {"input_shape": levels, "num_classes": 3, "conv_dims": [64], "norm": "GN"}
    for head in (FCOSHead(**options), RetinaNetHead(num_anchors=1, **options)):
        norms = [m for m in head.modules() if isinstance(m, torch.nn.GroupNorm)]
        assert [norm.num_channels for norm in norms] == [64, 64]
        outputs = head([torch.zeros(1, 64, 4, 4)] * 2)
        assert outputs[0][1].shape == (1, 3, 4, 4)
