"""Order, errors and death of worker processes."""

import gc
import os

import cv2
import numpy as np
import pytest

from jigsaw_d2.data.extraction import WorkerLostError, Workers


def process(_: int) -> int:
    return os.getpid()


def test_a_single_task_is_not_handed_out() -> None:
    with Workers(2) as workers:
        assert list(workers.map(process, [(0,)])) == [os.getpid()]
        assert os.getpid() not in list(workers.map(process, [(0,), (1,)]))


def square(n: int) -> int:
    if n == 99:
        raise KeyError("ninety-nine")
    if n == -1:
        os._exit(9)
    return n * n


@pytest.mark.parametrize("count", [0, 1, 3])
def test_results_come_in_order(count: int) -> None:
    with Workers(count) as workers:
        assert list(workers.map(square, ((n,) for n in range(50)))) == [n * n for n in range(50)]
        assert list(workers.map(square, [])) == []


@pytest.mark.parametrize("count", [0, 2])
def test_errors_come_through(count: int) -> None:
    with Workers(count) as workers, pytest.raises(KeyError, match="ninety-nine"):
        list(workers.map(square, ((n,) for n in (1, 99, 2))))


def leave(number: int, descriptor: int) -> int:
    return os.pwrite(descriptor, bytes([number]) * 1000, 0)


@pytest.mark.parametrize("count", [1, 3])
def test_a_buffer_is_not_used_again_before_its_result_was_taken(count: int) -> None:
    with Workers(count) as workers:
        results = workers.map(leave, ((n, workers.buffer(n)) for n in range(60)))
        for number, size in enumerate(results):
            assert os.pread(workers.buffer(number), 2000, 0) == bytes([number]) * size
    assert workers.buffer(0) is None and Workers(0).buffer(3) is None


def collects(_: int) -> bool:
    return gc.isenabled()


def test_garbage_is_collected_again_afterwards() -> None:
    frozen = gc.get_freeze_count()
    with Workers(1) as workers:
        assert list(workers.map(collects, [(0,), (1,)])) == [True, True] and not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() <= frozen


def shrink(size: int) -> int:
    """Work that OpenCV shares out between its threads where it has any."""
    return cv2.resize(np.zeros((size, size, 3), np.uint8), (size // 2, size // 2)).shape[0]


def test_opencv_threads_of_the_parent_do_not_hang_the_children() -> None:
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(4)
        assert shrink(2000) == 1000  # starts them
        with Workers(2) as workers:
            assert list(workers.map(shrink, [(2000,)] * 4)) == [1000] * 4
        assert cv2.getNumThreads() == 4
    finally:
        cv2.setNumThreads(threads)


def test_a_dead_worker_is_named_with_what_to_do() -> None:
    with Workers(2) as workers, pytest.raises(WorkerLostError, match="fewer --workers"):
        list(workers.map(square, ((n,) for n in (1, -1, 2))))
