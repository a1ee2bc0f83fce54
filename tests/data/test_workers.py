"""The pool: results in order, errors through, nothing that hangs."""

import os

import cv2
import numpy as np
import pytest

from jigsaw_d2.data.workers import start_workers
from jigsaw_d2.io import PeerLostError


def square(n: int) -> int:
    if n == -1:
        os._exit(9)
    return n * n


@pytest.mark.parametrize("count", [0, 1, 3])
def test_results_come_in_order_and_errors_through(count: int) -> None:
    with start_workers(count) as run:
        assert list(run(square, ((n,) for n in range(50)))) == [n * n for n in range(50)]
        assert list(run(square, [])) == []
        with pytest.raises(TypeError):
            list(run(square, [(1,), ("text",)]))
        if count:
            with pytest.raises(PeerLostError, match="fewer --workers"):
                list(run(square, ((n,) for n in (1, -1, 2))))


def shrink(size: int) -> int:
    """Work that OpenCV shares out between its threads where it has any."""
    return cv2.resize(np.zeros((size, size, 3), np.uint8), (size // 2, size // 2)).shape[0]


def test_opencv_threads_of_the_parent_do_not_hang_the_children() -> None:
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(4)
        assert shrink(2000) == 1000  # starts them
        with start_workers(2) as run:
            assert list(run(shrink, [(2000,)] * 4)) == [1000] * 4
        assert cv2.getNumThreads() == 4
    finally:
        cv2.setNumThreads(threads)
