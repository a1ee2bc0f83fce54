"""Loaders of Jigsaw batches: for training without end, for evaluation once through.

Iteration k of training takes images k * B .. (k + 1) * B - 1 (B = SOLVER.IMS_PER_BATCH), whatever
the number of ranks and workers. Within each micro-batch of the step, rank r of R makes the images
r, r + R, r + 2R ...: so the images of a step do not depend on R, only who makes them.
"""

import itertools
import logging
import math
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, get_worker_info

from jigsaw_d2.data.dataset_mapper import JigsawDatasetMapper
from jigsaw_d2.data.fit import (
    Fit,
    canvas_fill,
    detector_scale,
    fit_scale,
    fit_template,
    paper_fit,
)
from jigsaw_d2.data.sampler import JigsawSampler, repeat_factors
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.io import ConfigError

logger = logging.getLogger(__name__)

# Batches that each worker of a DataLoader makes ahead, by default.
PREFETCHED = 2
# Added to a run's seed, so that measurements and training draw different images.
SEED_OFFSET = 7_919


class JigsawBatches(Dataset):
    """Batch ``range`` of image numbers -> one batch, made whole in the worker."""

    def __init__(self, sampler: JigsawSampler, mapper: JigsawDatasetMapper) -> None:
        self.sampler, self.mapper = sampler, mapper

    def __getitem__(self, positions: range) -> dict:
        """
        Returns:
            {"image": uint8 (N, 3, H, W), channels innermost in memory, as images are decoded, or of
            the store's channels and the mapper's ``dtype``; "gt_classes" and "sample_ids": int64
            (N, 4) in region order, "shown_boxes": int64 (N, 4, 4) if the mapper makes them,
            "position": number of the first image, "damaged": list of (id, reason)}.

        Raises:
            DataError: the store was removed or replaced since it was opened.
        """
        self.mapper.store.check_unchanged()
        template = self.mapper.template
        size = (len(positions), template.height, template.width, self.mapper.store.channels)
        images = torch.empty(0, dtype=torch.from_numpy(np.empty(0, self.mapper.dtype)).dtype)
        if get_worker_info() is None:
            images.resize_(size)
        else:  # drawn where the trainer reads it, not copied there
            count = math.prod(size) * images.element_size()
            images.set_(torch.UntypedStorage._new_shared(count, device="cpu"), 0, size)
        made = [
            self.mapper(
                {
                    "position": position,
                    "sample_ids": self.sampler.quadruple(position),
                    "replacements": lambda slot, p=position: self.sampler.replacements(slot, p),
                },
                out,
            )
            for position, out in zip(positions, images.numpy())
        ]
        stacked = [k for k in ("gt_classes", "sample_ids", "shown_boxes") if k in made[0]]
        return {
            "image": images.permute(0, 3, 1, 2),
            **{key: torch.stack([image[key] for image in made]) for key in stacked},
            "position": positions[0],
            "damaged": [entry for image in made for entry in image["damaged"]],
        }


class JigsawLoader(DataLoader):
    """A DataLoader whose own process logs the samples that were replaced, each once.

    Attributes:
        position_step: from the number of one image of a batch to that of the next.
    """

    def __init__(self, batches: JigsawBatches, positions: Iterable[range], **options: Any) -> None:
        super().__init__(batches, sampler=positions, batch_size=None, **options)
        self.position_step = getattr(positions, "world_size", 1)
        self._named: set[int] = set()

    def __iter__(self) -> Iterator[dict]:
        for batch in super().__iter__():
            for sample, reason in batch["damaged"]:
                if sample not in self._named:
                    self._named.add(sample)
                    logger.warning(
                        "sample %d was replaced by the next of its group: %s", sample, reason
                    )
            yield batch


class BatchPositions:
    """Image numbers of each micro-batch of one rank, from iteration ``start_iter`` on, endless."""

    def __init__(self, cfg: CfgNode, rank: int, world_size: int, start_iter: int) -> None:
        size, micro_batches = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS
        share = world_size * micro_batches
        if size % share:
            raise ConfigError(
                f"SOLVER.IMS_PER_BATCH = {size} cannot be shared by {world_size} processes x "
                f"SOLVER.ACCUMULATION_STEPS = {micro_batches}: use a multiple of {share}"
            )
        self.first, self.micro_size = start_iter * size, size // micro_batches
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[range]:
        for first in itertools.count(self.first, self.micro_size):
            yield range(first + self.rank, first + self.micro_size, self.world_size)


def build_jigsaw_sampler(cfg: CfgNode, mapper: JigsawDatasetMapper) -> JigsawSampler:
    """The sampler of ``INPUT.JIGSAW.SAMPLING`` over the mapper's store, seeded like the mapper."""
    factors = None
    if cfg.INPUT.JIGSAW.SAMPLING == "class_balanced":
        factors = repeat_factors(mapper.classes, cfg.DATALOADER.REPEAT_THRESHOLD)
    elif cfg.INPUT.JIGSAW.SAMPLING != "uniform":
        raise ConfigError(
            f"INPUT.JIGSAW.SAMPLING = {cfg.INPUT.JIGSAW.SAMPLING!r}: use uniform or class_balanced"
        )
    sizes, groups = mapper.shown_sizes()
    return JigsawSampler(
        sizes=sizes,
        groups=groups,
        seed=mapper.seed,
        repeat_factors=factors,
        size_aware=cfg.INPUT.JIGSAW.SIZE_AWARE,
    )


def fit_input(
    cfg: CfgNode, store: SampleStore, stride: int = 32, explicit: Iterable[str] = ()
) -> None:
    """Where INPUT.JIGSAW.FIT_TO is "auto", choose TEMPLATE_SIZE, TEMPLATE_SPLIT and SCALE_RANGE.

    In place, logged with the reason; FIT_TO is empty afterwards. ``explicit`` keys are kept.

    Args:
        stride: of the classified feature.

    Raises:
        ConfigError: another value of FIT_TO, or a store that does not say how large its images are.
    """
    options = cfg.INPUT.JIGSAW
    if options.FIT_TO not in ("", "auto"):
        raise ConfigError(f'INPUT.JIGSAW.FIT_TO = {options.FIT_TO!r}: use auto, or "" for none')
    if not options.FIT_TO:
        return
    sides = store.header["report"].get("images", {}).get("median_sides")
    if sides is None:
        raise ConfigError(
            f"INPUT.JIGSAW.FIT_TO auto: {store.paths[0]} does not say how large its images are (an "
            "older version wrote it); extract it again, or set TEMPLATE_SIZE, TEMPLATE_SPLIT and "
            "SCALE_RANGE yourself"
        )
    min_size, max_size = float(np.mean(cfg.INPUT.MIN_SIZE_TRAIN)), cfg.INPUT.MAX_SIZE_TRAIN
    scale = detector_scale(sides, min_size, max_size)
    scale_range = fit_scale(scale)
    if "INPUT.JIGSAW.SCALE_RANGE" in explicit:
        scale_range = tuple(options.SCALE_RANGE)
    sizes, groups = JigsawDatasetMapper(cfg, store).shown_sizes()
    how = {"size_aware": options.SIZE_AWARE}
    options.SCALE_RANGE = list(scale_range)
    if {"INPUT.JIGSAW.TEMPLATE_SIZE", "INPUT.JIGSAW.TEMPLATE_SPLIT"} & {*explicit}:
        template = JigsawTemplate(*options.TEMPLATE_SIZE, *options.TEMPLATE_SPLIT)
        filled = canvas_fill(sizes, groups, template, scale_range, **how)
        fit = Fit(template, scale_range, filled)
    else:
        how |= {"stride": stride, "max_side": int(max(sides) * scale)}
        fit = fit_template(sizes, groups, scale_range, **how)
        options.TEMPLATE_SIZE = [fit.template.height, fit.template.width]
        options.TEMPLATE_SPLIT = [fit.template.split_y, fit.template.split_x]
    options.FIT_TO = ""
    logger.info(
        "INPUT.JIGSAW.FIT_TO auto, for images that the detector shows at %.2f of their size: %s. "
        "The paper's %s",
        *(scale, fit, paper_fit(sizes, groups)),
    )


def jigsaw_stream(cfg: CfgNode, store: SampleStore) -> JigsawBatches:
    """Range of positions (ints >= 0) -> batch: Jigsaw images of a stream of its own.

    Drawn and made as the training images are, but with another seed; a function of position alone.
    """
    mapper = JigsawDatasetMapper(cfg, store, seed=max(cfg.SEED, 0) + SEED_OFFSET)
    return JigsawBatches(build_jigsaw_sampler(cfg, mapper), mapper)


def build_jigsaw_train_loader(
    cfg: CfgNode,
    *,
    rank: int = 0,
    world_size: int = 1,
    start_iter: int = 0,
    store: SampleStore | None = None,
) -> JigsawLoader:
    """Training batches of one rank, without end.

    Args:
        rank, world_size: this process among those that share each step's images.
        start_iter: iteration whose batch comes first, as if the loader had run until there.
        store: opened ``DATASETS.TRAIN``; opened here when None.

    Returns:
        a loader of dicts as ``JigsawBatches`` makes them, N = IMS_PER_BATCH / world_size /
        ACCUMULATION_STEPS images each; ACCUMULATION_STEPS in turn make one iteration.
    """
    store = SampleStore(list(cfg.DATASETS.TRAIN)) if store is None else store
    positions = BatchPositions(cfg, rank, world_size, start_iter)
    return _build_loader(cfg, JigsawDatasetMapper(cfg, store), positions)


def build_jigsaw_eval_loader(
    cfg: CfgNode, stores: str | Sequence[str], *, rank: int = 0, world_size: int = 1
) -> JigsawLoader:
    """``INPUT.JIGSAW.EVAL_IMAGES`` held-out images, the same in every run, shared by the ranks.

    Samples are shown at their own size, unflipped; which four meet, and the crops, are fixed by
    ``INPUT.JIGSAW.EVAL_SEED``. Batches are of the size of training.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.JIGSAW.SCALE_RANGE, cfg.INPUT.JIGSAW.FLIP_PROB = [1.0, 1.0], 0.0
    cfg.INPUT.JIGSAW.SAMPLING = "uniform"
    # Contiguous shares, sizes differing by at most one.
    ends = [cfg.INPUT.JIGSAW.EVAL_IMAGES * r // world_size for r in (rank, rank + 1)]
    size = max(1, cfg.SOLVER.IMS_PER_BATCH // (world_size * cfg.SOLVER.ACCUMULATION_STEPS))
    positions = [range(n, min(n + size, ends[1])) for n in range(*ends, size)]
    mapper = JigsawDatasetMapper(cfg, SampleStore(stores), seed=cfg.INPUT.JIGSAW.EVAL_SEED)
    return _build_loader(cfg, mapper, positions)


def _build_loader(
    cfg: CfgNode, mapper: JigsawDatasetMapper, positions: Iterable[range]
) -> JigsawLoader:
    pixel = mapper.store.channels * np.dtype(mapper.dtype).itemsize
    check_shared_memory(cfg, comm.get_world_size(), comm.get_local_size(), pixel)
    return JigsawLoader(
        JigsawBatches(build_jigsaw_sampler(cfg, mapper), mapper),
        positions,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=torch.device(cfg.MODEL.DEVICE).type == "cuda" and torch.cuda.is_available(),
        worker_init_fn=start_worker,
    )


def check_shared_memory(
    cfg: CfgNode, world_size: int, local_size: int, pixel_bytes: int = 3
) -> None:
    """Refuse workers whose batches do not fit /dev/shm, where they are made; a write there kills.

    Raises ConfigError with what is needed for the ``local_size`` processes of this machine, of
    ``world_size`` in the job, what is free, and what helps. ``pixel_bytes``: of all channels.
    """
    workers, folder = cfg.DATALOADER.NUM_WORKERS, Path("/dev/shm")
    if not workers or not folder.is_dir():
        return
    images = cfg.SOLVER.IMS_PER_BATCH // (world_size * cfg.SOLVER.ACCUMULATION_STEPS)
    batch = pixel_bytes * images * math.prod(cfg.INPUT.JIGSAW.TEMPLATE_SIZE)
    needed, free = local_size * workers * PREFETCHED * batch, shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"{local_size} process(es) x DATALOADER.NUM_WORKERS {workers} keep {PREFETCHED} "
            f"batches of {batch / 2**20:.0f} MiB each in {folder}, {needed / 2**20:.0f} MiB, but "
            f"{free / 2**20:.0f} MiB are free: give the container more (docker run --shm-size "
            f"{math.ceil(needed / 2**30 + 0.1)}g, or --ipc host), or lower DATALOADER.NUM_WORKERS; "
            "0 needs none"
        )


def start_worker(worker: int) -> None:
    """A worker is one core's work: threads inside it would only compete with other workers.

    A signal to the whole job is for the training process alone, which needs the batch at hand: of
    SIGINT and SIGTERM a worker heeds that one which its parent sends to end it.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_at_parents_word, daemon=True).start()


def _end_at_parents_word() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
