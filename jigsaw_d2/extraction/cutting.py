"""Planned images -> encoded samples: the work that is shared out between the processes."""

from typing import NamedTuple

import numpy as np

from jigsaw_d2.extraction.image_reading import ImageReadError, read_pixels
from jigsaw_d2.extraction.log import ExtractionLog
from jigsaw_d2.extraction.options import ExtractionOptions, needs_windows, shown_sizes
from jigsaw_d2.extraction.plan import ImagePlan
from jigsaw_d2.store.chunks import Chunk, ChunkBuilder, encode_sample
from jigsaw_d2.store.jpeg_decoding import PixelMemory

# A task is a chunk of images: at most so many, and so many pixels of samples, as several results
# wait in memory; and this part of what is left, but not less than the least, so that the processes
# finish together. A shard ends where a chunk does, so the bytes of a store depend on the chunks,
# and the chunks on nothing but the plans.
CUT_CHUNK, CUT_PIXELS = 32, 1 << 24
LEFT_PART, LEAST_CHUNK = 8, 4


class Cut(NamedTuple):
    """What a process hands back for one chunk of images."""

    chunk: Chunk
    log: ExtractionLog
    images: int
    pixels: int


def chunk_plans(plans: list[ImagePlan]) -> list[list[ImagePlan]]:
    """``plans`` in the chunks that ``cut_images`` is given, in order."""
    if not plans:
        return []
    sides = [plan.boxes[:, 2:] - plan.boxes[:, :2] for plan in plans]
    owners = np.arange(len(plans)).repeat([len(of_one) for of_one in sides])
    areas = np.concatenate(sides).astype(np.float64).prod(axis=1)
    pixels = np.bincount(owners, areas, len(plans)).cumsum()
    chunks, start = [], 0
    while start < len(plans):
        size = min(max((len(plans) - start) // LEFT_PART, LEAST_CHUNK), CUT_CHUNK)
        before = pixels[start - 1] if start else 0
        fitting = int(np.searchsorted(pixels, before + CUT_PIXELS, side="right"))
        stop = min(start + size, max(fitting, start + 1))
        chunks.append(plans[start:stop])
        start = stop
    return chunks


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
