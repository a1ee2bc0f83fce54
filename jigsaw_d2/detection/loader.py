"""Detectron2's training batches, from any iteration on as if the loader had run until there."""

import itertools
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build, detection_utils
from detectron2.utils import comm
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from jigsaw_d2.data.build import start_worker
from jigsaw_d2.io import DataError

Place = tuple[int, int]  # number in the sampler's stream, index into the dataset


class ResumableLoader:
    """Batches of one rank: those of Detectron2's sampler, grouped by aspect ratio as it does.

    What an image's augmentation draws depends on the seed and its place in the stream alone, so
    that neither the number of workers nor a resume changes it.

    Attributes:
        start_iter: iteration whose batch comes first.
        on_start: called once when the first batch is there: starting workers draws from PyTorch's
            generator, whose state a resumed run has to set after that.
    """

    def __init__(self, cfg: CfgNode, mapper: Callable[[dict], dict] | None = None) -> None:
        if cfg.SEED >= 0:
            np.random.seed(cfg.SEED)  # the sampler draws its own seed from this generator
        made = build._train_loader_from_config(cfg, mapper)
        dataset = made["dataset"]
        self.grouping = made["aspect_ratio_grouping"]
        self._wide = [self.grouping and d.get("width", 0) > d.get("height", 0) for d in dataset]
        self._dataset = DatasetFromList(dataset, copy=False)
        self._sampler, self._mapper = made["sampler"], made["mapper"]
        self._batch, self._workers = cfg.SOLVER.IMS_PER_BATCH, made["num_workers"]
        self._seed = cfg.SEED
        self.start_iter, self.on_start = 0, lambda: None

    def __iter__(self) -> Iterator[list[dict]]:
        if self._batch % comm.get_world_size():
            raise DataError(
                f"SOLVER.IMS_PER_BATCH {self._batch} does not divide into "
                f"{comm.get_world_size()} processes"
            )
        size = self._batch // comm.get_world_size()
        waiting, position = skip_batches(self._sampler, self._wide, size, self.start_iter)
        seeds = (max(self._seed, 0), comm.get_rank())
        stream = _Stream(self._dataset, self._mapper, self._sampler, waiting, position, seeds)
        images = DataLoader(
            stream,
            num_workers=self._workers,
            collate_fn=operator.itemgetter(0),
            worker_init_fn=start_worker,
        )
        batches = self._batches(images, size)
        first = next(batches)
        self.on_start()
        yield first
        yield from batches

    def _batches(self, images: Iterable[dict], size: int) -> Iterator[list[dict]]:
        buckets: tuple[list[dict], list[dict]] = ([], [])
        for image in images:
            bucket = buckets[self.grouping and image["width"] > image["height"]]
            bucket.append(image)
            if len(bucket) == size:
                yield bucket[:]
                bucket.clear()


def skip_batches(
    sampler: Iterable[int], wide: Sequence[bool], size: int, batches: int
) -> tuple[list[Place], int]:
    """(images taken from the stream that ``batches`` batches have left over, images taken)."""
    buckets: tuple[list[Place], list[Place]] = ([], [])
    stream, taken = iter(sampler), 0
    while batches > 0:
        index = next(stream)
        bucket = buckets[wide[index]]
        bucket.append((taken, index))
        taken += 1
        if len(bucket) == size:
            bucket.clear()
            batches -= 1
    return sorted(buckets[0] + buckets[1]), taken


class _Stream(IterableDataset):
    """Mapped images in the order of the stream, shared out between workers."""

    def __init__(
        self,
        dataset: DatasetFromList,
        mapper: Callable[[dict], dict],
        sampler: Iterable[int],
        waiting: list[Place],
        position: int,
        seeds: tuple[int, int],
    ) -> None:
        self._dataset, self._mapper, self._sampler = dataset, mapper, sampler
        self._waiting, self._position, self._seeds = waiting, position, seeds

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        fresh = itertools.islice(enumerate(self._sampler), self._position, None)
        for place, index in itertools.islice(
            itertools.chain(self._waiting, fresh), number, None, count
        ):
            words = np.random.SeedSequence([*self._seeds, place]).generate_state(4)
            np.random.seed(words)
            random.seed(int(words[0]))
            record = self._dataset[index]
            try:
                yield self._mapper(record)
            except (OSError, SyntaxError, detection_utils.SizeMismatchError) as error:
                said = " ".join(str(error).split())
                raise DataError(f"{record['file_name']} cannot be trained on: {said}") from None
