"""Check a whole store against its index: every byte that training will read."""

from collections.abc import Callable, Iterator

import numpy as np

from jigsaw_d2.sample_store import SampleStore
from jigsaw_d2.store.format import (
    BLOCK,
    SUFFIXES,
    DamagedSampleError,
    StoreError,
    crc32,
    fingerprint,
    sample_key,
    tar_header,
)
from jigsaw_d2.store.part import StorePart


def check_store(
    store: SampleStore, decode: bool = False, progress: Callable[[int], object] = lambda n: None
) -> Iterator[str]:
    """Every fault found, as a sentence that names its place; nothing where the store is sound.

    Args:
        decode: decode each sample too.
        progress: called with the number of samples checked since its last call.
    """
    first = 0
    for part in store.parts:
        if fingerprint(part.header["categories"], part.index) != part.header["fingerprint"]:
            yield f"{part.path}: the index differs from the fingerprint in the header"
        for number, shard in enumerate(part.header["shards"]):
            yield from _check_shard(part, number, shard)
        yield from _check_records(store, part, first, decode, progress)
        first += len(part.index)


def _check_shard(part: StorePart, number: int, shard: dict) -> Iterator[str]:
    file = part.path / shard["name"]
    try:
        size = len(part.shard(number))
    except StoreError as error:
        yield str(error)
        return
    if size != shard["bytes"]:
        yield f"{file}: {size} bytes where {shard['bytes']} were written"
    counted = int((part.index["shard"] == number).sum())
    if counted != shard["samples"]:
        yield f"{file}: the index holds {counted} samples of it, the header {shard['samples']}"


def _check_records(
    store: SampleStore,
    part: StorePart,
    first: int,
    decode: bool,
    progress: Callable[[int], object],
) -> Iterator[str]:
    for local in range(len(part.index)):
        try:
            _check_sample(part, part.index[local])
            if decode:
                store.decode(first + local)
        except DamagedSampleError as error:
            yield str(error)
        except StoreError:
            pass  # the shard is gone, which was said once
        progress(1)


def _check_sample(part: StorePart, record: np.void) -> None:
    key = sample_key(int(record["class"]), int(record["image_id"]), int(record["serial"]))
    number, offset, length = (int(record[name]) for name in ("shard", "offset", "length"))
    shard = part.shard(number)
    where = f"{part.path / part.header['shards'][number]['name']}: sample {key}"
    if offset < BLOCK or offset + length > len(shard):
        raise DamagedSampleError(f"{where}: lies outside the shard")
    if crc32(memoryview(shard)[offset : offset + length]) != int(record["crc32"]):
        raise DamagedSampleError(f"{where}: its CRC-32 differs from the index")
    name = f"{key}.{SUFFIXES[record['format']]}"
    if shard[offset - BLOCK : offset] != tar_header(name, length):
        raise DamagedSampleError(f"{where}: its tar header is damaged")
