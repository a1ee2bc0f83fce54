"""precision.py: what AMP settings mean, and what a trial settles."""

import pytest
import torch

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.engine import precision as module
from jigsaw_d2.engine.precision import (
    Precision,
    configure_backends,
    is_settled,
    settle_precision,
)
from jigsaw_d2.io import ConfigError

TINY = ["MODEL.DEVICE", "cpu", "MODEL.JIGSAW.NUM_CLASSES", "2", "MODEL.RESNETS.NORM", "BN"]
TINY += ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
TINY += ["INPUT.JIGSAW.TEMPLATE_SIZE", "[64, 64]", "INPUT.JIGSAW.TEMPLATE_SPLIT", "[32, 32]"]
TINY += ["SOLVER.IMS_PER_BATCH", "2"]


def tiny_cfg(*options: str):
    return get_jigsaw_cfg("jigsaw_R_50.yaml", [*TINY, *options])


def amp(enabled: bool, dtype: str) -> list[str]:
    return ["SOLVER.AMP.ENABLED", str(enabled), "SOLVER.AMP.DTYPE", dtype]


def test_without_amp_nothing_is_cast():
    precision = Precision.from_config(tiny_cfg(*amp(False, "auto")))
    assert precision.dtype is None and not precision.grad_scaler().is_enabled()
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize("name, scales", [("float16", True), ("bfloat16", False)])
def test_named_types_are_taken_and_only_float16_is_scaled(name, scales):
    precision = Precision.from_config(tiny_cfg(*amp(True, name)))
    assert precision.dtype == getattr(torch, name)
    assert precision.grad_scaler().is_enabled() == scales
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == precision.dtype


@pytest.mark.parametrize("name", ["fp8", "auto"])
def test_what_is_no_definite_type_is_named(name):
    with pytest.raises(ConfigError, match=f"SOLVER.AMP.DTYPE is '{name}'; choose one of float16"):
        Precision.from_config(tiny_cfg(*amp(True, name)))


def slow_down(monkeypatch, seconds: dict) -> list:
    """Let a candidate's step take what is said; returns the list of those that were tried."""
    tried = []

    def step_seconds(model, batch, precision):
        key = (precision.dtype, model.memory_format == torch.channels_last)
        tried.append(key)
        return seconds[key]

    monkeypatch.setattr(module, "_step_seconds", step_seconds)
    return tried


F32, BF16 = (None, torch.bfloat16)


@pytest.mark.parametrize(
    "fastest, expected",
    [
        ((F32, False), (False, "auto", False)),
        ((F32, True), (False, "auto", True)),
        ((BF16, False), (True, "bfloat16", False)),
        ((BF16, True), (True, "bfloat16", True)),
    ],
)
def test_the_faster_type_and_memory_format_are_taken(fastest, expected, monkeypatch, caplog):
    seconds = {(d, c): 1.0 for d in (F32, BF16) for c in (False, True)} | {fastest: 0.5}
    tried = slow_down(monkeypatch, seconds)
    cfg = tiny_cfg()
    with caplog.at_level("INFO"):
        settled = settle_precision(cfg)
    keys = settled.SOLVER.AMP
    assert (keys.ENABLED, keys.DTYPE, settled.MODEL.JIGSAW.CHANNELS_LAST) == expected
    assert sorted(map(str, tried)) == sorted(map(str, seconds)) and "500 ms" in caplog.text
    assert cfg.SOLVER.AMP.DTYPE == "auto" and cfg.MODEL.JIGSAW.CHANNELS_LAST is None
    assert is_settled(settled) and settle_precision(settled) == settled and len(tried) == 4


def test_what_is_given_is_not_tried(monkeypatch):
    tried = slow_down(monkeypatch, {(BF16, True): 1.0, (F32, True): 0.5})
    settled = settle_precision(tiny_cfg("MODEL.JIGSAW.CHANNELS_LAST", "True"))
    assert tried == [(F32, True), (BF16, True)] and not settled.SOLVER.AMP.ENABLED
    tried.clear()
    assert settle_precision(tiny_cfg("MODEL.JIGSAW.CHANNELS_LAST", "True", *amp(False, "auto")))
    assert not tried


def test_a_trial_makes_real_steps_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    settled = settle_precision(tiny_cfg())
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(settled.MODEL.JIGSAW.CHANNELS_LAST, bool) and is_settled(settled)


def test_backends_follow_the_config():
    try:
        for on in (True, False):
            configure_backends(tiny_cfg("SOLVER.TF32", str(on), "CUDNN_BENCHMARK", str(on)))
            assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == on
            assert torch.backends.cudnn.benchmark == on
            assert not torch.are_deterministic_algorithms_enabled()
        configure_backends(tiny_cfg("SOLVER.DETERMINISTIC", "True"))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
    finally:
        configure_backends(tiny_cfg("SOLVER.TF32", "False", "CUDNN_BENCHMARK", "False"))
