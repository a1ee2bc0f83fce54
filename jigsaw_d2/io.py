"""What everything shares: the errors that a user can cause and mend, and files replaced whole.

Imports nothing of the project, and no torch.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


class JigsawError(Exception):
    """What was wrong, where, and how to mend it; commands show it as a single line.

    The kinds below are those that callers tell apart; each is also the builtin that fits.
    """


class ConfigError(JigsawError, ValueError):
    """Settings or arguments that make no sense, or contradict each other."""


class DataError(JigsawError, ValueError):
    """Annotations, images or a sample store that cannot be used."""


class CheckpointError(JigsawError, RuntimeError):
    """A run's file that cannot be read, or that belongs to another run."""


class WeightsError(JigsawError, RuntimeError):
    """Weights that do not fit the network, or that were made for other input."""


class RunError(JigsawError, RuntimeError):
    """A run that must not start, or that had to stop."""


class PeerLostError(RunError):
    """Another process of the job died or fell silent."""


@contextlib.contextmanager
def open_atomically(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """A file that appears under ``path`` when the block ends, whole and on the disk, or not at all.

    It is written beside ``path`` under a hidden name, which an error removes again; a kill leaves
    at most that. What ``path`` named before stays readable until then. A symbolic link is followed.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the renaming itself durable
    finally:
        os.close(folder)


def lock_folder(folder: Path, name: str = ".lock") -> IO:
    """Keep other processes from writing ``folder`` until the returned file is closed.

    The kernel lets go of it however this process ends; unlike a lock of flock, one of lockf does
    not live on in worker processes. Where the disk knows no locks, nothing is kept away.

    Raises:
        RunError: another process holds it.
    """
    stream = open(folder / name, "a")
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        stream.close()
        raise RunError(f"another process is writing {folder}; wait for it, or end it") from None
    except OSError:
        pass
    return stream


def write_text(path: str | Path, text: str) -> None:
    """``open_atomically`` for a text."""
    with open_atomically(path, "w") as stream:
        stream.write(text)
