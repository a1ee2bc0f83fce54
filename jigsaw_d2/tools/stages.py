"""Stages of a job: each a command of this project, run as a user would type it, and never twice.

A stage owns a folder. ``stage.json`` in it holds the settings that its result depends on and the
digests of what it read. So the same call goes on where it stopped, other settings stop with both
shown, and nothing that a stage has made is ever deleted.
"""

import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jigsaw_d2.io import ConfigError, RunError, write_text

STAGE_FILE = "stage.json"
LOG = "stage.log"
PROGRESS_SECONDS = 15.0

Say = Callable[[str], None]
Runner = Callable[["Stage", list[str], Say], None]


@dataclass(frozen=True)
class Stage:
    """One command with all that its result depends on.

    Attributes:
        title: what it does, for people.
        argv: the command line behind ``python -m jigsaw_d2``.
        folder: written by this stage alone.
        output: file or folder in it that exists when the stage has succeeded.
        settings: {name: JSON-able value}: what the result depends on, inputs by their digests.
        resume: flags with which the command goes on in a folder that it left half done.
        iterations: of training, to tell progress by; 0 where there is none.
    """

    title: str
    argv: tuple[str, ...]
    folder: Path
    output: Path
    settings: Mapping[str, object]
    resume: tuple[str, ...]
    iterations: int = 0

    @property
    def command(self) -> str:
        """The command line as a user would type it."""
        return f"python -m jigsaw_d2 {shlex.join(self.argv)}"

    def is_done(self) -> bool:
        """Whether this stage has finished, with whichever settings."""
        known = _read_stage(self.folder)
        return known is not None and known["done"] and self.output.exists()

    def run(self, say: Say, runner: Runner | None = None) -> float:
        """Run the command, or go on with it, or find it done.

        Args:
            say: receives lines of progress.
            runner: how to run a command line; by default in a process of its own.

        Returns:
            Wall-clock seconds over all attempts.

        Raises:
            ConfigError: what the folder holds was made with other settings, or is something else.
            RunError: the command failed, or did not write its output.
        """
        known = _read_stage(self.folder)
        if known is None and self.folder.exists() and any(self.folder.iterdir()):
            raise ConfigError(f"{self.folder} holds files of something else: choose another folder")
        if known is not None and (self.output.exists() or any(self.folder.glob("*.pth"))):
            check_same(known["settings"], self.settings, self.folder)
        before = known["seconds"] if known else 0.0
        if self.is_done():
            say(f"{self.title}: done before, in {before:.0f} s")
            return before
        say(f"{self.title}: {'resumed' if known else 'started'}")
        argv = [self.argv[0], *(self.resume if known else ()), *self.argv[1:]]
        self.folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        self._write(before, done=False)
        try:
            (runner or run_subprocess)(self, argv, say)
        finally:
            seconds = before + time.monotonic() - started
            self._write(seconds, done=False)
        if not self.output.exists():
            raise RunError(f"{self.title} ended well but did not write {self.output}")
        self._write(seconds, done=True)
        say(f"{self.title}: finished in {seconds:.0f} s")
        return seconds

    def _write(self, seconds: float, done: bool) -> None:
        content = {"settings": self.settings, "seconds": seconds, "done": done}
        write_text(self.folder / STAGE_FILE, json.dumps(content, indent=1) + "\n")


def _read_stage(folder: Path) -> dict | None:
    path = folder / STAGE_FILE
    if not path.is_file():
        return None
    try:
        known = json.loads(path.read_text())
        return {key: known[key] for key in ("settings", "seconds", "done")}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is not of this version: choose another folder") from None


def check_same(old: Mapping[str, object], new: Mapping[str, object], place: Path) -> None:
    """Whether what lies in ``place`` was made with the settings of now.

    Raises:
        ConfigError: showing each setting that differs, old -> new.
    """
    new = json.loads(json.dumps(new))  # tuples as JSON gives them back
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    if names:
        changes = [f"{n}: {old.get(n, '(default)')} -> {new.get(n, '(default)')}" for n in names]
        raise ConfigError(
            f"{place} was made with other settings (there -> now): {'; '.join(changes)}\n"
            "Nothing was changed there. Choose another --output, or the settings of then."
        )


def run_subprocess(stage: Stage, argv: list[str], say: Say) -> None:
    """Run ``python -m jigsaw_d2`` in a process of its own, its output going to ``stage.log``.

    The process holds the log locked, so that no second one works in the same folder, not even
    beside one whose caller was killed.

    Raises:
        RunError: it ended with another status than 0, or another one is at work there.
    """
    log = stage.folder / LOG
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "jigsaw_d2", *argv]
    with log.open("ab") as sink:
        try:
            fcntl.flock(sink, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another process is at work in {stage.folder}: wait for it") from None
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment
        )
        try:
            with exit_on_sigterm():
                status = _watch(process, stage, say)
        except BaseException:  # Ctrl-C and SIGTERM too: no orphan may go on writing into the folder
            process.terminate()
            process.wait()
            raise
    if status != 0:
        end = log.read_text(errors="replace").strip().splitlines()[-15:] or ["no words"]
        raise RunError(
            f"{stage.title} failed with status {status}: {end[-1]}\nThe end of {log}:\n"
            + "\n".join(end)
        )


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, so that what runs below can be stopped first."""
    default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not default or threading.current_thread() is not threading.main_thread():
        yield  # a cluster's job has a handler of its own; only the main thread may set one
        return

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
    """How far a training is, from Detectron2's ``metrics.json`` in its folder."""
    latest = (read_metrics(stage.folder) or [None])[-1]
    if not stage.iterations or latest is None:
        return "at work"
    done = min(latest["iteration"] + 1, stage.iterations)
    loss = latest.get("total_loss")
    return f"iteration {done} of {stage.iterations}" + (
        "" if loss is None else f", loss {loss:.3f}"
    )


def read_metrics(folder: Path) -> list[dict]:
    """The lines of Detectron2's ``metrics.json``, without those that a kill has torn."""
    path = folder / "metrics.json"
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and "iteration" in line]
