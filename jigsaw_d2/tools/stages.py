"""Stages of a job: each a command of this project, run as a user would type it, and never twice.

A stage owns a folder. ``stage.json`` in it holds the settings that its result depends on and the
digests of what it read. So the same call goes on where it stopped, other settings stop with both
shown, and nothing that a stage has made is ever deleted.
"""

import contextlib
import fcntl
import itertools
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from jigsaw_d2.io import ConfigError, RunError, write_text

PROGRESS_SECONDS = 15.0


def say(text: str) -> None:
    """A line of progress, at once."""
    print(text, flush=True)


@dataclass(frozen=True)
class Stage:
    """One command with all that its result depends on.

    Attributes:
        title: what it does, for people.
        argv: the command line behind ``program``.
        folder: written by this stage alone.
        output: file or folder in it that exists when the stage has succeeded.
        settings: {name: JSON-able value}: what the result depends on, inputs by their digests.
        resume: flag with which the command goes on in a folder that it left half done.
        iterations: of training, to tell progress by; 0 where there is none.
        held_out: names of settings that the result is scored by and does not come from: where they
            alone differ, the output steps aside and is made anew ...
        evaluate: ... with this flag if the stage was done, else as an interrupted one goes on.
        program: whose first word "python" is this interpreter; another is its path.
    """

    title: str
    argv: tuple[str, ...]
    folder: Path
    output: Path
    settings: Mapping[str, object]
    resume: str
    iterations: int = 0
    held_out: tuple[str, ...] = ()
    evaluate: str = ""
    program: tuple[str, ...] = ("python", "-m", "jigsaw_d2")

    @property
    def command(self) -> str:
        """The command line as a user would type it."""
        return shlex.join([*self.program, *self.argv])

    def is_done(self) -> bool:
        """Whether this stage has finished, with whichever settings."""
        known = self._read()
        return known is not None and known["done"] and self.output.exists()

    def run(self) -> float:
        """Run the command, or go on with it, or find it done.

        Returns:
            Wall-clock seconds over all attempts.

        Raises:
            ConfigError: what the folder holds was made with other settings, or is something else.
            RunError: the command failed, or did not write its output.
        """
        known = self._read()
        if known is None and self.folder.exists() and any(self.folder.iterdir()):
            raise ConfigError(f"{self.folder} holds files of something else: choose another folder")
        flags = [self.resume] if known else []
        if known is not None and (self.output.exists() or any(self.folder.glob("*.pth"))):
            changed = changed_settings(known["settings"], self.settings)
            if not set(changed) <= set(self.held_out):
                check_same(known["settings"], self.settings, self.folder)
            if changed and self.output.exists():
                flags = [self.evaluate or self.resume]
                say(f"{self.title}: the held-out set changed; {self._step_aside()} is what was")
        before = known["seconds"] if known else 0.0
        if self.is_done():
            say(f"{self.title}: done before, in {before:.0f} s")
            return before
        say(f"{self.title}: {'resumed' if known else 'started'}")
        argv = [self.argv[0], *flags, *self.argv[1:]]
        self.folder.mkdir(parents=True, exist_ok=True)
        _lock_log(self).close()  # before stage.json says that this process is at work
        started, done = time.monotonic(), False
        self._write(before, done)
        try:
            run_subprocess(self, argv)
            done = self.output.exists()
        finally:
            seconds = before + time.monotonic() - started
            self._write(seconds, done)
        if not done:
            raise RunError(f"{self.title} ended well but did not write {self.output}")
        say(f"{self.title}: finished in {seconds:.0f} s")
        return seconds

    def _step_aside(self) -> Path:
        """Rename the output to OUTPUT.1 or the next free number, which is returned."""
        _lock_log(self).close()
        stem, suffix = self.output.stem, self.output.suffix
        names = (self.output.with_name(f"{stem}.{n}{suffix}") for n in itertools.count(1))
        free = next(path for path in names if not path.exists())
        self.output.rename(free)
        return free

    def _read(self) -> dict | None:
        path = self.folder / "stage.json"
        if not path.is_file():
            return None
        try:
            known = json.loads(path.read_text())
            settings = known["settings"]
            if isinstance(settings.get("annotations"), list):  # as one setting, before 0.2
                settings["annotations"], settings["held_out"] = settings["annotations"]
            return {key: known[key] for key in ("settings", "seconds", "done")}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{path} is not of this version: choose another folder") from None

    def _write(self, seconds: float, done: bool) -> None:
        content = {"settings": self.settings, "seconds": seconds, "done": done}
        write_text(self.folder / "stage.json", json.dumps(content, indent=1) + "\n")


def changed_settings(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """Names of the settings that differ, sorted."""
    new = json.loads(json.dumps(new))  # tuples as JSON gives them back
    return sorted(name for name in {*old, *new} if old.get(name) != new.get(name))


def check_same(old: Mapping[str, object], new: Mapping[str, object], place: Path) -> None:
    """Whether what lies in ``place`` was made with the settings of now.

    Raises:
        ConfigError: showing each setting that differs, old -> new.
    """
    names = changed_settings(old, new)
    if names:
        changes = [f"{n}: {old.get(n, '(default)')} -> {new.get(n, '(default)')}" for n in names]
        raise ConfigError(
            f"{place} was made with other settings (there -> now): {'; '.join(changes)}\n"
            "Nothing was changed there. Choose another --output, or the settings of then."
        )


def _lock_log(stage: Stage) -> IO:
    """``stage.log``, which no other process can open so until it is closed, here and in children.

    Raises:
        RunError: another process is at work in the folder.
    """
    sink = (stage.folder / "stage.log").open("ab")
    try:
        fcntl.flock(sink, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sink.close()
        raise RunError(f"another process is at work in {stage.folder}: wait for it") from None
    return sink


def run_subprocess(stage: Stage, argv: list[str]) -> None:
    """Run a stage's program in a process of its own, its output going to ``stage.log``.

    The process holds the log locked, so that no second one works in the same folder, not even
    beside one whose caller was killed.

    Raises:
        RunError: it ended with another status than 0, or another one is at work there.
    """
    log = stage.folder / "stage.log"
    with _lock_log(stage) as sink:
        python, *module = stage.program
        command = [sys.executable if python == "python" else python, "-u", *module, *argv]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
        try:
            said = ""
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(PROGRESS_SECONDS)
                    break
                if (now := progress_text(stage)) != said:
                    say(f"{stage.title}: {now}")
                said = now
        finally:  # Ctrl-C and SIGTERM too: no orphan may go on writing into the folder
            process.terminate()
            status = process.wait()
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):  # told to stop, and it said so
        sys.exit(status)
    if status != 0:
        end = log.read_text(errors="replace").strip().splitlines()[-15:] or ["no words"]
        raise RunError(
            f"{stage.title} failed with status {status}: {end[-1]}\nThe end of {log}:\n"
            + "\n".join(end)
        )


def exit_on_sigterm() -> None:
    """Let SIGTERM raise SystemExit from here on, so that what runs below can be stopped first."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def progress_text(stage: Stage) -> str:
    """How far a training is, from Detectron2's ``metrics.json`` in its folder."""
    lines = [line for line in read_metrics(stage.folder) if "total_loss" in line]
    if not lines:
        return "at work"
    done, loss = lines[-1]["iteration"] + 1, lines[-1]["total_loss"]
    return f"iteration {done} of {stage.iterations}, loss {loss:.3f}"


def read_metrics(folder: Path) -> list[dict]:
    """The lines of Detectron2's ``metrics.json``, without those that a kill has torn."""
    path = folder / "metrics.json"
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and "iteration" in line]
