"""What is on disk after writing, and after not finishing."""

import io
import json
import multiprocessing
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers_store import draw_image, make_store
from PIL import Image

from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.data.store_format import RECORD, encode_sample, fingerprint
from jigsaw_d2.data.store_writer import Sample, StoreWriter, make_chunk
from jigsaw_d2.io import DataError, RunError

IMAGE = draw_image(40, 60, 0, np.random.default_rng(0))


def write(path: Path, count: int = 6, **options: object) -> None:
    """A store of ``count`` equal samples."""
    with StoreWriter(path, ["a", "b"], **options) as writer:
        append(writer, range(writer.mark["next"] if writer.mark else 0, count))
        writer.finish()


def append(writer: StoreWriter, numbers: range) -> None:
    for number in numbers:
        writer.append(*chunk_of(number), {"next": number + 1})


def chunk_of(*numbers: int, class_files: bool = False) -> tuple[bytes, np.ndarray]:
    box, gt_box = np.float32([0, 0, 60, 40]), np.float32([5, 5, 50, 30])
    encoded = encode_sample(IMAGE)
    samples = [Sample(*encoded, n % 3, (40, 60), n, 0, box, gt_box) for n in numbers]
    return make_chunk(samples, class_files)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_any_tar_reader_opens_the_shards_and_numpy_the_index(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", n_per_group=2)
    index = np.load(tmp_path / "store" / "index.npy", mmap_mode="r")
    assert index.dtype == RECORD and RECORD.itemsize == 80
    shard = tmp_path / "store" / "shard-00000.tar"
    with tarfile.open(shard) as tar:
        for i, member in enumerate(tar):
            assert member.name == f"{store.key(i)}.jpg"
            assert int(member.name.split("/")[0]) == store.classes[i]
            start, length = index["offset"][i], index["length"][i]
            content = tar.extractfile(member).read()
            assert content == store[i] == shard.read_bytes()[start : start + length]
            assert Image.open(io.BytesIO(content)).size == tuple(store.sizes[i][::-1])
    assert i == len(store) - 1


def test_webdataset_readers_find_classes_where_asked_for(tmp_path: Path) -> None:
    """WebDataset: consecutive members with the same name up to the first dot are one sample."""
    content, records = chunk_of(0, 1, class_files=True)
    with tarfile.open(fileobj=io.BytesIO(content + bytes(1024))) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    assert members["0001/1_000.cls"] == b"1"
    assert list(members) == ["0000/0_000.jpg", "0000/0_000.cls", "0001/1_000.jpg", "0001/1_000.cls"]
    assert content[records["offset"][1] :].startswith(members["0001/1_000.jpg"])


@pytest.mark.parametrize("encoding", ["png", "ppm"])
def test_lossless_stores(tmp_path: Path, encoding: str) -> None:
    grey = np.dstack([IMAGE[..., 0]] * 3)
    with StoreWriter(tmp_path / "store", ["a"]) as writer:
        writer.add(IMAGE, 0, image_id=1, encoding=encoding)
        writer.add(IMAGE[..., 0].copy(), 0, image_id=2, encoding=encoding)
        writer.finish()
    store = SampleStore(tmp_path / "store")
    for i, image in enumerate((IMAGE, grey)):
        assert np.array_equal(store.decode(i), image)
        assert np.array_equal(store.decode(i, (3, 4, 20, 30)), image[4:30, 3:20])


def test_existing_store_stays_unless_told_otherwise(tmp_path: Path) -> None:
    write(tmp_path / "store", 3)
    before = content(tmp_path / "store")
    with pytest.raises(DataError, match="exists; --overwrite"):
        write(tmp_path / "store", 5)
    assert content(tmp_path / "store") == before
    kept = tmp_path / "store.old"  # a user's, not ours
    shutil.copytree(tmp_path / "store", kept)
    write(tmp_path / "store", 5, overwrite=True)
    assert len(SampleStore(tmp_path / "store")) == 5
    assert content(kept) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store", "store.old"]


def test_only_a_store_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"a photo")
    with pytest.raises(DataError, match="is no sample store"):
        write(tmp_path / "photos", 3, overwrite=True)
    assert content(tmp_path / "photos") == {"a.jpg": b"a photo"}


def test_unfinished_is_never_taken_for_whole(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path / "store", ["a", "b"]) as writer:
        append(writer, range(4))
        raise KeyboardInterrupt
    for path in ("store", "store.partial", "store.partial/store"):
        with pytest.raises(DataError, match="no whole sample store"):
            SampleStore(tmp_path / path)


def test_interrupted_work_goes_on_behind_the_finished_shards(tmp_path: Path) -> None:
    options = {"shard_size": 12_000, "resume_key": "this work"}
    write(tmp_path / "whole", 12, **options)
    sizes = [shard["bytes"] for shard in SampleStore(tmp_path / "whole").header["shards"]]
    assert len(sizes) > 2 and max(sizes) <= 12_000
    with StoreWriter(tmp_path / "store", ["a", "b"], **options) as writer:
        append(writer, range(9))
    first = tmp_path / "store.partial" / "store" / "shard-00000.tar"
    written = first.stat().st_mtime_ns
    with StoreWriter(tmp_path / "store", ["a", "b"], **options) as writer:
        assert 0 < writer.mark["next"] < 9 and first.stat().st_mtime_ns == written
        append(writer, range(writer.mark["next"], 12))
        writer.finish()
    assert content(tmp_path / "store") == content(tmp_path / "whole")


def test_other_work_starts_anew(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s", ["a", "b"], shard_size=9000, resume_key="one") as writer:
        append(writer, range(6))
    with StoreWriter(tmp_path / "s", ["a", "b"], shard_size=9000, resume_key="two") as writer:
        assert writer.mark is None and len(writer.index()) == 0
        assert list((tmp_path / "s.partial" / "store").iterdir()) == []


def test_two_processes_do_not_write_one_store(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store", ["a", "b"]):
        with multiprocessing.get_context("fork").Pool(1) as pool:
            with pytest.raises(RunError, match="another process is writing"):
                pool.apply(write, (tmp_path / "store",))


def test_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot write .*file"):
        StoreWriter(tmp_path / "file" / "store", ["a"])


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    one = make_store(tmp_path / "one", seed=1)
    again = make_store(tmp_path / "again", seed=1)
    other = make_store(tmp_path / "other", seed=2)
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert content(tmp_path / "one") == content(tmp_path / "again")
    index = np.load(tmp_path / "one" / "index.npy")
    assert fingerprint(["other", "names", "here"], index) != one.fingerprint
    assert json.loads((tmp_path / "one" / "header.json").read_text())["version"] == 1


def write_one(path: Path, seed: int, **options: object) -> SampleStore:
    with StoreWriter(path, ["a"], **options) as writer:
        writer.add(np.full((9, 8, 3), seed, np.uint8), 0, image_id=seed, encoding="png")
        writer.finish()
    return SampleStore(path)


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "store")
    write_one(tmp_path / "link", 1)
    store = write_one(tmp_path / "link", 2, overwrite=True)
    assert (tmp_path / "link").is_symlink() and store.image_ids.tolist() == [2]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == [
        "disk",
        "link",
        "store",
    ]


def test_an_empty_folder_or_mounted_disk_takes_a_store(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "empty").mkdir()
    assert len(write_one(tmp_path / "empty", 1)) == 1
    volume = tmp_path / "volume"
    (volume / "lost+found").mkdir(parents=True)
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == volume)
    before = volume.stat().st_ino
    assert write_one(volume, 1).image_ids.tolist() == [1]
    with pytest.raises(DataError, match="--overwrite replaces it"):
        StoreWriter(volume, ["a"])
    assert write_one(volume, 2, overwrite=True).image_ids.tolist() == [2]
    assert volume.stat().st_ino == before
    names = {path.name for path in volume.iterdir()}
    assert names == {"lost+found", "header.json", "index.npy", "shard-00000.tar"}
