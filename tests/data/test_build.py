"""Batches: form, resume with any number of workers, ranks, micro-batches, damage, a lost store."""

import logging
import shutil
import subprocess
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data.test_store import flip
from detectron2.config import CfgNode
from helpers_store import make_store
from torch.utils.data import DataLoader

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.data.build import (
    build_jigsaw_eval_loader,
    build_jigsaw_train_loader,
    check_shared_memory,
    fit_input,
    start_worker,
)
from jigsaw_d2.data.fit import fit_template
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.data.store_writer import StoreWriter
from jigsaw_d2.io import ConfigError, DataError


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> SampleStore:
    return make_store(tmp_path_factory.mktemp("loader") / "store", size_range=(20, 120))


def make_cfg(store: SampleStore, workers: int = 0, batch: int = 4, **keys) -> CfgNode:
    pairs = {
        "DATASETS.TRAIN": tuple(str(p) for p in store.paths),
        "DATALOADER.NUM_WORKERS": workers,
        "SOLVER.IMS_PER_BATCH": batch,
        "INPUT.FORMAT": "RGB",
        "SEED": 3,
        **{key.replace("__", "."): value for key, value in keys.items()},
    }
    return get_jigsaw_cfg(overrides=[item for pair in pairs.items() for item in pair])


def batches(cfg: CfgNode, count: int, **options) -> list[dict]:
    return list(islice(build_jigsaw_train_loader(cfg, **options), count))


def same(one: dict, other: dict) -> bool:
    tensors = ("image", "gt_classes", "sample_ids")
    return one["position"] == other["position"] and all(
        torch.equal(one[key], other[key]) for key in tensors
    )


def test_form_of_a_batch(store):
    first, second = batches(make_cfg(store), 2)
    assert first["image"].shape == (4, 3, 224, 224) and first["image"].dtype == torch.uint8
    assert first["gt_classes"].shape == (4, 4) and first["gt_classes"].dtype == torch.int64
    assert first["sample_ids"].shape == (4, 4) and first["sample_ids"].dtype == torch.int64
    assert (first["position"], second["position"], first["damaged"]) == (0, 4, [])
    ids = first["sample_ids"].numpy()
    assert (store.groups[ids] == [0, 2, 1, 0]).all()  # R1 S, R2 W, R3 T, R4 S
    assert (first["gt_classes"].numpy() == store.classes[ids]).all()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_resumed_loader_goes_on_exactly(store, workers):
    uninterrupted = batches(make_cfg(store, 0), 7)
    assert all(map(same, batches(make_cfg(store, workers), 3), uninterrupted))
    resumed = batches(make_cfg(store, workers), 4, start_iter=3)
    assert all(map(same, resumed, uninterrupted[3:]))


def test_ranks_share_each_step_and_no_sample_of_a_pass(store):
    whole = batches(make_cfg(store, batch=8), 6)
    ranks = [batches(make_cfg(store, batch=8), 6, rank=r, world_size=2) for r in (0, 1)]
    for step, one, other in zip(whole, *ranks):
        assert len(one["image"]) == 4 and other["position"] == one["position"] + 1
        assert torch.equal(step["image"][0::2], one["image"])
        assert torch.equal(step["image"][1::2], other["image"])
        # 8 T samples make a pass of 8 images: one step here. R3 shows T.
        shown = [set(b["sample_ids"][:, 2].tolist()) for b in (one, other)]
        assert not shown[0] & shown[1] and len(shown[0] | shown[1]) == 8


def test_micro_batches_make_up_the_iteration(store):
    whole = batches(make_cfg(store, batch=8), 3)
    cfg = make_cfg(store, batch=8, SOLVER__ACCUMULATION_STEPS=2)
    micro = batches(cfg, 6)
    for k, step in enumerate(whole):
        parts = micro[2 * k : 2 * k + 2]
        assert torch.equal(step["image"], torch.cat([p["image"] for p in parts]))
    assert all(map(same, batches(cfg, 2, start_iter=2), micro[4:]))
    ranks = [batches(cfg, 2, rank=r, world_size=2) for r in (0, 1)]
    assert torch.equal(ranks[1][1]["image"], micro[1]["image"][1::2])


def test_batch_that_cannot_be_shared_out(store):
    cfg = make_cfg(store, batch=12, SOLVER__ACCUMULATION_STEPS=4)
    with pytest.raises(ConfigError, match="IMS_PER_BATCH = 12.*2 processes.*multiple of 8"):
        build_jigsaw_train_loader(cfg, rank=0, world_size=2)


@pytest.mark.parametrize("images, world_size", [(10, 1), (10, 3), (2, 4)])
def test_eval_loader_is_finite_fixed_and_shared(store, images, world_size):
    loader = build_jigsaw_eval_loader(
        make_cfg(store, INPUT__JIGSAW__EVAL_IMAGES=images), store.paths
    )
    whole = torch.cat([b["image"] for b in loader])
    assert len(whole) == images
    draws = [a for p in range(20) for a in loader.dataset.mapper.draw_augmentations(p)]
    assert {(a.scale, a.flip) for a in draws} == {(1.0, False)}
    parts = []
    for rank in range(world_size):
        cfg = make_cfg(store, rank % 2, SEED=99, INPUT__JIGSAW__EVAL_IMAGES=images)
        shared = {"rank": rank, "world_size": world_size}
        loader = build_jigsaw_eval_loader(cfg, [str(p) for p in store.paths], **shared)
        parts += [batch["image"] for batch in loader]
        assert len(loader) == len(list(loader))
    assert torch.equal(torch.cat(parts), whole)


def test_class_balanced_needs_a_threshold_and_uses_it(store):
    with pytest.raises(ConfigError, match="REPEAT_THRESHOLD"):
        batches(make_cfg(store, INPUT__JIGSAW__SAMPLING="class_balanced"), 1)
    keys = {"INPUT__JIGSAW__SAMPLING": "class_balanced", "DATALOADER__REPEAT_THRESHOLD": 0.9}
    cfg = make_cfg(store, **keys)
    assert all(map(same, batches(cfg, 2, start_iter=4), batches(cfg, 6)[4:]))
    with pytest.raises(ConfigError, match="SAMPLING = 'fair'"):
        batches(make_cfg(store, INPUT__JIGSAW__SAMPLING="fair"), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_sample_is_replaced_reported_and_logged_once(tmp_path, workers, caplog):
    store = make_store(tmp_path / "store", n_per_group=3, size_range=(20, 60))
    flip(store, 1)  # of group T
    loader = build_jigsaw_train_loader(make_cfg(store, workers, batch=6))
    with caplog.at_level(logging.WARNING):
        seen = list(islice(loader, 3))
    tall = torch.cat([b["sample_ids"][:, 2] for b in seen]).tolist()
    assert set(tall) == {4, 7}
    # 18 draws of T walk 6 passes of 3: sample 1 would have been shown 6 times
    assert [n for b in seen for n, _ in b["damaged"]] == [1] * 6
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 1 and store.key(1) in messages[0] and "CRC" in messages[0]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("what", ["gone", "replaced"])
def test_store_lost_mid_run_is_an_error_that_says_so(tmp_path, workers, what):
    store = make_store(tmp_path / "store", n_per_group=2, size_range=(20, 40))
    stream = iter(build_jigsaw_train_loader(make_cfg(store, workers)))
    next(stream)
    shutil.rmtree(tmp_path / "store")
    if what == "replaced":
        make_store(tmp_path / "store", n_per_group=2, size_range=(20, 40), seed=1)
    with pytest.raises(DataError, match="store.*(gone|replaced)"):
        for _ in range(9):
            next(stream)


@pytest.mark.parametrize("size", [(30, 40), (90, 30), (30, 90)])
def test_one_sample_makes_batches(tmp_path, size):
    with StoreWriter(tmp_path / "one", ["thing"]) as writer:
        writer.add(np.full((*size, 3), 90, np.uint8), 0, image_id=1)
        writer.finish()
    batch = batches(make_cfg(SampleStore(tmp_path / "one")), 1)[0]
    assert (batch["sample_ids"] == 0).all() and batch["image"].any()


def test_workers_whose_batches_do_not_fit_shared_memory_are_refused(monkeypatch):
    """A batch of 512 takes 77 MB; a container has 64 MB unless told otherwise."""
    cfg = get_jigsaw_cfg("jigsaw_R_50.yaml", ["DATALOADER.NUM_WORKERS", "2"])
    usage = SimpleNamespace(free=64 * 2**20)
    monkeypatch.setattr("jigsaw_d2.data.build.shutil.disk_usage", lambda folder: usage)
    # 2 processes x 2 workers x 2 batches of 512 / 2 images of 3 x 224 x 224 bytes
    needed = 2 * 2 * 2 * 256 * 3 * 224 * 224
    with pytest.raises(ConfigError, match="294 MiB, but 64 MiB are free: .*--shm-size 1g"):
        check_shared_memory(cfg, 2, 2)
    usage.free = needed
    check_shared_memory(cfg, 2, 2)
    with pytest.raises(ConfigError, match="1568 MiB, but 294 MiB are free"):
        check_shared_memory(cfg, 2, 2, 4 * 4)  # 4 channels of 16 bits, on a float32 canvas
    cfg.DATALOADER.NUM_WORKERS, usage.free = 0, 0
    check_shared_memory(cfg, 2, 2)


def of_images(store: SampleStore, sides: list[float]) -> SampleStore:
    """The store as if extracted from images of these sides."""
    store = SampleStore(store.paths)
    store.header["report"] = {"images": {"median_sides": sides}}
    return store


def test_fit_to_a_detector(store, caplog):
    """The detector shows images of 300 x 400 at 384 x 512, that is 1.28 times: 0.614 to 1.152."""
    cfg = make_cfg(store, INPUT__JIGSAW__FIT_TO="auto", INPUT__MIN_SIZE_TRAIN=(384,))
    cfg.INPUT.MAX_SIZE_TRAIN = 512
    options, explicit = cfg.INPUT.JIGSAW, cfg.clone()
    with caplog.at_level(logging.INFO):
        fit_input(cfg, of_images(store, [300, 400]), stride=32)
    best = fit_template(store.sizes, store.groups, (0.614, 1.152)).template
    assert options.SCALE_RANGE == [0.614, 1.152]
    assert options.TEMPLATE_SIZE == [best.height, best.width] != [224, 224]
    assert options.TEMPLATE_SPLIT == [best.split_y, best.split_x]
    assert options.FIT_TO == "" and "1.28" in caplog.text
    fit_input(explicit, of_images(store, [300, 400]), 32, ["INPUT.JIGSAW.TEMPLATE_SIZE"])
    assert explicit.INPUT.JIGSAW.TEMPLATE_SIZE == [224, 224]
    assert explicit.INPUT.JIGSAW.SCALE_RANGE == [0.614, 1.152]


def test_fit_needs_to_know_the_images(store):
    with pytest.raises(ConfigError, match="extract it again"):
        fit_input(make_cfg(store, INPUT__JIGSAW__FIT_TO="auto"), store)
    with pytest.raises(ConfigError, match="use auto"):
        fit_input(make_cfg(store, INPUT__JIGSAW__FIT_TO="yes"), store)


def test_workers_end_at_their_parent_s_word_alone() -> None:
    """A job's signal reaches them, too, while the training process still needs its batch."""
    batches = iter(DataLoader(list(range(1000)), num_workers=1, worker_init_fn=start_worker))
    next(batches)
    (worker,) = batches._workers
    for name in ("TERM", "INT", "TERM"):  # of another process than the parent
        subprocess.run(["sh", "-c", f"kill -{name} {worker.pid}"], check=True)
    next(batches)
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0
