"""Work shared out between processes, its results in the order of the tasks."""

import gc
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import cv2

from jigsaw_d2.errors import JigsawError

# Tasks submitted ahead of the one whose result is due, per process: enough that none idles while
# a slow one is awaited, few enough that results do not pile up in memory.
AHEAD = 4


# Bytes of the largest image that a worker keeps the memory of.
LARGEST_BLOCK = 16 << 20


class WorkerLostError(JigsawError, RuntimeError):
    """A worker process died, most often for want of memory."""


def default_workers() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _start_worker(parent: int) -> None:
    def exit_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    gc.freeze()
    gc.enable()
    # glibc gives freed memory back to the system unless it has seen larger blocks come and go; each
    # decoded image would then be faulted in anew, page by page.
    bytearray(LARGEST_BLOCK)


class Workers:
    """A pool of ``count`` processes as a context manager; 0 = work in this process.

    Large results travel through ``buffer``, at a third of what the pool's pipe takes for them.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None
        self._buffers: list[int] = []

    def __enter__(self) -> "Workers":
        if self.count:
            # The processes are the parallelism. OpenCV's own threads must be gone before the fork:
            # a child that inherits them half would wait for them for ever.
            self._threads = cv2.getNumThreads()
            cv2.setNumThreads(1)
            # What is loaded already, torch above all, and what will be, a whole dataset, is no
            # garbage: spare each process the walks over it, which would copy the shared pages, too.
            gc.freeze()
            self._collecting = gc.isenabled()
            gc.disable()
            # fork: a worker starts in milliseconds and shares what is loaded already.
            self._buffers = [os.memfd_create("result") for _ in range(AHEAD * self.count + 1)]
            self._pool = ProcessPoolExecutor(
                self.count, get_context("fork"), _start_worker, (os.getpid(),)
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            cv2.setNumThreads(self._threads)
            gc.unfreeze()
            if self._collecting:
                gc.enable()
            while self._buffers:
                os.close(self._buffers.pop())

    def buffer(self, number: int) -> int | None:
        """A file in memory, for the bytes of result ``number`` (from 0) of a ``map``.

        The file's descriptor, the same in all processes; it is used again once the result after
        this one is asked for. None where there are no other processes.
        """
        return self._buffers[number % len(self._buffers)] if self._buffers else None

    def map(self, function: Callable, tasks: Iterable[tuple]) -> Iterator:
        """``function(*task)`` of every task, in order; a single one's is not worth handing out.

        Raises:
            WorkerLostError: a process died.
        """
        tasks = iter(tasks)
        first = list(itertools.islice(tasks, 2))
        tasks = itertools.chain(first, tasks)
        if self._pool is None or len(first) < 2:
            yield from (function(*task) for task in tasks)
            return
        pending = deque()
        try:
            for task in tasks:
                pending.append(self._pool.submit(function, *task))
                if len(pending) > AHEAD * self.count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise WorkerLostError(
                "a worker process died (out of memory?): run the same command again with fewer "
                "--workers; finished shards are kept"
            ) from error
