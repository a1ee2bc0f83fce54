"""precision.py: what AMP settings mean on which hardware."""

import pytest
import torch

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.training.precision import (
    Precision,
    PrecisionError,
    has_bfloat16,
    resolve_amp_dtype,
    set_tf32,
)


def precision_of(*options: str) -> Precision:
    return Precision.from_config(
        get_jigsaw_cfg("jigsaw_R_50.yaml", ["MODEL.DEVICE", "cpu", *options])
    )


def test_without_amp_nothing_is_cast():
    precision = precision_of()
    assert precision.dtype is None and not precision.grad_scaler().is_enabled()
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize("name, scales", [("float16", True), ("bfloat16", False)])
def test_named_types_are_taken_and_only_float16_is_scaled(name, scales):
    precision = precision_of("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", name)
    assert precision.dtype == getattr(torch, name)
    assert precision.grad_scaler().is_enabled() == scales
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == precision.dtype


def test_auto_follows_the_hardware(monkeypatch):
    monkeypatch.setattr("jigsaw_d2.training.precision.has_bfloat16", lambda device: True)
    assert resolve_amp_dtype("auto", "cpu") == resolve_amp_dtype("auto", "cuda") == torch.bfloat16
    monkeypatch.setattr("jigsaw_d2.training.precision.has_bfloat16", lambda device: False)
    assert resolve_amp_dtype("auto", "cpu") is None
    assert resolve_amp_dtype("auto", "cuda") == torch.float16


@pytest.mark.parametrize(
    "text, expected",
    [
        ("flags\t\t: fpu sse avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("flags\t\t: fpu sse avx512f avx512_bf16", False),  # slower than float32 without AMX
        ("flags\t\t: fpu sse avx512f", False),
        ("Features\t: fp asimd bf16", True),  # ARM
        ("", False),
    ],
)
def test_bfloat16_is_read_off_the_cpus_flags(text, expected, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr("jigsaw_d2.training.precision._CPUINFO", tmp_path / "cpuinfo")
    assert has_bfloat16("cpu") == expected


def test_unknown_type_is_named():
    with pytest.raises(PrecisionError, match="SOLVER.AMP.DTYPE is 'fp8'; choose one of float16"):
        resolve_amp_dtype("fp8", "cpu")


def test_tf32_is_a_switch():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for enabled in (True, False):
            set_tf32(enabled)
            assert torch.backends.cuda.matmul.allow_tf32 == enabled
            assert torch.backends.cudnn.allow_tf32 == enabled
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
