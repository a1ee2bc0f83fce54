"""Order, errors and death of worker processes."""

import os

import cv2
import numpy as np
import pytest

from jigsaw_d2.extraction_workers import WorkerLostError, Workers


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
