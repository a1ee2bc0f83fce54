"""Checkpoints of a run: whole or not at all, and read without executing anything.

``model_0004999.pth`` holds the state after iteration 4999. A file appears under its name only when
it is complete and on the disk; ``last_checkpoint`` names it only after that. So a kill at any
moment leaves the last good checkpoint as it was.
"""

import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer

from jigsaw_d2.errors import JigsawError

logger = logging.getLogger(__name__)


class CheckpointError(JigsawError, RuntimeError):
    """A checkpoint that cannot be read, or that belongs to another run."""


class JigsawCheckpointer(DetectionCheckpointer):
    """Writes {"model", **state} atomically and loads it strictly.

    ``state`` comes with each call of ``save``; nothing is looked up by matching names.
    """

    def save(self, name: str, **state: Any) -> None:
        """Write ``name``.pth and then let ``last_checkpoint`` name it."""
        path = Path(self.save_dir) / f"{name}.pth"
        logger.info("saving checkpoint to %s", path)
        save_atomically({"model": self.model.state_dict(), **state}, path)
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """As Detectron2's, but the old tag holds until the new one is on the disk."""
        write_atomically(Path(self.save_dir) / "last_checkpoint", last_filename_basename)

    def load_state(self, path: str | Path) -> dict[str, Any]:
        """Load the model strictly; return the rest of the checkpoint.

        Raises:
            CheckpointError: unreadable, or keys or shapes that differ from the model's.
        """
        checkpoint = read_checkpoint(path)
        try:
            self.model.load_state_dict(checkpoint.pop("model"))
        except RuntimeError as error:
            raise CheckpointError(f"{path} is of another model: {error}") from error
        logger.info("loaded the model of %s", path)
        return checkpoint


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A run's checkpoint, on the CPU; only tensors and plain values are accepted.

    Raises:
        CheckpointError: missing, damaged, or not one of this project's.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        folder = Path(path).parent
        others = ", ".join(sorted(p.name for p in folder.glob("model_*.pth"))) or "none"
        raise CheckpointError(f"{path} is missing; checkpoints in its folder: {others}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); write the name of an earlier "
            "one into last_checkpoint to resume from that"
        ) from error
    if not isinstance(checkpoint, dict) or not {"model", "jigsaw"} <= set(checkpoint):
        raise CheckpointError(f"{path} is no pre-training checkpoint of jigsaw_d2")
    return checkpoint


def save_atomically(content: Any, path: Path) -> None:
    """``torch.save`` under a temporary name, on the disk, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as f:
        torch.save(content, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """A small text file, replaced whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def truncate_metrics(path: Path, start_iter: int) -> int:
    """Drop from metrics.json what a resumed run writes again, and a line that a kill cut short.

    Args:
        path: one JSON object a line, each with "iteration".
        start_iter: first iteration that is run (again).

    Returns:
        Number of lines dropped.
    """
    if not path.is_file():
        return 0
    lines = path.read_text().splitlines()
    kept = [line for line in lines if _iteration(line) < start_iter]
    if len(kept) < len(lines):
        write_atomically(path, "".join(f"{line}\n" for line in kept))
    return len(lines) - len(kept)


def _iteration(line: str) -> float:
    """The line's iteration; infinite where the line is no whole record."""
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
