"""Detection set -> sample store: plan, cut, encode, write. One image is decoded once.

The plan (what to cut where) is geometry and comes first, so that the ratio of positives to
negatives holds over the whole dataset; then images are cut in chunks by as many processes as there
are, and written in order by this one. The result is the same, byte for byte, for any number of
processes.
"""

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from jigsaw_d2.extraction.image_reading import ImageReadError, read_pixels
from jigsaw_d2.extraction.log import ExtractionError, ExtractionLog
from jigsaw_d2.extraction.negatives import add_negatives
from jigsaw_d2.extraction.options import ExtractionOptions, needs_windows, shown_sizes
from jigsaw_d2.extraction.plan import ImagePlan, chunked, plan_positives, take_part
from jigsaw_d2.extraction.report import build_report
from jigsaw_d2.extraction.sources import CocoSource, RegisteredSource, Source, SourceData
from jigsaw_d2.extraction.workers import Workers, default_workers
from jigsaw_d2.store.chunks import Chunk, ChunkBuilder, encode_sample
from jigsaw_d2.store.format import VERSION, hash_image_ids, part_name
from jigsaw_d2.store.jpeg_decoding import PixelMemory
from jigsaw_d2.store.writer import StoreWriter, check_free

__all__ = ["CocoSource", "ExtractionOptions", "RegisteredSource", "extract_samples"]
logger = logging.getLogger(__name__)

# Images per task. Small, so that the processes finish together; about 2 MB of encoded samples.
CUT_CHUNK = 16
PLAN_CHUNK = 64


class Cut(NamedTuple):
    """What a process hands back for one chunk of images."""

    chunk: Chunk
    log: ExtractionLog
    images: int
    pixels: int


def extract_samples(
    source: Source,
    output: str | os.PathLike,
    options: ExtractionOptions = ExtractionOptions(),
    categories: list[str] | None = None,
) -> dict:
    """Extract the samples of ``source`` into a store at ``output``.

    An interrupted run leaves ``<output>.partial``; the same call completes it, taking over the
    finished shards. Part i of n goes to ``<output>/part-i-of-n``;
    ``output`` is then the store.

    Args:
        categories: what the dataset's must be, e.g. those of the training store.

    Returns:
        The report, as in the header; with "path" (the folder written), "images_read",
        "pixels_read" and "seconds" of this run.

    Raises:
        ExtractionError: input without any usable object, or of other categories; under
            ``strict``, the first fault.
        StoreError: ``output`` exists, or is being written by another process.
        StoreWriteError: disk full or not writable.
    """
    started = time.monotonic()
    number, parts = options.part
    output = Path(output) / part_name(number, parts) if parts > 1 else Path(output)
    check_free(output, options.overwrite)
    log = ExtractionLog(options.strict)
    count = default_workers() if options.workers is None else options.workers
    with Workers(count) as workers:
        data = source.load(log)
        _check_categories(source, data, categories)
        plans, wanted = make_plan(data, options, workers, log)
        options = options.settle_encoding(plan.boxes for plan in plans)
        mine = take_part(plans, options.part)
        header = _header(source, data, plans, options)
        writer = StoreWriter(
            output,
            data.categories,
            shard_size=options.shard_size,
            header=header,
            overwrite=options.overwrite,
            resume_key=_work_key(header, mine),
        )
        with writer:
            read_log, images, pixels = _cut_all(mine, options, workers, writer)
            report = build_report(
                writer.index(), data.categories, options, wanted, (len(data.images), log, read_log)
            )
            writer.finish(report)
    seconds = time.monotonic() - started
    run = {"path": str(output), "images_read": images, "pixels_read": pixels, "seconds": seconds}
    return {**report, **run}


def make_plan(
    data: SourceData, options: ExtractionOptions, workers: Workers, log: ExtractionLog
) -> tuple[list[ImagePlan], int]:
    """(plans of all usable images, negatives wanted); the same in every part and process."""
    chunks = chunked(data.images, PLAN_CHUNK)
    tasks = ((c, options.seed, options.max_scale, options.min_side, options.strict) for c in chunks)
    plans = []
    bar = tqdm(total=len(data.images), desc="plan", unit="img", disable=not options.progress)
    for chunk, (done, chunk_log) in zip(chunks, workers.map(_plan_chunk, tasks)):
        plans += done
        log.merge(chunk_log)
        bar.update(len(chunk))
    bar.close()
    counts = np.zeros(len(data.categories), np.int64)
    for plan in plans:
        np.add.at(counts, plan.classes, 1)
    if counts.sum() == 0:
        raise ExtractionError(
            f"{len(data.images)} images hold no usable object, so there is nothing to learn from; "
            f"skipped: {dict(log.counts)}"
        )
    for name, count in zip(data.categories, counts):
        if count == 0:
            log.add("category_without_samples", name)
    wanted = round(int(counts.sum()) * options.negative_ratio)
    return add_negatives(plans, wanted, len(data.categories), options.seed, workers, log), wanted


def _plan_chunk(
    images: list, seed: int, max_scale: float, min_side: float, strict: bool
) -> tuple[list[ImagePlan], ExtractionLog]:
    log = ExtractionLog(strict)
    plans = plan_positives(images, seed=seed, max_scale=max_scale, min_side=min_side, log=log)
    return plans, log


def cut_images(
    plans: list[ImagePlan], options: ExtractionOptions, buffer: int | None = None
) -> Cut:
    """Read, cut and encode the samples of some images; their bytes go to ``Workers.buffer``."""
    log, builder = ExtractionLog(options.strict), ChunkBuilder(options.class_files, buffer)
    memory, shown = PixelMemory(), shown_sizes(options.template, options.scale_range[0])
    large = needs_windows(np.concatenate([plan.boxes for plan in plans]), shown).tolist()
    ends = np.cumsum([len(plan.boxes) for plan in plans]).tolist()
    images = pixels = 0
    for plan, end in zip(plans, ends):
        try:
            image = read_pixels(plan.path, plan.plain, plan.size, memory)
        except ImageReadError as error:
            log.add(error.reason, plan.path)
            continue
        if image.shape[:2] != plan.size:
            log.add("image_size_differs", f"{plan.path}: changed while the samples were extracted")
            continue
        images, pixels = images + 1, pixels + image.shape[0] * image.shape[1]
        boxes, gt_boxes, classes = (a.tolist() for a in (plan.boxes, plan.gt_boxes, plan.classes))
        windows = large[end - len(boxes) : end]
        for serial, box in enumerate(boxes):
            x0, y0, x1, y1 = map(int, box)
            encoded, interval, code = encode_sample(
                image[y0:y1, x0:x1],
                quality=options.quality,
                encoding=options.encoding,
                windows=windows[serial],
            )
            builder.add(
                encoded,
                class_index=classes[serial],
                size=(y1 - y0, x1 - x0),
                image_id=plan.image_id,
                serial=serial,
                box=box,
                gt_box=gt_boxes[serial],
                interval=interval,
                code=code,
            )
    return Cut(builder.build(), log, images, pixels)


def _cut_all(
    plans: list[ImagePlan], options: ExtractionOptions, workers: Workers, writer: StoreWriter
) -> tuple[ExtractionLog, int, int]:
    """Cut what an earlier run has not; (log of all, images and pixels of this run)."""
    chunks = chunked(plans, CUT_CHUNK)
    done = writer.mark["chunks"] if writer.mark else 0
    log = ExtractionLog.from_dict(writer.mark["log"] if writer.mark else {}, options.strict)
    if done:
        logger.info("%d finished shards of an interrupted run are kept", len(writer.shards))
    images = pixels = 0
    bar = tqdm(
        total=len(plans),
        initial=done * CUT_CHUNK,
        desc="cut",
        unit="img",
        disable=not options.progress,
    )
    tasks = ((c, options, workers.buffer(n)) for n, c in enumerate(chunks[done:]))
    for number, cut in enumerate(workers.map(cut_images, tasks), done):
        log.merge(cut.log)
        writer.append(cut.chunk, {"chunks": number + 1, "log": log.to_dict()})
        images, pixels = images + cut.images, pixels + cut.pixels
        bar.update(len(chunks[number]))
    bar.close()
    return log, images, pixels


def _check_categories(source: Source, data: SourceData, categories: list[str] | None) -> None:
    if categories is None or data.categories == categories:
        return
    differing = sorted(set(data.categories) ^ set(categories)) or "their order"
    raise ExtractionError(
        f"{source.name} has other categories than the training set, so its class numbers would "
        f"mean other things; they differ in {differing}: give both files the same list"
    )


def _header(
    source: Source, data: SourceData, plans: list[ImagePlan], options: ExtractionOptions
) -> dict:
    used = np.array([plan.image_id for plan in plans], np.int64)
    return {
        "source": source.name,
        "category_ids": data.category_ids,
        "annotations_sha256": data.content_hash(),
        "image_ids_sha256": hash_image_ids(used),
        "seed": options.seed,
        "options": options.content(),
        "part": list(options.part),
    }


def _work_key(header: dict, plans: list[ImagePlan]) -> str:
    """Names the work exactly: the same key, the same bytes."""
    digest = hashlib.sha256(json.dumps([VERSION, header]).encode())
    for plan in plans:
        digest.update(plan.path.encode() + plan.boxes.tobytes() + plan.classes.tobytes())
    return digest.hexdigest()
