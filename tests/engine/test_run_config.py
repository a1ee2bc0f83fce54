"""run_config.py: a config made definite once, and refusals that name the key."""

import json
import logging
import shutil

import pytest
import torch
import yaml
from detectron2.modeling import build_model
from helpers_run import tiny_cfg
from helpers_store import make_store

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.engine.run_config import check_held_out, open_store, resolve_config, warn_of_changes
from jigsaw_d2.io import ConfigError


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store", n_per_group=2)


def test_everything_left_open_is_filled_in_once(tmp_path, store):
    overrides = ("SOLVER.IMS_PER_BATCH", 256, "SOLVER.REFERENCE_BATCH_SIZE", 512, "SEED", -1)
    cfg = resolve_config(tiny_cfg(tmp_path, *overrides), store)
    assert cfg.MODEL.JIGSAW.NUM_CLASSES == 3
    assert cfg.MODEL.RESNETS.NORM == "BN"
    assert cfg.SOLVER.MAX_ITER == 24 and cfg.SOLVER.REFERENCE_BATCH_SIZE == 256
    assert cfg.SEED >= 0
    assert resolve_config(cfg, store) == cfg
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    again = resolve_config(get_jigsaw_cfg(str(path)), store)
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


def test_a_drawn_seed_is_kept_by_the_run(tmp_path, store):
    cfg = tiny_cfg(tmp_path, "SEED", -1)
    first, second = resolve_config(cfg, store).SEED, resolve_config(cfg, store).SEED
    assert first != second
    (tmp_path / "run").mkdir()
    content = {"model": {}, "jigsaw": {"config": "SEED: 1234"}}
    torch.save(content, tmp_path / "run" / "model_0000002.pth")
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000002.pth")
    assert resolve_config(cfg, store).SEED == 1234


def test_what_a_trial_said_is_kept_by_the_run(tmp_path, store, monkeypatch):
    """A resume goes on in the same precision, whatever the machine would say today."""
    saved = (
        "SOLVER: {AMP: {ENABLED: true, DTYPE: bfloat16}}\nMODEL: {JIGSAW: {CHANNELS_LAST: true}}"
    )
    monkeypatch.setattr("jigsaw_d2.engine.precision._time_candidates", lambda cfg: 1 / 0)
    open_ = ("SOLVER.AMP.ENABLED", True, "MODEL.JIGSAW.CHANNELS_LAST", None)
    with pytest.raises(ZeroDivisionError):
        resolve_config(tiny_cfg(tmp_path, *open_), store)
    (tmp_path / "run").mkdir()
    content = {"model": {}, "jigsaw": {"config": saved}}
    torch.save(content, tmp_path / "run" / "model_0000002.pth")
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000002.pth")
    cfg = resolve_config(tiny_cfg(tmp_path, *open_), store)
    assert (cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE) == (True, "bfloat16")
    assert cfg.MODEL.JIGSAW.CHANNELS_LAST is True


@pytest.mark.parametrize(
    "overrides, world_size, message",
    [
        (("SOLVER.IMS_PER_BATCH", 6), 4, r"IMS_PER_BATCH 6 does not divide into 4 process"),
        (
            ("SOLVER.IMS_PER_BATCH", 512),
            5,
            "set it to 510 or 515 .* or use one of 1, 2, 4, 8, 16, 32, 64 process",
        ),
        (("SOLVER.ACCUMULATION_STEPS", 3), 1, "ACCUMULATION_STEPS 3"),
        (("SOLVER.ACCUMULATION_STEPS", 0), 1, "ACCUMULATION_STEPS 0"),
        (("MODEL.JIGSAW.NUM_CLASSES", 80), 1, "NUM_CLASSES is 80, but the store .* has 3"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, store, overrides, world_size, message):
    with pytest.raises(ConfigError, match=message):
        resolve_config(tiny_cfg(tmp_path, *overrides), store, world_size)


def test_a_machine_without_gpu_says_which_key_to_set(tmp_path, store, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="add MODEL.DEVICE cpu"):
        resolve_config(tiny_cfg(tmp_path, "MODEL.DEVICE", "cuda"), store)


def fake_gpus(monkeypatch, count: int) -> list:
    chosen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: chosen.append(str(device)))
    return chosen


def test_a_numbered_gpu_becomes_the_current_one(tmp_path, store, monkeypatch):
    chosen = fake_gpus(monkeypatch, 2)
    resolve_config(tiny_cfg(tmp_path, "MODEL.DEVICE", "cuda:1"), store)
    assert chosen == ["cuda:1"]
    with pytest.raises(ConfigError, match="cuda:2, but PyTorch sees 2 GPU"):
        resolve_config(tiny_cfg(tmp_path, "MODEL.DEVICE", "cuda:2"), store)
    with pytest.raises(ConfigError, match="cuda:1 with 2 processes"):
        resolve_config(tiny_cfg(tmp_path, "MODEL.DEVICE", "cuda:1"), store, 2)


def test_no_store_is_named():
    with pytest.raises(ConfigError, match="DATASETS.TRAIN names no sample store"):
        open_store(get_jigsaw_cfg("jigsaw_R_50.yaml"))


def test_parts_open_as_one_store(tmp_path, store):
    cfg = tiny_cfg(tmp_path)
    cfg.DATASETS.TRAIN = (str(store.paths[0]), str(tmp_path / "store"))
    assert len(open_store(cfg)) == len(store) + 24


def test_changes_against_a_checkpoint_are_listed(tmp_path, caplog):
    cfg = tiny_cfg(tmp_path)
    saved = cfg.dump()
    assert warn_of_changes(cfg, saved) == []
    cfg.SOLVER.BASE_LR, cfg.DATALOADER.NUM_WORKERS, cfg.OUTPUT_DIR = 0.5, 7, "elsewhere"
    with caplog.at_level(logging.WARNING):
        assert warn_of_changes(cfg, saved) == ["SOLVER.BASE_LR: 0.05 -> 0.5"]
    assert "other settings than before: SOLVER.BASE_LR" in caplog.text


def test_a_held_out_store_of_other_categories_is_refused(tmp_path):
    cfg = tiny_cfg(tmp_path)
    store = open_store(cfg)
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "store", other)
    header = json.loads((other / "header.json").read_text())
    cfg.DATASETS.TEST = (str(other),)
    check_held_out(cfg, store)
    (other / "header.json").write_text(json.dumps({**header, "dtype": "uint16"}))
    with pytest.raises(ConfigError, match="3 channels of uint16, DATASETS.TRAIN 3 channels of"):
        check_held_out(cfg, store)
    header["categories"] = header["categories"][::-1]
    (other / "header.json").write_text(json.dumps(header))
    with pytest.raises(ConfigError, match="same names in the same order"):
        check_held_out(cfg, store)


def test_a_feature_that_is_absent_is_named_where_the_template_is_fitted_too(tmp_path):
    wanted = ["INPUT.JIGSAW.FIT_TO", "auto", "MODEL.JIGSAW.IN_FEATURE", "p5"]
    cfg = tiny_cfg(tmp_path, *wanted)
    store = SampleStore(cfg.DATASETS.TRAIN)
    store.header["report"] = {"images": {"median_sides": [300, 400]}}
    with pytest.raises(ConfigError, match="p5"):
        build_model(resolve_config(cfg, store))
