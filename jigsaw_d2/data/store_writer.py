"""Write a sample store: shards first, then the index, then the header, then the final name."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from jigsaw_d2.data import store_format
from jigsaw_d2.data.samples import group_codes
from jigsaw_d2.data.store_format import RECORD
from jigsaw_d2.io import DataError, RunError, lock_folder, open_atomically, write_text

DEFAULT_SHARD_SIZE = 256 << 20
END_OF_ARCHIVE = bytes(2 * store_format.BLOCK)
PROGRESS_NAME = "progress.json"
LOCK_NAME = "lock"
OLD_NAME = "old"  # what is replaced, until the new store has its name


def check_free(path: str | os.PathLike, overwrite: bool) -> None:
    """Raises DataError where a store may not be written: something else is there already.

    An empty folder, or an empty disk that is mounted there, may become one.
    """
    path, nothing = Path(path), (store_format.PARTIAL_NAME, "lost+found")
    is_free = path.is_dir() and all(file.name.startswith(nothing) for file in path.iterdir())
    if path.exists() and not is_free and not overwrite:
        raise DataError(f"{path} exists; --overwrite replaces it, or choose another folder")
    header = store_format.HEADER_NAME
    ours = (header, f"part-*/{header}", store_format.PARTIAL_NAME)
    if path.exists() and not is_free and not any(any(path.glob(name)) for name in ours):
        raise DataError(f"{path} is no sample store, which alone is replaced: name another folder")


class Sample(NamedTuple):
    """One encoded sample; the other fields are those of ``store_format.RECORD``."""

    encoded: bytes
    interval: int
    format: int
    class_index: int
    size: tuple[int, int]
    image_id: int
    serial: int
    box: np.ndarray
    gt_box: np.ndarray


def make_chunk(samples: Sequence[Sample], class_files: bool = False) -> tuple[bytes, np.ndarray]:
    """(tar members, their records RECORD (n,) with offsets from 0, "shard" not yet filled).

    Args:
        class_files: follow each sample by a ``.cls`` member of 1,024 bytes, for WebDataset readers
            that want one; the class is in the key and the index anyway.
    """
    records, parts, size = np.zeros(len(samples), RECORD), [], 0
    for n, s in enumerate(samples):
        row = (s.image_id, s.class_index, s.box, s.gt_box, s.size, len(s.encoded))
        rest = (store_format.crc32(s.encoded), 0, s.serial, s.interval, 0, s.format)
        records[n] = (size + store_format.BLOCK, *row, *rest)
        key = store_format.sample_key(s.class_index, s.image_id, s.serial)
        members = {f"{key}.{store_format.SUFFIXES[s.format]}": s.encoded}
        if class_files:
            members[f"{key}.cls"] = str(s.class_index).encode()
        for name, content in members.items():
            padding = bytes(-len(content) % store_format.BLOCK)
            parts += (store_format.tar_header(name, len(content)), content, padding)
            size += store_format.BLOCK + len(content) + len(padding)
    records["group"] = group_codes(records["size"][:, 1], records["size"][:, 0])
    return b"".join(parts), records


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; make room or choose another place, "
            "then run the same command again (finished shards are kept)"
        ) from error


class StoreWriter:
    """Writes under ``<path>.partial`` and renames when whole; use as a context manager.

    A symbolic link is followed. A mount point, such as a volume of Docker's, cannot be renamed: the
    partial folder lies within it, and its files are moved up, the header last.

    The partial folder holds the store to be (``store/``) and what a later run needs to go on.
    Leaving the block without ``finish`` leaves that alone behind; a writer with the same
    ``resume_key`` takes its finished shards over.

    Args:
        categories: names without background, in class order.
        shard_size: bytes that a shard may hold; a chunk that does not fit begins a new one.
        header: further entries of the header (seed, options, source ...).
        overwrite: replace an existing store, once the new one is whole.
        resume_key: names the work exactly; "" = never take over.

    Attributes:
        mark: the ``mark`` of the last chunk in the shards that were taken over; None = start anew.

    Raises:
        DataError: ``path`` exists and ``overwrite`` is off.
        RunError: another process is writing it, or the disk refuses.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        categories: list[str],
        *,
        shard_size: int = DEFAULT_SHARD_SIZE,
        header: dict | None = None,
        overwrite: bool = False,
        resume_key: str = "",
    ) -> None:
        check_free(path, overwrite)
        self.path = Path(os.path.realpath(path))
        self._is_mount = os.path.ismount(self.path)
        beside = self.path.with_name(self.path.name + ".partial")
        self.partial = self.path / store_format.PARTIAL_NAME if self._is_mount else beside
        self.folder = self.partial / "store"
        self.categories, self.header = list(categories), dict(header or {})
        self.shard_size, self.resume_key = shard_size, resume_key
        self.mark: dict | None = None
        self.shards: list[dict] = []
        self._records, self._open_records, self._file = [], [], None
        with _disk_errors(self.partial):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.partial, LOCK_NAME)
            self._take_over()

    def _take_over(self) -> None:
        """Keep the finished shards of an interrupted run of the same work; clear all else."""
        kept = {LOCK_NAME, OLD_NAME, self.folder.name}
        with contextlib.suppress(OSError, ValueError, KeyError):
            progress = json.loads((self.partial / PROGRESS_NAME).read_bytes())
            if self.resume_key and progress["resume_key"] == self.resume_key:
                names = [shard["name"] for shard in progress["shards"]]
                self._records = [np.load(self.partial / f"{name}.npy") for name in names]
                self.shards, self.mark = progress["shards"], progress["mark"]
                kept.update([PROGRESS_NAME], names, (f"{name}.npy" for name in names))
        for file in [*self.partial.iterdir(), *self.folder.iterdir()]:
            if file.name not in kept:
                file.unlink()

    def add(
        self,
        image: np.ndarray,
        class_index: int,
        *,
        image_id: int,
        box: np.ndarray | None = None,
        gt_box: np.ndarray | None = None,
        **encoding: object,
    ) -> None:
        """Encode and append one sample, uint8 RGB (h, w, 3) or grey (h, w); of "npy" any array.

        Boxes default to the whole of it; the rest is as for ``store_format.encode_sample``.
        """
        size = image.shape[:2]
        box = np.array([0, 0, size[1], size[0]], np.float32) if box is None else box
        gt_box = box if gt_box is None else gt_box
        as_it_is = image.ndim == 2 or encoding.get("encoding") == "npy"
        bgr = image if as_it_is else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        encoded = store_format.encode_sample(bgr, **encoding)
        sample = Sample(*encoded, class_index, size, image_id, 0, box, gt_box)
        self.append(*make_chunk([sample]))

    def append(self, members: bytes, records: np.ndarray, mark: dict | None = None) -> None:
        """Write a chunk of ``make_chunk`` behind what is there.

        ``mark``: where the work stands after it; comes back as the attribute after a kill.
        """
        with _disk_errors(self.partial):
            needed = len(members) + len(END_OF_ARCHIVE)
            if self._file is not None and self._file.tell() + needed > self.shard_size:
                self._close_shard()
            if len(records):
                if self._file is None:
                    self._file = open(self.folder / f"shard-{len(self.shards):05d}.tar", "wb")
                records["offset"] += self._file.tell()
                records["shard"] = len(self.shards)
                self._file.write(members)
                self._open_records.append(records)
        self._next_mark = mark

    def _close_shard(self) -> None:
        """Complete a shard; its bytes are on the disk before ``PROGRESS_NAME`` names it."""
        self._file.write(END_OF_ARCHIVE)
        name, size = Path(self._file.name).name, self._file.tell()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        records, self._open_records = np.concatenate(self._open_records), []
        with open_atomically(self.partial / f"{name}.npy") as file:
            np.save(file, records)
        self._records.append(records)
        self.shards.append({"name": name, "samples": len(records), "bytes": size})
        progress = {"resume_key": self.resume_key, "shards": self.shards, "mark": self._next_mark}
        write_text(self.partial / PROGRESS_NAME, json.dumps(progress, indent=1))

    def index(self) -> np.ndarray:
        """The records of all that was appended so far, RECORD (n,)."""
        return np.concatenate([np.zeros(0, RECORD), *self._records, *self._open_records])

    def finish(self, report: dict | None = None) -> None:
        """Write index and header, and give the store its name."""
        with _disk_errors(self.partial):
            if self._file is not None:
                self._close_shard()
            index = self.index()
            with open_atomically(self.folder / store_format.INDEX_NAME) as file:
                np.save(file, index)
            header = {
                "format": store_format.FORMAT,
                "version": store_format.VERSION,
                "categories": self.categories,
                "samples": len(index),
                "shards": self.shards,
                "fingerprint": store_format.fingerprint(self.categories, index),
                "image_ids_sha256": store_format.hash_image_ids(index["image_id"]),
                **self.header,
                "report": report or {},
            }
            write_text(self.folder / store_format.HEADER_NAME, json.dumps(header, indent=1))
            self._replace()

    def _replace(self) -> None:
        """Rename the finished folder; an old store steps aside first and goes last."""
        old = self.partial / OLD_NAME
        shutil.rmtree(old, ignore_errors=True)
        if self._is_mount:
            old.mkdir()
            names = [store_format.HEADER_NAME, store_format.INDEX_NAME, "shard-*.tar"]
            _move([file for name in names for file in self.path.glob(name)], old)
            files = list(self.folder.iterdir())
            _move(sorted(files, key=lambda file: file.name == store_format.HEADER_NAME), self.path)
        else:
            if self.path.exists():
                os.replace(self.path, old)
            os.replace(self.folder, self.path)
        shutil.rmtree(self.partial, ignore_errors=True)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            # What is unwritten is not wanted, and a full disk would raise again here.
            with contextlib.suppress(OSError):
                self._file.close()
        self._lock.close()


def _move(files: Sequence[Path], folder: Path) -> None:
    for file in files:
        os.replace(file, folder / file.name)
