"""The reader: what was written comes back, in any process."""

import pickle

import numpy as np
import pytest
from helpers_store import make_store

from jigsaw_d2.sample_store import SampleStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SampleStore:
    return make_store(tmp_path_factory.mktemp("store") / "store")


def test_index_matches_the_samples(store: SampleStore) -> None:
    assert len(store) == 24
    assert np.bincount(store.groups).tolist() == [8, 8, 8]
    assert set(store.classes) == {0, 1, 2, 3}
    for i in range(len(store)):
        assert store.decode(i).shape == (*store.sizes[i], 3)


def test_window_equals_the_part_of_the_whole(store: SampleStore) -> None:
    for i in range(len(store)):
        height, width = store.sizes[i]
        window = (width // 3, height // 4, max(width // 3 + 1, width - 2), height)
        whole = store.decode(i)
        assert np.array_equal(store.decode(i, window), whole[window[1] :, window[0] : window[2]])


def test_pickled_store_reads_the_same(store: SampleStore) -> None:
    again = pickle.loads(pickle.dumps(store))
    assert again.fingerprint == store.fingerprint
    assert again[5] == store[5]
