"""Detection set -> sample store: plan, cut, encode, write. One image is decoded once.

The plan (what to cut where) is geometry and comes first, so that the ratio of positives to
negatives holds over the whole dataset; then images are cut in chunks by a pool of processes, and
written in order by this one: the same bytes for any number of processes.
"""

import hashlib
import itertools
import json
import logging
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jigsaw_d2.data import store_format
from jigsaw_d2.data.arrays import ArrayReader, measure
from jigsaw_d2.data.image_reading import probe_image, read_pixels
from jigsaw_d2.data.plan import ImagePlan, add_negatives, plan_positives, take_part
from jigsaw_d2.data.report import ExtractionLog, advise_fit, summarise
from jigsaw_d2.data.samples import GROUPS, group_codes
from jigsaw_d2.data.sources import CocoSource, RegisteredSource, SourceData, SourceImage
from jigsaw_d2.data.store_writer import (
    DEFAULT_SHARD_SIZE,
    Sample,
    StoreWriter,
    check_free,
    make_chunk,
)
from jigsaw_d2.data.template import REGION_GROUPS, JigsawTemplate
from jigsaw_d2.data.workers import Mapper, start_workers
from jigsaw_d2.io import ConfigError, DataError

logger = logging.getLogger(__name__)
CHOICES = ("auto", *store_format.ENCODINGS)
# Bytes of pixels that "auto" leaves uncompressed: what stays in the memory of any machine that
# trains a detector, so that reading takes no longer than from a tenth of the bytes.
UNCOMPRESSED_UP_TO = 1 << 30
# Images to plan, images to cut and pixels of their samples in one task of a process at most.
PLAN_CHUNK, CUT_CHUNK, CUT_PIXELS = 128, 8, 1 << 24


@dataclass(frozen=True)
class ExtractionOptions:
    """How to extract. The first block determines the store's bytes, the second does not.

    Raises:
        ConfigError: a value that makes no sense, by its name.
    """

    seed: int = 0
    max_scale: float = 2.0  # a positive's sides grow to at most this times the box; 1 = no context
    negative_ratio: float = 0.1  # negatives per positive over the dataset (Sec. 3.1: 1 to 10)
    # Of the JPEGs, 1 to 100; asks for them where ``encoding`` is "auto". None: DEFAULT_QUALITY.
    quality: int | None = None
    # "jpeg"; without loss "png", slow to read, and "ppm", about ten times the bytes and nothing to
    # decode; "auto": "ppm" for at most UNCOMPRESSED_UP_TO bytes of the whole dataset, else "jpeg".
    encoding: str = "auto"
    # Of arrays, stored without loss as npy; 0: pictures, as Detectron2's reader gives them.
    channels: int = 0
    reader: str = ""  # "module:function" that reads arrays instead, see ``arrays.ArrayReader``
    dtype: str = ""  # of arrays; the extraction finds it
    class_files: bool = False  # add a .cls member with the class beside each sample
    min_side: float = 2.0  # pixels; ours: boxes with a shorter side show nothing and are skipped
    shard_size: int = DEFAULT_SHARD_SIZE  # bytes that a shard may hold
    template: JigsawTemplate = JigsawTemplate()  # decides which are written for window decoding
    scale_range: tuple[float, float] = (0.8, 1.5)  # samples will be resized by (Sec. 4.1)
    part: tuple[int, int] = (1, 1)  # (i, n): extract the i-th of n parts, i from 1
    # The detector's MIN_SIZE_TRAIN and MAX_SIZE_TRAIN, for which the report names a template.
    detector_size: tuple[float, float] = (800, 1333)
    workers: int | None = None  # processes; 0 = in this one, None = one for each core
    strict: bool = False  # stop at the first fault in the input
    overwrite: bool = False  # replace an existing store
    progress: bool = False  # show a progress bar

    def __post_init__(self) -> None:
        low, high = self.scale_range
        number, parts = self.part
        checks = {
            "seed": (self.seed >= 0, "0 or more"),
            "max_scale": (self.max_scale >= 1, "1 or more (1 = no context)"),
            "negative_ratio": (self.negative_ratio >= 0, "0 or more, e.g. 0.1 for one to ten"),
            "quality": (self.quality is None or 1 <= self.quality <= 100, "from 1 to 100"),
            "encoding": (
                self.encoding in CHOICES or (self.channels > 0 and self.encoding == "npy"),
                f"one of {', '.join(CHOICES)}",
            ),
            "channels": (self.channels >= 0, "the number that the images have, or 0 for pictures"),
            "shard_size": (self.shard_size > 0, "positive"),
            "scale_range": (0 < low <= high, "0 < low <= high"),
            "part": (1 <= number <= parts, "i/n with 1 <= i <= n"),
            "workers": (self.workers is None or self.workers >= 0, "0 or more"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {wanted}")
        if self.quality is not None and self.encoding in ("png", "ppm"):
            raise ConfigError(
                f"quality is {self.quality}, which only JPEGs have; encoding is {self.encoding}: "
                "leave one of them out"
            )

        if self.channels and (self.quality is not None or self.encoding not in ("auto", "npy")):
            raise ConfigError("arrays are stored as npy: leave encoding and quality out")
        if self.reader and not self.channels:
            raise ConfigError(f"reader {self.reader} reads arrays: say of how many channels")

    @property
    def array_reader(self) -> ArrayReader | None:
        """What reads arrays; None for pictures."""
        return ArrayReader(self.channels, self.reader) if self.channels else None

    def content(self) -> dict:
        """What determines the bytes of the store, for the header."""
        return dict(itertools.takewhile(lambda item: item[0] != "part", asdict(self).items()))

    def settle_encoding(self, pixels: float) -> "ExtractionOptions":
        """The options with encoding and quality that they leave open decided.

        ``pixels``: of all samples of the dataset, whatever part is extracted.
        """
        encoding, quality = "npy" if self.channels else self.encoding, self.quality
        if encoding == "auto":
            encoding = "ppm" if quality is None and 3 * pixels <= UNCOMPRESSED_UP_TO else "jpeg"
        quality = quality or store_format.DEFAULT_QUALITY if encoding == "jpeg" else None
        return replace(self, encoding=encoding, quality=quality)


def extract_samples(
    source: CocoSource | RegisteredSource,
    output: str | os.PathLike,
    options: ExtractionOptions = ExtractionOptions(),
    categories: list[str] | None = None,
) -> dict:
    """Extract the samples of ``source`` into a store at ``output``.

    An interrupted run leaves ``<output>.partial``; the same call completes it, taking over the
    finished shards. Part i of n goes to ``<output>/part-i-of-n``; ``output`` is then the store.

    Args:
        categories: what the dataset's must be, e.g. those of the training store.

    Returns:
        The report, as in the header; with "path" (the folder written), "images_read",
        "pixels_read" and "seconds" of this run.

    Raises:
        DataError: no usable object, other categories, ``output`` exists; if strict, any fault.
        RunError: ``output`` is being written by another process, or cannot be written.
        PeerLostError: a worker process died.
    """
    started, (number, parts) = time.monotonic(), options.part
    if parts > 1 and Path(output, store_format.HEADER_NAME).exists():
        raise DataError(f"{output} is a store itself: choose another folder for the parts of one")
    output = Path(output, *([f"part-{number}-of-{parts}"] if parts > 1 else []))
    check_free(output, options.overwrite)
    log = ExtractionLog(options.strict)
    with start_workers(options.workers) as run:
        data = source.load(log)
        if categories is not None and data.categories != categories:
            differing = sorted(set(data.categories) ^ set(categories)) or "their order"
            raise DataError(
                f"{source.name} has other categories than the training set, so its class numbers "
                f"would mean other things; they differ in {differing}: give both the same list"
            )
        plans, wanted = make_plan(data, options, run, log)
        measured = {}
        if options.array_reader:
            measured = measure([plan.path for plan in plans], options.array_reader)
            options = replace(options, dtype=measured["dtype"])
        options = options.settle_encoding(sum(plan.pixels for plan in plans))
        chunks = chunk_plans(take_part(plans, options.part))
        header = {
            "source": source.name,
            "category_ids": data.category_ids,
            "annotations_sha256": data.content_hash(),
            "image_ids_sha256": store_format.hash_image_ids(
                np.array([p.image_id for p in plans], np.int64)
            ),
            "seed": options.seed,
            "options": options.content(),
            "part": list(options.part),
            **measured,
        }
        with StoreWriter(
            output,
            data.categories,
            shard_size=options.shard_size,
            header=header,
            overwrite=options.overwrite,
            resume_key=_work_key(header, chunks),
        ) as writer:
            cut_log, images, pixels = _cut_all(chunks, options, run, writer)
            index = writer.index()
            if not len(index):
                why = cut_log.summary() or f"{len(plans)} images: ask for fewer parts"
                raise DataError(f"{output} would hold no sample; {why}")
            report = summarise(index, data.categories, options.template, options.scale_range)
            used = len(np.unique(index["image_id"]))
            sides = np.median(np.sort([plan.size for plan in plans]), axis=0).tolist()
            report["images"] = {"listed": len(data.images), "with_samples": used}
            report["images"]["median_sides"] = sides
            report["fit"] = advise_fit(index["size"], index["group"], sides, options.detector_size)
            report["negatives_wanted"] = wanted
            if parts == 1 and abs(report["negatives"] - wanted) > 0.01 * wanted:
                report["cautions"].append(
                    f"{report['negatives']} negatives instead of {wanted}: the images have no more "
                    "free room, or some could not be read. Training goes on with what there is."
                )
            report["log"] = {"dataset": log.to_dict(), "part": cut_log.to_dict()}
            writer.finish(report)
    report |= {"path": str(output), "images_read": images, "pixels_read": pixels}
    return {**report, "seconds": time.monotonic() - started}


def make_plan(
    data: SourceData, options: ExtractionOptions, run: Mapper, log: ExtractionLog
) -> tuple[list[ImagePlan], int]:
    """(plans of all usable images, negatives wanted); the same in every part and process."""
    chunks = [data.images[n : n + PLAN_CHUNK] for n in range(0, len(data.images), PLAN_CHUNK)]
    plans: list[ImagePlan] = []
    results = run(_plan_chunk, ((chunk, options) for chunk in chunks))
    bar = {"unit": f" x {PLAN_CHUNK} images", "disable": not options.progress}
    for done, chunk_log in tqdm(results, "plan", len(chunks), **bar):
        plans += done
        log.merge(chunk_log)
    classes = np.concatenate([np.zeros(0, np.int64), *(plan.classes for plan in plans)])
    if len(classes) == 0:
        raise DataError(
            f"{len(data.images)} images hold no usable object, so there is nothing to learn from; "
            f"{log.summary() or 'no annotation at all'}"
        )
    for n, name in enumerate(data.categories):
        if n not in classes:
            log.add("category_without_samples", name)
    wanted = round(len(classes) * options.negative_ratio)
    return add_negatives(plans, wanted, len(data.categories), options.seed, log), wanted


def _plan_chunk(
    images: list[SourceImage], options: ExtractionOptions
) -> tuple[list[ImagePlan], dict]:
    log = ExtractionLog(options.strict)
    probe = options.array_reader.probe if options.channels else probe_image
    how = (options.seed, options.max_scale, options.min_side, log, probe)
    plans = [plan_positives(image, *how) for image in images]
    return [plan for plan in plans if plan is not None], log.to_dict()


def chunk_plans(plans: list[ImagePlan]) -> list[list[ImagePlan]]:
    """``plans`` in the chunks that ``cut_images`` is given, in order.

    A shard ends where a chunk does, so the bytes of a store depend on the chunks, and the chunks on
    nothing but the plans.
    """
    chunks: list[list[ImagePlan]] = []
    pixels = 0.0
    for plan in plans:
        if not chunks or len(chunks[-1]) == CUT_CHUNK or pixels + plan.pixels > CUT_PIXELS:
            chunks.append([])
            pixels = 0
        chunks[-1].append(plan)
        pixels += plan.pixels
    return chunks


def cut_images(
    plans: list[ImagePlan], options: ExtractionOptions
) -> tuple[bytes, np.ndarray, dict]:
    """Read, cut and encode some images' samples; (tar members, RECORD (n,), what was skipped)."""
    log, samples = ExtractionLog(options.strict), []
    shown = shown_sizes(options.template, options.scale_range[0])
    how = {"quality": options.quality, "encoding": options.encoding}
    for plan in plans:
        try:
            image = (options.array_reader or read_pixels)(plan.path)
            if options.channels and image.dtype != options.dtype:
                raise DataError("image_of_other_form")
        except DataError as error:
            log.add(str(error), plan.path)
            continue
        if image.shape[:2] != plan.size:
            log.add("image_size_differs", f"{plan.path}: changed while the samples were extracted")
            continue
        rows = zip(plan.boxes, plan.gt_boxes, plan.classes, needs_windows(plan.boxes, shown))
        for serial, (box, gt_box, label, windows) in enumerate(rows):
            x0, y0, x1, y1 = map(int, box)
            encoded = store_format.encode_sample(image[y0:y1, x0:x1], **how, windows=bool(windows))
            where = (y1 - y0, x1 - x0), plan.image_id, serial
            samples.append(Sample(*encoded, int(label), *where, box, gt_box))
    return *make_chunk(samples, options.class_files), log.to_dict()


def shown_sizes(template: JigsawTemplate, min_scale: float) -> np.ndarray:
    """int (3, 2): the most (height, width), sample pixels, that a group's smallest region shows."""
    shown = np.full((3, 2), np.iinfo(np.int64).max)
    for group, size in zip(REGION_GROUPS, template.region_sizes):
        code = GROUPS.index(group)
        shown[code] = np.minimum(shown[code], np.ceil(np.array(size) / min_scale))
    return shown


def needs_windows(boxes: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Which samples of boxes (n, 4) are larger than some region can show; bool (n,)."""
    sizes = (boxes[:, 2:] - boxes[:, :2])[:, ::-1]
    return (sizes > shown[group_codes(sizes[:, 1], sizes[:, 0])]).any(axis=1)


def _cut_all(
    chunks: list[list[ImagePlan]], options: ExtractionOptions, run: Mapper, writer: StoreWriter
) -> tuple[ExtractionLog, int, int]:
    """Cut what an earlier run has not; (log of all, images and pixels of this run)."""
    log, images, pixels, done = ExtractionLog(options.strict), 0, 0, 0
    if writer.mark:
        done = writer.mark["chunks"]
        log.merge(writer.mark["log"])
        logger.info("%d finished shards of an interrupted run are kept", len(writer.shards))
    results = run(cut_images, ((chunk, options) for chunk in chunks[done:]))
    bar = {"unit": f" x {CUT_CHUNK} images", "disable": not options.progress, "initial": done}
    for members, records, chunk_log in tqdm(results, "cut", len(chunks), **bar):
        log.merge(chunk_log)
        sizes = [p.size for p in chunks[done] if p.image_id in records["image_id"]]
        images, pixels = images + len(sizes), pixels + sum(map(math.prod, sizes))
        done += 1
        writer.append(members, records, {"chunks": done, "log": log.to_dict()})
    return log, images, pixels


def _work_key(header: dict, chunks: list[list[ImagePlan]]) -> str:
    """Names the work exactly: the same key, the same bytes."""
    digest = hashlib.sha256(
        json.dumps([store_format.VERSION, header, list(map(len, chunks))]).encode()
    )
    for plan in itertools.chain(*chunks):
        digest.update(plan.path.encode() + plan.boxes.tobytes() + plan.classes.tobytes())
    return digest.hexdigest()
