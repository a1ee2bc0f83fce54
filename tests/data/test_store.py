"""The reader: what was written comes back, in any process, or a named error does."""

import io
import json
import multiprocessing
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers_store import make_store
from PIL import Image

from jigsaw_d2.data.store import DamagedSampleError, SampleStore, check_store
from jigsaw_d2.data.store_format import decode_netpbm, encode_sample, read_header
from jigsaw_d2.io import DataError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SampleStore:
    return make_store(tmp_path_factory.mktemp("store") / "store")


def test_index_matches_the_samples(store: SampleStore) -> None:
    assert np.bincount(store.groups).tolist() == [8, 8, 8] and set(store.classes) == {0, 1, 2, 3}
    for i in range(len(store)):
        height, width = store.sizes[i]
        x0, y0, x1, y1 = window = (width // 3, height // 4, max(width // 3 + 1, width - 2), height)
        whole = store.decode(i)
        assert whole.shape == (height, width, 3)
        assert np.array_equal(store.decode(i, window), whole[y0:y1, x0:x1])
    types = {"classes": "i8", "groups": "u1", "sizes": "i4", "image_ids": "i8"}
    for name, kind in {**types, "boxes": "f4", "gt_boxes": "f4"}.items():
        column = getattr(store, name)
        assert len(column) == 24 and column.dtype == kind and not column.flags.writeable
    negatives = store.classes == len(store.categories)
    assert np.array_equal(store.gt_boxes[negatives], store.boxes[negatives])
    assert (store.boxes[:, 2:] - store.boxes[:, :2] == store.sizes[:, ::-1]).all()
    for i in (24, -1):
        with pytest.raises(IndexError, match="a store of 24"):
            store[i]


@pytest.mark.parametrize("window", [(0, 0, 0, 5), (-1, 0, 5, 5), (0, 0, 5, 10_000), (4, 4, 3, 9)])
def test_impossible_windows_are_refused(store: SampleStore, window: tuple) -> None:
    with pytest.raises(ValueError, match="is empty or leaves"):
        store.decode(0, window)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(store: SampleStore, method: str) -> None:
    store[0]  # mapped before the fork
    assert len(pickle.dumps(store)) < 10_000
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(store.__getitem__, range(24)) == [store[i] for i in range(24)]


def test_parts_open_as_one(tmp_path: Path) -> None:
    one = make_store(tmp_path / "store" / "part-1-of-2", seed=1)
    two = make_store(tmp_path / "store" / "part-2-of-2", seed=2)
    for both in (SampleStore(tmp_path / "store"), SampleStore([one.paths[0], two.paths[0]])):
        assert len(both) == 48
        assert both[0] == one[0] and both[24] == two[0] and both[47] == two[23]
        assert both.key(30) == two.key(6)
        assert np.array_equal(both.sizes, np.concatenate([one.sizes, two.sizes]))
        assert both.fingerprint not in (one.fingerprint, two.fingerprint)
        assert np.array_equal(both.decode(40), two.decode(16))


def test_missing_and_foreign_parts_are_named(tmp_path: Path) -> None:
    make_store(tmp_path / "store" / "part-1-of-3", n_per_group=1)
    with pytest.raises(DataError, match="3 parts are missing: part-2-of-3, part-3-of-3"):
        SampleStore(tmp_path / "store")
    make_store(tmp_path / "store" / "part-2-of-2", n_per_group=1)
    with pytest.raises(DataError, match="holds part-1-of-3, part-2-of-2; of 3 parts are missing"):
        SampleStore(tmp_path / "store")
    other = make_store(tmp_path / "other", n_per_group=1, classes=4)
    with pytest.raises(DataError, match="other categories"):
        SampleStore([tmp_path / "store" / "part-1-of-3", other.paths[0]])


def test_no_store_and_other_versions_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is no whole sample store"):
        SampleStore(tmp_path / "nowhere")
    with pytest.raises(DataError, match="at least one folder"):
        SampleStore([])
    path = make_store(tmp_path / "store", n_per_group=1).paths[0]
    header = read_header(path)
    (path / "header.json").write_text(json.dumps({**header, "version": 7}))
    with pytest.raises(DataError, match="version 7, this program reads version 1"):
        SampleStore(path)
    for content in ("{", "[]", json.dumps({"something": "else"})):
        (path / "header.json").write_text(content)
        with pytest.raises(DataError, match="not the header"):
            SampleStore(path)
    (path / "header.json").write_text(json.dumps({**header, "samples": 99}))
    with pytest.raises(DataError, match="does not belong to the header"):
        SampleStore(path)


@pytest.fixture
def small(tmp_path: Path) -> SampleStore:
    return make_store(tmp_path / "store", n_per_group=2)


def faults(store: SampleStore, **options: bool) -> list[str]:
    return list(check_store(SampleStore(store.paths), **options))


def flip(store: SampleStore, i: int, place: int = 100) -> None:
    """Change one byte of sample ``i`` on disk."""
    file = store.paths[0] / store.header["shards"][int(store.index["shard"][i])]["name"]
    with open(file, "r+b") as stream:
        stream.seek(int(store.index["offset"][i]) + place)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))


def test_flipped_byte_is_named_by_shard_and_key(small: SampleStore) -> None:
    flip(small, 3)
    where = f"shard-00000.tar: sample {small.key(3)}: .*CRC"
    with pytest.raises(DamagedSampleError, match=where):
        small.decode(3)
    assert small.decode(2) is not None  # the others are as they were
    assert len(small[3]) > 0  # plain reads do not check
    (fault,) = faults(small)
    assert re.search(where, fault)


@pytest.mark.parametrize("words", ["is gone", "replaced since it was opened"])
def test_vanished_and_replaced_stores_are_noticed(tmp_path: Path, words: str) -> None:
    store = make_store(tmp_path / "store", n_per_group=1)
    pickled = pickle.dumps(store)
    shutil.rmtree(tmp_path / "store")
    if words != "is gone":
        make_store(tmp_path / "store", n_per_group=1, seed=5)
    with pytest.raises(DataError, match=words):
        store[0]
    with pytest.raises(DataError, match=words):
        pickle.loads(pickled)


def picture(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (31, 17), (200, 5)])
def test_uncompressed_samples_come_back_here_and_in_pillow(size: tuple[int, int]) -> None:
    for image, rgb in (
        (picture(*size, 3), picture(*size, 3)[..., ::-1]),
        (picture(*size), picture(*size)),
    ):
        data = encode_sample(image, encoding="ppm")[0]
        pixels = decode_netpbm(data, image.ndim == 2, *size)
        assert np.array_equal(pixels, rgb) and np.array_equal(Image.open(io.BytesIO(data)), rgb)
        assert np.shares_memory(pixels, np.frombuffer(data, np.uint8))
        for wrong in (data[:-1], data + b"\0", b"P3" + data[2:], b""):
            with pytest.raises(ValueError, match="does not decode to the size"):
                decode_netpbm(wrong, image.ndim == 2, *size)


def test_sound_store_has_no_faults(small: SampleStore) -> None:
    seen = []
    assert list(check_store(small, decode=True, progress=seen.append)) == []
    assert sum(seen) == len(small)


def test_damaged_tar_header_is_named(small: SampleStore) -> None:
    flip(small, 2, -500)
    (fault,) = faults(small)
    assert f"sample {small.key(2)}: its tar header is damaged" in fault


def test_cut_and_missing_shards_are_named(small: SampleStore) -> None:
    shard = small.paths[0] / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes()[: int(small.index["offset"][5]) + 10])
    length, sample = faults(small)
    assert "bytes, in the index" in length and "lies outside the shard" in sample
    shard.unlink()
    assert ["cannot be opened" in fault for fault in faults(small)] == [True]  # said once


def test_changed_index_is_named(small: SampleStore) -> None:
    index = np.load(small.paths[0] / "index.npy")
    index["size"][1] += 1  # the CRC is right, but it is no image of this size
    np.save(small.paths[0] / "index.npy", index)
    with pytest.raises(DamagedSampleError, match="does not decode to the size"):
        SampleStore(small.paths[0]).decode(1)
    assert "the index differs from the fingerprint" in faults(small)[0]
    assert any("does not decode" in fault for fault in faults(small, decode=True))
    assert not any("does not decode" in fault for fault in faults(small))
