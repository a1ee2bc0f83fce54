"""The detector's batches are those of an unbroken run, wherever a resume begins."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.common import AspectRatioGroupedDataset
from helpers_weights import FPN, make_coco, small_detection_config

from jigsaw_d2.detection.data import prepare_data
from jigsaw_d2.detection.loader import ResumableLoader, skip_batches
from jigsaw_d2.io import DataError


@pytest.mark.parametrize("seed", range(5))
def test_skipping_leaves_what_grouping_would_have_waiting(seed: int) -> None:
    """Against Detectron2's own grouping, run over the same stream from its start."""
    rng = np.random.default_rng(seed)
    wide = (rng.random(7) < 0.3).tolist()
    stream = rng.integers(0, 7, 400).tolist()

    def batches(indices) -> list[list[int]]:
        images = ({"width": 1 + wide[i], "height": 1, "index": i} for i in indices)
        images = ({**image, "width": image["width"] - 0.5} for image in images)
        return [[d["index"] for d in batch] for batch in AspectRatioGroupedDataset(images, 3)]

    whole = batches(stream)
    for done in (0, 1, 5, 40):
        waiting, taken = skip_batches(stream, wide, 3, done)
        rest = [index for _, index in waiting] + stream[taken:]
        assert batches(rest) == whole[done:]
        assert all(stream[place] == index for place, index in waiting)


def test_batches_depend_on_their_number_alone(tmp_path: Path) -> None:
    """Not on the workers, nor on where the loader began; flips and sizes are drawn, too."""
    files = make_coco(tmp_path / "resumable", images=5)
    sets = str((files[0][0],))
    data = ["DATASETS.COCO_FILES", str(files), "DATASETS.TRAIN", sets, "DATASETS.TEST", "()"]
    sizes = ["INPUT.MIN_SIZE_TRAIN", "(48, 56, 64)", "SOLVER.IMS_PER_BATCH", "2", "SEED", "4"]
    cfg = small_detection_config(FPN, *data, *sizes)
    prepare_data(cfg)

    def take(start: int, count: int, workers: int) -> list[list[torch.Tensor]]:
        cfg.DATALOADER.NUM_WORKERS, started = workers, []
        loader = ResumableLoader(cfg)
        loader.start_iter, loader.on_start = start, lambda: started.append(True)
        batches = list(itertools.islice(loader, count))
        assert started == [True]
        return [[image["image"] for image in batch] for batch in batches]

    def same(some: list, others: list) -> bool:
        pairs = zip(itertools.chain(*some), itertools.chain(*others), strict=True)
        return all(torch.equal(one, other) for one, other in pairs)

    whole = take(0, 8, 0)
    assert len({tuple(image.shape) for batch in whole for image in batch}) > 1
    assert same(take(3, 5, 0), whole[3:]) and same(take(0, 8, 2), whole)
    (tmp_path / "resumable" / "images" / "3.png").unlink()
    with pytest.raises(DataError, match="3.png cannot be trained on: "):
        take(0, 8, 0)
