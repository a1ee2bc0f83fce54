"""io.py: a file is there whole, or what was there before is."""

import os
import subprocess
import sys

import pytest

from jigsaw_d2.io import lock_folder, open_atomically, write_text


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with open_atomically(path, "w") as stream:
        stream.write("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("before", ["old", None])
def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path, before):
    path = tmp_path / "a.txt"
    if before is not None:
        write_text(path, before)
    with pytest.raises(OSError, match="disk full"):
        with open_atomically(path) as stream:
            stream.write(b"half")
            raise OSError("disk full")
    assert [p.read_text() for p in tmp_path.iterdir()] == ([] if before is None else [before])


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "elsewhere" / "real.txt")
    write_text(link, "text é")
    assert link.is_symlink()
    assert (tmp_path / "elsewhere" / "real.txt").read_text(encoding="utf-8") == "text é"


def test_a_folder_is_locked_against_other_processes_alone(tmp_path):
    code = "import sys, pathlib, jigsaw_d2.io as io; io.lock_folder(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with lock_folder(tmp_path):
        refused = subprocess.run(command, capture_output=True, text=True)
    assert "RunError: another process is writing" in refused.stderr
    assert subprocess.run(command).returncode == 0
