"""What holds for every test, and fixtures that several test files share."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_coco import make_coco
from hypothesis import settings

# The same examples at every run, and no clock: a busy machine must not fail a test.
settings.register_profile("house", deadline=None, derandomize=True, database=None)
settings.load_profile("house")


@pytest.fixture(scope="session")
def tiny_coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO-format folder (images/, train.json, val.json) of 12 + 4 images; leave it as it is."""
    return make_coco(tmp_path_factory.mktemp("tiny_coco") / "set")


@pytest.fixture(autouse=True)
def logs_end_with_their_test() -> Iterator[None]:
    """A run in this process leaves handlers of Detectron2's, whose streams pytest closes."""
    loggers = [logging.getLogger(name) for name in ("jigsaw_d2", "detectron2", "fvcore")]
    before = [(logger, list(logger.handlers), logger.propagate) for logger in loggers]
    yield
    for logger, handlers, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate
