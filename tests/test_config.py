"""config.py: the keys, where configs are found, and the paper's numbers in the shipped files."""

import re
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from jigsaw_d2.config import add_jigsaw_config, get_jigsaw_cfg
from jigsaw_d2.config_files import config_dir, find_config


def test_defaults_leave_detectron2_as_it_is():
    plain, ours = get_cfg(), get_cfg()
    add_jigsaw_config(ours)
    for section in ("MODEL", "INPUT", "SOLVER", "DATASETS", "DATALOADER", "TEST"):
        for key, value in plain[section].items():
            if not hasattr(value, "items"):
                assert ours[section][key] == value, (section, key)


def test_base_config_holds_every_number_of_the_paper():
    cfg = get_jigsaw_cfg("Base-JigsawPretrain.yaml")
    # Sec. 4.1, pre-training settings.
    assert cfg.SOLVER.MAX_ITER == 64000
    assert cfg.SOLVER.IMS_PER_BATCH == 512
    assert cfg.SOLVER.WARMUP_ITERS == 1250
    assert cfg.SOLVER.BASE_LR == 0.8
    assert cfg.SOLVER.BASE_LR * cfg.SOLVER.WARMUP_FACTOR == pytest.approx(0.2)
    assert cfg.SOLVER.WEIGHT_DECAY == cfg.SOLVER.WEIGHT_DECAY_NORM == 1e-4
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS == 1e-4
    assert cfg.MODEL.JIGSAW.ERF.PERIOD == 5000
    assert cfg.MODEL.JIGSAW.TAU == 0.7
    # Sec. 4.1, augmentation: mean and std are given for values in [0, 1].
    assert cfg.INPUT.JIGSAW.SCALE_RANGE == [0.8, 1.5]
    assert cfg.INPUT.JIGSAW.FLIP_PROB == 0.5
    assert cfg.MODEL.PIXEL_MEAN == pytest.approx([255 * v for v in (0.485, 0.456, 0.406)])
    assert cfg.MODEL.PIXEL_STD == pytest.approx([255 * v for v in (0.229, 0.224, 0.225)])
    # Fig. 4b.
    assert cfg.INPUT.JIGSAW.TEMPLATE_SIZE == [224, 224]
    assert cfg.INPUT.JIGSAW.TEMPLATE_SPLIT == [64, 64]
    # Nothing frozen, and the classified feature is built.
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 0
    assert cfg.MODEL.JIGSAW.IN_FEATURE in cfg.MODEL.RESNETS.OUT_FEATURES


@pytest.mark.parametrize("name", sorted(p.name for p in config_dir().glob("*.yaml")))
def test_every_shipped_config_loads(name):
    cfg = get_jigsaw_cfg(name)
    assert cfg.MODEL.META_ARCHITECTURE == "JigsawPretrainer"


def test_overrides_come_last():
    cfg = get_jigsaw_cfg("jigsaw_R_50.yaml", ["SOLVER.MAX_ITER", "7"])
    assert cfg.SOLVER.MAX_ITER == 7


def test_config_is_found_by_path_by_name_and_with_its_folder(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("SOLVER:\n  MAX_ITER: 3\n")
    assert find_config(str(path)) == path
    assert find_config("jigsaw_R_50.yaml").samefile(find_config("configs/jigsaw_R_50.yaml"))


def test_unknown_config_names_what_there_is():
    with pytest.raises(FileNotFoundError, match=r"no config 'jigsaw_R_51.yaml'.*jigsaw_R_50.yaml"):
        find_config("jigsaw_R_51.yaml")


def test_every_key_of_ours_has_a_reason_beside_it():
    lines = Path(add_jigsaw_config.__code__.co_filename).read_text().splitlines()
    keys = [n for n, line in enumerate(lines) if re.match(r"\s+cfg\.[A-Z.]+[A-Z_0-9]+ = ", line)]
    assert len(keys) > 20
    for n in keys:
        above = lines[n - 1].strip()
        explained = above.startswith("#") or "CfgNode()" in lines[n] or re.match(r"cfg\.", above)
        assert explained, lines[n]
