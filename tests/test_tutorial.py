"""The tutorial runs, and says what it promises."""

import tutorial


def test_tutorial_runs_and_ends_with_a_detector(tmp_path, capsys):
    assert hasattr(tutorial.main(tmp_path), "roi_heads")
    printed = capsys.readouterr().out
    for number in range(1, 7):
        assert f"{number}. " in printed
    assert "8 steps done" in printed
