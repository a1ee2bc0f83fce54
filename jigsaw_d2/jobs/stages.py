"""Stages of a long job: each a command of this project, run in its own process, skipped when done.

A stage owns one folder. ``stage.json`` in it tells which command line and which inputs made it, so
that a job called again goes on where it stopped: a finished stage is left alone, an interrupted one
resumes, and one whose command or inputs are others than before starts over.
"""

import contextlib
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from jigsaw_d2.errors import JigsawError

logger = logging.getLogger(__name__)

MARKER = "stage.json"
LOG = "stage.log"
PROGRESS_SECONDS = 15.0

Say = Callable[[str], None]
Runner = Callable[["Stage", list[str], Say], None]


class StageError(JigsawError, RuntimeError):
    """A stage's command failed; the message holds its last words and the log's path."""


@dataclass(frozen=True)
class Stage:
    """One command with all that its result depends on.

    Attributes:
        title: what it does, for people.
        argv: the command line behind ``python -m jigsaw_d2``.
        folder: written by this stage alone; emptied when the stage starts over.
        outputs: files or folders that exist when it has succeeded.
        inputs: JSON-able identity of what it reads besides its command line.
        iterations: of training, to tell progress by; 0 where there is none.
        resumable: the command can go on in a folder left half done; otherwise that is emptied.
        resume_argv: put into the command line then, before its argument number ``resume_at``.
    """

    title: str
    argv: tuple[str, ...]
    folder: Path
    outputs: tuple[Path, ...]
    inputs: dict = field(default_factory=dict)
    iterations: int = 0
    resumable: bool = False
    resume_argv: tuple[str, ...] = ()
    resume_at: int = 1

    @property
    def command(self) -> str:
        """The command line as a user would type it."""
        return f"python -m jigsaw_d2 {shlex.join(self.argv)}"


@dataclass(frozen=True)
class StageReport:
    """What a stage took: wall-clock seconds over all its attempts, and its command line."""

    title: str
    command: str
    seconds: float
    skipped: bool


def run_stage(stage: Stage, say: Say, runner: Runner | None = None) -> StageReport:
    """Run a stage, unless it is done already.

    Args:
        say: receives lines of progress.
        runner: how to run a command; by default in a process of its own.

    Raises:
        StageError: the command failed, or did not write its outputs.
    """
    known = read_marker(stage.folder)
    identity = _identity(stage)
    if is_done(stage):
        say(f"{stage.title}: done before, in {known['seconds']:.0f} s")
        return StageReport(stage.title, stage.command, known["seconds"], skipped=True)
    same = known is not None and all(known[key] == value for key, value in identity.items())
    resumed = same and not known["done"] and stage.resumable
    before = known["seconds"] if resumed else 0.0
    if not resumed:
        _empty(stage.folder)
    say(f"{stage.title}: {'resumed' if resumed else 'started'}")
    argv = list(stage.argv)
    if resumed:
        argv[stage.resume_at : stage.resume_at] = stage.resume_argv
    started = time.monotonic()
    _write_marker(stage.folder, {**identity, "seconds": before, "done": False})
    try:
        (runner or run_subprocess)(stage, argv, say)
    finally:
        seconds = before + time.monotonic() - started
        _write_marker(stage.folder, {**identity, "seconds": seconds, "done": False})
    missing = [str(path) for path in stage.outputs if not path.exists()]
    if missing:
        raise StageError(f"{stage.title} ended well but did not write {', '.join(missing)}")
    _write_marker(stage.folder, {**identity, "seconds": seconds, "done": True})
    say(f"{stage.title}: finished in {seconds:.0f} s")
    return StageReport(stage.title, stage.command, seconds, skipped=False)


def is_done(stage: Stage) -> bool:
    """Whether this very command has finished on these very inputs, and its outputs exist."""
    known = read_marker(stage.folder)
    return (
        known is not None
        and known["done"]
        and all(known[key] == value for key, value in _identity(stage).items())
        and all(path.exists() for path in stage.outputs)
    )


def _identity(stage: Stage) -> dict:
    return {"argv": list(stage.argv), "inputs": stage.inputs}


def read_marker(folder: Path) -> dict | None:
    """What ``stage.json`` of a stage's folder holds; None where there is none that can be read."""
    try:
        known = json.loads((folder / MARKER).read_text())
        return known if {"argv", "inputs", "seconds", "done"} <= set(known) else None
    except (OSError, ValueError):
        return None


def _write_marker(folder: Path, content: dict) -> None:
    temporary = folder / f"{MARKER}.tmp"
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, folder / MARKER)


def _empty(folder: Path) -> None:
    """Make ``folder`` an empty one; only a folder that a stage made is ever emptied.

    Raises:
        StageError: it holds files, and no stage's marker among them.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise StageError(f"{folder} holds files of something else: choose another --output")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def run_subprocess(stage: Stage, argv: list[str], say: Say) -> None:
    """Run ``python -m jigsaw_d2`` in a process of its own, its output going to ``stage.log``.

    Raises:
        StageError: it ended with another status than 0.
    """
    log = stage.folder / LOG
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "jigsaw_d2", *argv]
    with log.open("ab") as sink:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment
        )
        try:
            with _exit_on_sigterm():
                status = _watch(process, stage, say)
        except BaseException:  # Ctrl-C and SIGTERM too: no orphan may go on writing into the folder
            process.terminate()
            process.wait()
            raise
    if status != 0:
        raise StageError(
            f"{stage.title} failed with status {status}; the end of {log}:\n{_last_lines(log)}"
        )


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, so that what runs below can be stopped first."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _watch(process: subprocess.Popen, stage: Stage, say: Say) -> int:
    """Wait for a process and tell its progress meanwhile; its exit status."""
    told = time.monotonic()
    while True:
        try:
            return process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            pass
        if time.monotonic() - told >= PROGRESS_SECONDS:
            told = time.monotonic()
            say(f"{stage.title}: {progress_text(stage)}")


def progress_text(stage: Stage) -> str:
    """How far a stage is, from Detectron2's ``metrics.json`` in its folder, or its last message."""
    latest = last_metrics(stage.folder)
    if stage.iterations and latest is not None:
        done = min(latest["iteration"] + 1, stage.iterations)
        text = f"iteration {done} of {stage.iterations}"
        if done == stage.iterations:
            return f"{text}, evaluating"
        loss = latest.get("total_loss")
        return text if loss is None else f"{text}, loss {loss:.3f}"
    messages = [m for line in _last_lines(stage.folder / LOG).splitlines() if (m := _message(line))]
    return messages[-1] if messages else "at work"


def _message(line: str) -> str:
    """What a line of Detectron2's log says, without time and module; "" for other lines."""
    head, found, message = line.partition("]: ")
    return message.strip()[:100] if found and head.startswith("[") else ""


def last_metrics(folder: Path) -> dict | None:
    """The last whole line of ``metrics.json``; None before the first one."""
    try:
        lines = (folder / "metrics.json").read_text().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return json.loads(line)
        except ValueError:  # half a line, still being written
            continue
    return None


def _last_lines(path: Path, count: int = 15) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-count:])
    except OSError:
        return ""
