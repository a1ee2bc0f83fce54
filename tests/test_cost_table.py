"""cost_table.py: the ledger beside ImageNet's recipes (digest of what came after)."""

import pytest

from jigsaw_d2.commands.cost import main
from jigsaw_d2.cost import LedgerError, record_stage
from jigsaw_d2.cost_table import REFERENCES, format_ledger, sum_stages


def test_the_papers_quarter_of_imagenet():
    """64k x 512 = 32.8 M images: 25.6 % of 100 epochs, 28.4 % of 90, more than the fast recipes."""
    jigsaw, ninety, hundred, fast, faster = (r.images for r in REFERENCES)
    assert jigsaw == 32_768_000
    assert round(100 * jigsaw / hundred, 1) == 25.6
    assert round(100 * jigsaw / ninety, 1) == 28.4
    assert fast < faster < jigsaw


def test_table_of_a_run_and_its_store(tmp_path, capsys):
    run, store = tmp_path / "run", tmp_path / "store"
    record_stage(store, "extraction", images=100, pixels=10**7, seconds=36, device="CPU")
    pixels = 10 * 224 * 224
    record_stage(
        run, "pretraining", images=10, pixels=pixels, flops=2e11, seconds=3600, device="CPU"
    )
    record_stage(run, "erf_refresh", images=10, pixels=pixels, flops=0, seconds=0, device="CPU")
    assert main([str(store), str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line.split("  ")[0]: line.split() for line in lines if line}
    assert table["extraction"][1:] == ["100", "10.0", "0", "0.010", "CPU"]
    assert table["pretraining"][1:4] == ["10", "0.5", "0.0002"]
    assert table["all"][1] == "120" and table["all"][4] == "1.010"
    # 128,116,700 images of the same size against 20: 6,405,835 times the pixels.
    assert table["ImageNet, 100 epochs"][-2] == f"{128_116_700 / 20:,.4g}"


def test_the_same_stage_of_two_runs_is_summed(tmp_path):
    for name in ("a", "b"):
        record_stage(tmp_path / name, "finetuning", images=4, seconds=2, device=name)
    stages = sum_stages([tmp_path / "a", tmp_path / "b"])
    assert stages["finetuning"]["images"] == 8
    assert stages["finetuning"]["devices"] == ["a", "b"]
    assert "ImageNet" not in format_ledger(tmp_path / "a")  # nothing to compare it with


def test_a_folder_without_ledger_is_named(tmp_path):
    with pytest.raises(LedgerError, match=f"{tmp_path} holds no cost.json"):
        format_ledger(tmp_path)
