"""The two commands of the hand-over as a user meets them: help, mistakes, files."""

from pathlib import Path

import pytest
import torch
from helpers_weights import FPN, THIN, convert, pretrain_config, pretrained, save_checkpoint

from jigsaw_d2.__main__ import main as jigsaw_d2
from jigsaw_d2.tools import convert as convert_command


def test_convert_prints_the_metadata_and_what_it_requires(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cfg = pretrain_config(*THIN)
    save_checkpoint(tmp_path / "c.pth", cfg, pretrained(cfg))
    arguments = ["convert", "--input", str(tmp_path / "c.pth"), "--output", str(tmp_path / "w.pth")]
    assert jigsaw_d2(arguments) == 0
    said = capsys.readouterr().out
    assert "categories: [cell, plate, rod]" in said
    assert "STRIDE_IN_1X1: false" in said and "FORMAT: RGB" in said
    assert (tmp_path / "w.pth.yaml").is_file()
    assert jigsaw_d2(arguments) == 2
    assert "w.pth exists; --force replaces it" in capsys.readouterr().err
    assert jigsaw_d2([*arguments, "--force"]) == 0


def test_mistakes_are_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    weights = str(convert(tmp_path, *THIN))
    torch.save([], tmp_path / "odd.pth")
    plain = ["finetune", "--config-file", FPN, "--weights"]
    for arguments, text in (
        (["convert", "--input", "absent", "--output", "w.pkl"], "absent: no such file"),
        (["convert", "--input", str(tmp_path / "odd.pth"), "--output", "w.pkl"], "found a list"),
        ([*plain, str(tmp_path / "odd.pth")], "no weights; found a list"),
        ([*plain, weights], "--match-architecture"),
        ([*plain, weights, "NO.KEY", "1"], "NO.KEY"),
        (["finetune", "--config-file", "none.yaml", "--weights", "none"], "no config 'none.yaml'"),
    ):
        assert jigsaw_d2(arguments) == 2
        error = capsys.readouterr().err
        assert text in error and error.startswith("error: ") and error.count("\n") == 1


def test_options_that_belong_together(capsys: pytest.CaptureFixture) -> None:
    for extra in (["--write-config", "x.yaml"], ["--config-file", FPN], ["SOLVER.MAX_ITER", "1"]):
        with pytest.raises(SystemExit) as done:
            convert_command.main(["--input", "a", "--output", "b.pkl", *extra])
        assert done.value.code == 2
