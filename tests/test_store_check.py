"""Every kind of damage is found and named."""

from pathlib import Path

import numpy as np
import pytest
from helpers_store import make_store

from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.data.store import check_store


@pytest.fixture
def store(tmp_path: Path) -> SampleStore:
    return make_store(tmp_path / "store", n_per_group=2)


def damage(store: SampleStore, offset: int, value: bytes = b"\xab") -> None:
    with open(store.paths[0] / "shard-00000.tar", "r+b") as file:
        file.seek(offset)
        file.write(value)


def faults(store: SampleStore, **options: bool) -> list[str]:
    return list(check_store(SampleStore(store.paths), **options))


def test_sound_store_has_no_faults(store: SampleStore) -> None:
    seen = []
    assert list(check_store(store, decode=True, progress=seen.append)) == []
    assert sum(seen) == len(store)


def test_flipped_byte(store: SampleStore) -> None:
    damage(store, int(store.parts[0].index["offset"][4]) + 300)
    found = faults(store)
    assert len(found) == 1
    assert "shard-00000.tar" in found[0] and store.key(4) in found[0] and "CRC-32" in found[0]


def test_damaged_tar_header(store: SampleStore) -> None:
    damage(store, int(store.parts[0].index["offset"][2]) - 500)
    assert [f"sample {store.key(2)}: its tar header is damaged" in f for f in faults(store)] == [
        True
    ]


def test_cut_shard(store: SampleStore) -> None:
    shard = store.paths[0] / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes()[: int(store.parts[0].index["offset"][5]) + 10])
    found = faults(store)
    assert "bytes where" in found[0] and "lies outside the shard" in found[1] and len(found) == 2


def test_missing_shard_is_said_once(store: SampleStore) -> None:
    (store.paths[0] / "shard-00000.tar").unlink()
    assert ["cannot be opened" in fault for fault in faults(store)] == [True]


def test_changed_index(store: SampleStore) -> None:
    index = np.load(store.paths[0] / "index.npy")
    index["class"][0] = 2
    np.save(store.paths[0] / "index.npy", index)
    assert "the index differs from the fingerprint" in faults(store)[0]


def test_undecodable_sample_is_found_where_asked(store: SampleStore) -> None:
    index = np.load(store.paths[0] / "index.npy")
    index["size"][1] += 1
    np.save(store.paths[0] / "index.npy", index)
    assert any("does not decode" in fault for fault in faults(store, decode=True))
    assert not any("does not decode" in fault for fault in faults(store))
