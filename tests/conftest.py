"""What holds for every test, and fixtures that several test files share."""

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
