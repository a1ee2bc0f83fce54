"""``python -m jigsaw_d2 store verify|describe``."""

from pathlib import Path

import pytest
from data.test_store import flip
from helpers_store import make_store

from jigsaw_d2.data.extraction import ExtractionOptions, extract_samples
from jigsaw_d2.data.sources import CocoSource
from jigsaw_d2.tools import run_command
from jigsaw_d2.tools.store import main


def test_verify_names_what_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store = make_store(tmp_path / "store")
    assert main(["verify", str(tmp_path / "store"), "--decode"]) == 0
    assert "24 samples, 3 categories: sound" in capsys.readouterr().out
    flip(store, 7)
    assert main(["verify", str(tmp_path / "store")]) == 1
    printed = capsys.readouterr().out
    assert f"shard-00000.tar: sample {store.key(7)}: its CRC-32 differs" in printed
    assert "1 faults" in printed


def test_verify_of_no_store(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_command(main, ["verify", str(tmp_path)]) == 2
    assert "no whole sample store" in capsys.readouterr().err


def test_describe_sums_over_parts(tiny_coco, tmp_path, capsys) -> None:
    source = CocoSource(tiny_coco / "train.json", tiny_coco / "images")
    for number in (1, 2):
        extract_samples(source, tmp_path / "s", ExtractionOptions(workers=0, part=(number, 2)))
    assert main(["describe", str(tmp_path / "s")]) == 0
    printed = capsys.readouterr().out
    assert "2 part(s), 2 shard(s)" in printed
    assert "48 samples: 44 positive, 4 negative" in printed
    # Planning saw the one crowd in both parts; it is there once.
    assert "  1  crowd" in printed


def test_describe_of_a_bare_store(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Stores that another program wrote with StoreWriter have no report."""
    make_store(tmp_path / "store", n_per_group=2)
    assert main(["describe", str(tmp_path / "store")]) == 0
    assert "6 samples" in capsys.readouterr().out
