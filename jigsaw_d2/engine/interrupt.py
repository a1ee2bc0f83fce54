"""A notice to stop: SIGTERM of Slurm, of a spot machine or of ``docker stop``; SIGINT of Ctrl-C.

All ranks finish a step, one writes its checkpoint, and each process ends with 128 + the signal's
number, as a shell would say of one that the signal killed.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import torch
from detectron2.utils import comm

from jigsaw_d2.engine.state import get_random_state, set_random_state

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STATUSES = tuple(128 + number for number in SIGNALS)
# Several processes ask each other every so many steps: that takes a millisecond or two.
AGREE_PERIOD = 4
# Whoever asks a second time after so many seconds need not wait for the step to end.
PATIENCE = 2.0


class StopNotice:
    """Remembers the signal that this process got while it listens; a context manager ends that.

    Attributes:
        number: of the signal; 0 = none.
    """

    def __init__(self) -> None:
        self.number, self._since, self._at_once = 0, 0.0, False
        self._before: dict[int, object] = {}

    def listen(self) -> None:
        """From here on a signal is a notice."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def __enter__(self) -> "StopNotice":
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number == number and time.monotonic() - self._since > PATIENCE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.number:
            self.number, self._since = number, time.monotonic()
        if self._at_once:
            sys.exit(128 + self.number)

    def agreed(self, iteration: int) -> int:
        """The number of a signal that some rank got, the same on all; every rank calls it."""
        if comm.get_world_size() > 1 and iteration % AGREE_PERIOD:
            return 0
        number = max(comm.all_gather(self.number))
        self.number = number or self.number  # a signal may have come meanwhile
        return number

    @contextlib.contextmanager
    def evaluating(self, device: torch.device) -> Iterator[None]:
        """Inside, a signal ends the process at once, for the checkpoint is written already.

        Random states are afterwards as before, so that a run which was interrupted here, and goes
        on without the evaluation, is the same run.
        """
        state, self._at_once = get_random_state(device), bool(self._before)
        try:
            if self.number:
                sys.exit(128 + self.number)
            yield
        except SystemExit:
            logger.info("stopped by %s in an evaluation", signal.Signals(self.number).name)
            raise
        finally:
            self._at_once = False
        set_random_state(state, device)


@contextlib.contextmanager
def passed_on() -> Iterator[None]:
    """A signal to this process, which only waits for those that it started, is one to them."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Callable | int | None] = {}
    try:
        before.update({number: signal.signal(number, pass_on) for number in SIGNALS})
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
