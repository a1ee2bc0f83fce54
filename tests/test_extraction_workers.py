"""Order, errors and death of worker processes."""

import os

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


def test_a_dead_worker_is_named_with_what_to_do() -> None:
    with Workers(2) as workers, pytest.raises(WorkerLostError, match="fewer --workers"):
        list(workers.map(square, ((n,) for n in (1, -1, 2))))
