"""The tutorial runs, and says what it promises."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "projects" / "JigsawPretrain" / "tutorial.py"


def test_tutorial_runs_and_ends_with_a_detector(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("tutorial", SCRIPT)
    tutorial = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tutorial)
    detector = tutorial.main(tmp_path)
    assert hasattr(detector, "roi_heads")
    printed = capsys.readouterr().out
    for number in range(1, 7):
        assert f"{number}. " in printed
    assert "8 steps done" in printed
