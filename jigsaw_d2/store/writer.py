"""Write a sample store: shards first, then the index, then the header, then the final name."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import cv2
import numpy as np

from jigsaw_d2.errors import JigsawError
from jigsaw_d2.store.chunks import DEFAULT_QUALITY, Chunk, ChunkBuilder, encode_sample
from jigsaw_d2.store.format import (
    BLOCK,
    FORMAT,
    HEADER_NAME,
    INDEX_NAME,
    RECORD,
    VERSION,
    StoreError,
    fingerprint,
    hash_image_ids,
    shard_name,
)

DEFAULT_SHARD_SIZE = 256 << 20
END_OF_ARCHIVE = bytes(2 * BLOCK)
PROGRESS_NAME = "progress.json"
LOCK_NAME = "lock"


class StoreWriteError(JigsawError, OSError):
    """The disk does not take the store: full, unwritable, or gone."""


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn what the system says into an error that says where and what to do."""
    try:
        yield
    except JigsawError:
        raise
    except OSError as error:
        raise StoreWriteError(
            f"cannot write {path}: {error.strerror or error}; make room or choose another place, "
            "then run the same command again (finished shards are kept)"
        ) from error


def check_free(path: str | os.PathLike, overwrite: bool) -> None:
    """Raises StoreError where a store may not be written: something is there already."""
    if Path(path).exists() and not overwrite:
        raise StoreError(f"{path} exists; --overwrite replaces it, or choose another folder")


class StoreWriter:
    """Writes under ``<path>.partial`` and renames when whole; use as a context manager.

    The partial folder holds the store to be (``store/``) and, beside it, what a later run needs to
    go on. Leaving the block without ``finish`` leaves no store behind, only the partial folder,
    whose finished shards a writer with the same ``resume_key`` takes over.

    Args:
        path: folder of the finished store.
        categories: names without background, in class order.
        shard_size: bytes that a shard may hold; a chunk that does not fit begins a new one.
        header: further entries of the header (seed, options, source ...).
        overwrite: replace an existing store, once the new one is whole.
        resume_key: names the work exactly; "" = never take over.

    Attributes:
        mark: the ``mark`` of the last chunk in the shards that were taken over; None = start anew.

    Raises:
        StoreError: ``path`` exists and ``overwrite`` is off, or another process is writing it.
        StoreWriteError: the disk refuses.
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
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.folder = self.partial / "store"
        self.categories = list(categories)
        self.shard_size = shard_size
        self.header = dict(header or {})
        self.resume_key = resume_key
        self.mark: dict | None = None
        self.shards: list[dict] = []
        self._records: list[np.ndarray] = []
        self._open_records: list[np.ndarray] = []
        self._file = None
        with _disk_errors(self.partial):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._lock_folder()
            self._take_over()

    def _lock_folder(self) -> TextIO:
        """Keep other processes out; the kernel lets go of the lock however this one ends.

        A lock of lockf, unlike one of flock, does not live on in worker processes.
        """
        lock = open(self.partial / LOCK_NAME, "a")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            lock.close()
            raise StoreError(f"another process is writing {self.partial}; wait for it") from None
        return lock

    def _take_over(self) -> None:
        """Keep the finished shards of an interrupted run of the same work; clear all else."""
        kept = {PROGRESS_NAME, LOCK_NAME, self.folder.name}
        with contextlib.suppress(OSError, ValueError, KeyError):
            progress = json.loads((self.partial / PROGRESS_NAME).read_bytes())
            if self.resume_key and progress["resume_key"] == self.resume_key:
                shards = progress["shards"]
                self._records = [np.load(self.partial / f"{s['name']}.npy") for s in shards]
                self.shards, self.mark = shards, progress["mark"]
                kept |= {s["name"] for s in shards} | {f"{s['name']}.npy" for s in shards}
        for file in [*self.partial.iterdir(), *self.folder.iterdir()]:
            if file.name not in kept:
                file.unlink()

    def add(
        self,
        image: np.ndarray,
        class_index: int,
        *,
        image_id: int,
        serial: int = 0,
        box: np.ndarray | None = None,
        gt_box: np.ndarray | None = None,
        quality: int = DEFAULT_QUALITY,
        encoding: str = "jpeg",
        windows: bool = False,
    ) -> None:
        """Encode and append one sample, uint8 RGB (h, w, 3) or grey (h, w).

        Boxes default to the whole of it; the rest is as for ``store.chunks.encode_sample``.
        """
        size = image.shape[:2]
        box = np.array([0, 0, size[1], size[0]], np.float32) if box is None else box
        gt_box = box if gt_box is None else gt_box
        bgr = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        encoded, interval, code = encode_sample(
            bgr, quality=quality, encoding=encoding, windows=windows
        )
        builder = ChunkBuilder()
        builder.add(
            encoded,
            class_index=class_index,
            size=size,
            image_id=image_id,
            serial=serial,
            box=box,
            gt_box=gt_box,
            interval=interval,
            code=code,
        )
        self.append(builder.build())

    def append(self, chunk: Chunk, mark: dict | None = None) -> None:
        """Write a chunk behind what is there.

        Args:
            mark: where the work stands after this chunk; comes back as ``mark`` after a kill.
        """
        with _disk_errors(self.partial):
            needed = chunk.size + len(END_OF_ARCHIVE)
            if self._file is not None and self._file.tell() + needed > self.shard_size:
                self._close_shard()
            if self._file is None and len(chunk.records):
                name = shard_name(len(self.shards))
                self._file = open(self.folder / name, "wb", buffering=0)
            if len(chunk.records):
                self._write(chunk)
        self._next_mark = mark

    def _write(self, chunk: Chunk) -> None:
        start, records = self._file.tell(), chunk.records.copy()
        records["offset"] += start
        records["shard"] = len(self.shards)
        chunk.write(self._file.fileno())
        self._open_records.append(records)
        # The kernel begins to write at once, so that the shard's end need not wait for all of it.
        os.posix_fadvise(self._file.fileno(), start, chunk.size, os.POSIX_FADV_DONTNEED)

    def _close_shard(self) -> None:
        self._file.write(END_OF_ARCHIVE)
        size = self._file.tell()
        _sync(self._file)
        self._file = None
        name, records = shard_name(len(self.shards)), np.concatenate(self._open_records)
        np.save(self.partial / f"{name}.npy", records)
        self._records.append(records)
        self._open_records = []
        self.shards.append({"name": name, "samples": len(records), "bytes": size})
        progress = {"resume_key": self.resume_key, "shards": self.shards, "mark": self._next_mark}
        _write_json(self.partial / PROGRESS_NAME, progress)

    def index(self) -> np.ndarray:
        """The records of all that was appended so far, RECORD (n,)."""
        return np.concatenate([np.zeros(0, RECORD), *self._records, *self._open_records])

    def finish(self, report: dict | None = None) -> None:
        """Write index and header, and give the store its name."""
        with _disk_errors(self.partial):
            if self._file is not None:
                self._close_shard()
            index = self.index()
            with open(self.folder / INDEX_NAME, "wb") as file:
                np.save(file, index)
                _sync(file)
            header = {
                "format": FORMAT,
                "version": VERSION,
                "categories": self.categories,
                "samples": len(index),
                "shards": self.shards,
                "fingerprint": fingerprint(self.categories, index),
                "image_ids_sha256": hash_image_ids(index["image_id"]),
                **self.header,
                "report": report or {},
            }
            _write_json(self.folder / HEADER_NAME, header)
            self._replace()

    def _replace(self) -> None:
        """Rename the finished folder; an old store steps aside first and goes last."""
        old = self.path.with_name(self.path.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.path.exists():
            os.replace(self.path, old)
        os.replace(self.folder, self.path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.partial, ignore_errors=True)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            # What is unwritten is not wanted, and a full disk would raise again here.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        self._lock.close()


def _sync(file: object) -> None:
    """Flush to the disk itself and close: a rename must not outlive the bytes that it names."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _write_json(path: Path, content: dict) -> None:
    """Replace ``path`` as a whole, so that a kill leaves the old or the new."""
    temporary = path.with_name(path.name + ".new")
    with open(temporary, "w") as file:
        json.dump(content, file, indent=1)
        _sync(file)
    os.replace(temporary, path)
