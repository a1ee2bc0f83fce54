"""The project's commands in processes that can be waited for, and killed."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import detectron2.engine.defaults

from jigsaw_d2.__main__ import main as jigsaw_d2


class Commands:
    """The project's commands in processes of their own.

    Children of a fork server, which has imported everything once and never touched the GPU: as
    good as fresh processes, without ten seconds of imports each.
    """

    def __init__(self, folder: Path, brief: bool = False) -> None:
        """
        Args:
            folder: for what they write.
            brief: without Detectron2's seconds of asking compilers for their versions.
        """
        self._folder, self._brief = folder, brief
        self._started: list[Command] = []
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["gpu_checks.bench", "jigsaw_d2.visualization.erf"])

    def start(self, *argv: object) -> "Command":
        """``python -m jigsaw_d2 ARGV``."""
        log = self._folder / f"command_{len(self._started)}.log"
        arguments = [str(item) for item in argv]
        process = self._context.Process(target=_run_command, args=(arguments, log, self._brief))
        process.start()
        self._started.append(Command(arguments[0], process, log))
        return self._started[-1]

    def kill(self) -> None:
        """End those that still run."""
        for command in self._started:
            if command.process.is_alive():
                command.kill()


class Command:
    """One running command; it leads a process group of its own."""

    def __init__(self, name: str, process: multiprocessing.Process, log: Path) -> None:
        self.name, self.process, self._log = name, process, log

    def wait(self) -> int:
        """Exit status; the negative signal of a killed one."""
        self.process.join()
        return self.process.exitcode

    def wait_for(self, path: Path) -> bool:
        """Until ``path`` exists; False if the command ends before it does."""
        while not path.exists():
            if not self.process.is_alive():
                return path.exists()
            time.sleep(0.01)
        return True

    def kill(self) -> int:
        """SIGKILL to it and to all that it has started; exit status."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # should it not lead its group yet
        return self.wait()

    def said(self, characters: int = 300) -> str:
        """The end of what it wrote."""
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        return text.strip()[-characters:]


def _run_command(argv: list[str], log: Path, brief: bool) -> None:
    os.setsid()
    if brief:
        detectron2.engine.defaults.collect_env_info = str
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    sys.exit(jigsaw_d2(argv))
