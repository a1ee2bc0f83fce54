"""A pool of processes for what is done once for each image."""

import contextlib
import ctypes
import itertools
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import cv2

from jigsaw_d2.io import PeerLostError

# Tasks that a process is ahead of the one whose result is due, as results wait in memory.
AHEAD = 4
PR_SET_PDEATHSIG = 1  # of Linux's prctl
Mapper = Callable[[Callable, Iterable[tuple]], Iterator]


def default_workers() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def start_workers(count: int | None) -> Iterator[Mapper]:
    """A map over ``count`` processes (None: one for each core, 0: in this one).

    It gives ``function(*task)`` of every task, in order; raises PeerLostError where a process died.
    """
    count = default_workers() if count is None else count
    if count == 0:
        yield itertools.starmap
        return
    # The processes are the parallelism. OpenCV's own threads must be gone before the fork: a child
    # that inherits them half would wait for them for ever.
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    # fork: a worker starts in milliseconds and shares what is loaded already.
    pool = ProcessPoolExecutor(count, get_context("fork"), _end_with_parent)

    def run(function: Callable, tasks: Iterable[tuple]) -> Iterator:
        """Results in the order of ``tasks``, of which a few wait in each process."""
        pending = deque()
        try:
            for task in tasks:
                pending.append(pool.submit(function, *task))
                if len(pending) > AHEAD * count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise PeerLostError(
                "a worker process died (out of memory?): run the same command again with fewer "
                "--workers; finished shards are kept"
            ) from error

    try:
        yield run
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        cv2.setNumThreads(threads)


def _end_with_parent() -> None:
    """Otherwise a pool's process waits for work for ever where its parent was killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
