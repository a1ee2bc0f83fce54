"""Detection set -> sample store: plan, cut, encode, write. One image is decoded once.

The plan (what to cut where) is geometry and comes first, so that the ratio of positives to
negatives holds over the whole dataset; then images are cut in chunks by as many processes as there
are, and written in order by this one. The result is the same, byte for byte, for any number of
processes.
"""

import hashlib
import itertools
import json
import logging
import os
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jigsaw_d2.extraction.cutting import chunk_plans, cut_images
from jigsaw_d2.extraction.log import ExtractionError, ExtractionLog
from jigsaw_d2.extraction.negatives import add_negatives
from jigsaw_d2.extraction.options import ExtractionOptions
from jigsaw_d2.extraction.plan import ImagePlan, chunked, plan_positives, take_part
from jigsaw_d2.extraction.report import build_report
from jigsaw_d2.extraction.sources import CocoSource, RegisteredSource, Source, SourceData
from jigsaw_d2.extraction.workers import Workers, default_workers
from jigsaw_d2.store.format import VERSION, hash_image_ids, part_name
from jigsaw_d2.store.writer import StoreWriter, check_free

__all__ = ["CocoSource", "ExtractionOptions", "RegisteredSource", "extract_samples"]
logger = logging.getLogger(__name__)


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
        chunks = chunk_plans(take_part(plans, options.part))
        header = _header(source, data, plans, options)
        writer = StoreWriter(
            output,
            data.categories,
            shard_size=options.shard_size,
            header=header,
            overwrite=options.overwrite,
            resume_key=_work_key(header, chunks),
        )
        with writer:
            read_log, images, pixels = _cut_all(chunks, options, workers, writer)
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
    chunks = chunked(data.images)
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


def _cut_all(
    chunks: list[list[ImagePlan]],
    options: ExtractionOptions,
    workers: Workers,
    writer: StoreWriter,
) -> tuple[ExtractionLog, int, int]:
    """Cut what an earlier run has not; (log of all, images and pixels of this run)."""
    done = writer.mark["chunks"] if writer.mark else 0
    log = ExtractionLog.from_dict(writer.mark["log"] if writer.mark else {}, options.strict)
    if done:
        logger.info("%d finished shards of an interrupted run are kept", len(writer.shards))
    images = pixels = 0
    bar = tqdm(
        total=sum(map(len, chunks)),
        initial=sum(map(len, chunks[:done])),
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


def _work_key(header: dict, chunks: list[list[ImagePlan]]) -> str:
    """Names the work exactly: the same key, the same bytes."""
    sizes = [len(chunk) for chunk in chunks]
    digest = hashlib.sha256(json.dumps([VERSION, header, sizes]).encode())
    for plan in itertools.chain(*chunks):
        digest.update(plan.path.encode() + plan.boxes.tobytes() + plan.classes.tobytes())
    return digest.hexdigest()
