"""The refresh hook: when it acts, what it installs and logs, resume, drift, several processes."""

import copy
import logging
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace

import torch
from detectron2.engine import TrainerBase
from detectron2.utils.events import EventStorage
from helpers_networks import small_pyramid, tiny_backbone

from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.engine import erf_refresh
from jigsaw_d2.engine.erf_refresh import ErfRefreshHook
from jigsaw_d2.engine.launch import leave_group
from jigsaw_d2.io import ConfigError
from jigsaw_d2.modeling.erf import erf_region_sums, measure_erf, outside_shares, region_weights
from jigsaw_d2.modeling.erf_probes import fill_between, probe_cells
from jigsaw_d2.modeling.meta_arch import JigsawPretrainer

TINY = JigsawTemplate(height=96, width=96, split_y=32, split_x=32)


def build_model():
    torch.manual_seed(0)
    return JigsawPretrainer(
        backbone=tiny_backbone(),
        in_features=["res5"],
        num_classes=3,
        template=TINY,
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    ).train()


def load_images(positions):
    images = []
    for position in positions:
        rng = torch.Generator().manual_seed(position)
        images.append(torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8, generator=rng))
    return torch.stack(images)


class CostLog:
    def __init__(self):
        self.entries = []

    def record(self, stage, **amounts):
        self.entries.append((stage, amounts))


class Walk(TrainerBase):
    """Each step moves the weights by a fixed function of the iteration, as training would."""

    def __init__(self, model, hook):
        super().__init__()
        self.model, self.cost_log, self.seen = model, CostLog(), []
        self.register_hooks([hook])

    def run_step(self):
        self.seen.append(self.model.erf_weights.clone())
        rng = torch.Generator().manual_seed(self.iter)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=rng)


class ScheduleTest(unittest.TestCase):
    def refreshed_at(self, last=12, start=0, model=None, **settings):
        """Iterations whose step saw other weights than the one before."""
        model = model or build_model()
        hook = ErfRefreshHook(model, load_images, num_images=1, **settings)
        walk, before = Walk(model, hook), model.erf_weights.clone()
        walk.train(start, last)
        changed = []
        for iteration, weights in enumerate(walk.seen, start):
            if not torch.equal(weights, before):
                changed.append(iteration)
            before = weights
        return changed

    def test_period_and_first_iteration(self):
        self.assertEqual(self.refreshed_at(period=5), [0, 5, 10])
        self.assertEqual(self.refreshed_at(period=4, first_iter=3), [3, 7, 11])
        self.assertEqual(self.refreshed_at(start=7, period=5), [10])  # resumed: no extra one

    def test_drift_triggers_earlier(self):
        # Probes every 20 / 10 = 2 iterations; any change exceeds 1e-9, none exceeds 1.
        self.assertEqual(self.refreshed_at(period=20, max_drift=1e-9), [0, 2, 4, 6, 8, 10])
        self.assertEqual(self.refreshed_at(period=20, max_drift=1.0), [0])
        self.assertEqual(self.refreshed_at(period=20), [0])

    def test_impossible_settings(self):
        for settings, message in (
            ({"period": 0}, "PERIOD is 0"),
            ({"num_images": 0}, "NUM_IMAGES"),
            ({"first_iter": -1}, "FIRST_ITER"),
            ({"max_drift": -0.1}, "MAX_DRIFT"),
            ({"grad": "square"}, "GRAD is 'square'"),
        ):
            with self.assertRaisesRegex(ConfigError, message):
                ErfRefreshHook(build_model(), load_images, **settings)


class RefreshTest(unittest.TestCase):
    def run_hook(self, model, iteration=0, **settings):
        hook = ErfRefreshHook(model, load_images, num_images=3, period=5, macs=7, **settings)
        hook.trainer = SimpleNamespace(start_iter=iteration, cost_log=CostLog())
        with EventStorage(iteration) as hook.trainer.storage:
            hook.before_train()
        return hook

    def test_installs_eq_2_of_its_own_images(self):
        model = build_model()
        self.run_hook(model, iteration=10)
        images = model.preprocess(load_images(range(30, 33)))
        sums = erf_region_sums(model.backbone, images, TINY)
        torch.testing.assert_close(model.erf_region_sums, sums)
        expected = region_weights(sums, model.cell_regions, 0.7).float()
        torch.testing.assert_close(model.erf_weights, expected)
        self.assertTrue(model.training and model.backbone.training)

    def test_figures_change_no_weight(self):
        plain, drawn = build_model(), build_model()
        self.run_hook(plain)
        hook = self.run_hook(drawn, figures=True)
        self.assertTrue(torch.equal(plain.erf_weights, drawn.erf_weights))
        ((name, image, iteration),) = hook.trainer.storage._vis_data
        self.assertEqual(
            (name, iteration, image.dtype.name, image.shape[0]), ("erf/regions", 0, "uint8", 3)
        )

    def test_training_randomness_is_left_alone(self):
        model = build_model()
        state = torch.get_rng_state()
        self.run_hook(model)
        self.assertTrue(torch.equal(state, torch.get_rng_state()))

    def test_scalars_summary_and_cost_log(self):
        model = build_model()
        with self.assertLogs(erf_refresh.logger, logging.INFO) as log:
            hook = self.run_hook(model)
        self.assertIn("first measurement", log.output[0])
        self.assertEqual(len(log.output[0].splitlines()), 6)  # a line, a head, four rows
        scalars = {name: value for name, (value, _) in hook.trainer.storage.latest().items()}
        self.assertNotIn("erf/drift", scalars)
        outside = outside_shares(model.erf_region_sums, model.cell_regions)
        for r in range(4):
            self.assertAlmostEqual(scalars[f"erf/outside_share_R{r + 1}"], outside[r].item())
        ((stage, amounts),) = hook.trainer.cost_log.entries
        self.assertEqual(
            (stage, amounts["images"], amounts["pixels"]), ("erf_refresh", 3, 3 * 96 * 96)
        )
        # Two a MAC, of a forward pass and as many for each of the 3x3 cells' backward pass.
        self.assertEqual(amounts["flops"], 3 * 2 * 7 * (1 + 9))

        before = model.erf_weights.clone()
        hook = self.run_hook(model, iteration=5)  # same network, other images
        drift = (model.erf_weights - before).abs().mean().item()
        self.assertAlmostEqual(hook.trainer.storage.latest()["erf/drift"][0], drift)

    def test_overflow_under_amp_is_measured_again(self):
        model, calls = build_model(), []
        original = erf_refresh.measure_erf

        def overflowing(*args, amp_dtype, **kwargs):
            measured = original(*args, amp_dtype=None, **kwargs)
            calls.append(amp_dtype)
            if amp_dtype is not None:
                measured.region_sums[0, 0, 0] = float("inf")
            return measured

        erf_refresh.measure_erf = overflowing
        try:
            self.run_hook(model, amp_dtype=torch.float16)
        finally:
            erf_refresh.measure_erf = original
        self.assertEqual(calls, [torch.float16, None])
        self.assertTrue(torch.isfinite(model.erf_weights).all())

    def test_resume_sees_what_the_unbroken_run_saw(self):
        settings = dict(num_images=2, period=4, max_drift=1e-3)
        model = build_model()
        walk = Walk(model, ErfRefreshHook(model, load_images, **settings))
        walk.train(0, 6)
        saved = copy.deepcopy(model.state_dict())
        walk.train(6, 10)
        resumed = build_model()
        resumed.load_state_dict(saved)
        second = Walk(resumed, ErfRefreshHook(resumed, load_images, **settings))
        second.train(6, 10)
        for now, then in zip(second.seen, walk.seen[6:]):
            self.assertTrue(torch.equal(now, then))


class SeveralFeaturesTest(unittest.TestCase):
    """p3 of 16x16 cells is probed, p4 too (8x8), p5 (4x4) is measured."""

    def build(self):
        torch.manual_seed(0)
        return JigsawPretrainer(
            backbone=small_pyramid(),
            in_features=["p3", "p4", "p5"],
            num_classes=3,
            template=JigsawTemplate(128, 128, 64, 64),
            pixel_mean=[120.0] * 3,
            pixel_std=[60.0] * 3,
        )

    def test_levels_share_the_images_and_each_has_its_own_weights(self):
        model, loaded = self.build(), []

        def load(positions):
            loaded.append(list(positions))
            rng = torch.Generator().manual_seed(positions[0])
            shape = (len(positions), 3, 128, 128)
            return torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)

        hook = ErfRefreshHook(model, load, num_images=7, macs=5)
        hook.trainer = SimpleNamespace(start_iter=2, cost_log=CostLog())
        with EventStorage(2) as hook.trainer.storage:
            hook.refresh(2)
        # Images 14 .. 20 of iteration 2: two, two and three.
        self.assertEqual(loaded, [[14, 15], [16, 17], [18, 19, 20]])
        for (name, level), positions in zip(model.levels.items(), loaded):
            images = model.preprocess(load(positions))
            cells = probe_cells(*level.cell_regions.shape)
            measured = measure_erf(model.backbone, images, model.template, name, cells=cells)
            sums = fill_between(measured.region_sums, cells)
            torch.testing.assert_close(level.erf_region_sums, sums)
            expected = region_weights(sums, level.cell_regions).float()
            torch.testing.assert_close(level.erf_weights, expected)
            self.assertTrue((level.erf_region_sums.sum(dim=-1) > 0).all())
        ((_, amounts),) = hook.trainer.cost_log.entries
        # A forward pass an image, and a backward pass for each probe or, of p5, each cell.
        probes = [len(probe_cells(side, side)) for side in (16, 8)]
        self.assertTrue(all(40 < count <= 49 for count in probes))
        passes = 2 * (1 + probes[0]) + 2 * (1 + probes[1]) + 3 * (1 + 16)
        self.assertEqual(amounts["flops"], 2 * 5 * passes)
        scalars = hook.trainer.storage.latest()
        self.assertTrue({f"erf/{p}_outside_share_R4" for p in model.levels} <= set(scalars))

    def test_too_few_images(self):
        with self.assertRaisesRegex(ConfigError, "NUM_IMAGES is 2, too few for p3, p4, p5"):
            ErfRefreshHook(self.build(), load_images, num_images=2)


def set_statistics(model, mean):
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.fill_(mean)


def measure_in_process(rank, world_size, folder, num_images):
    """One of ``world_size`` processes on Gloo; the model wrapped as in training."""
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=world_size)
    model = build_model()
    set_statistics(model, 2.0 * rank)  # each has seen its own images; their mean is measured
    wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    hook = ErfRefreshHook(wrapped, load_images, num_images=num_images)
    hook.trainer = SimpleNamespace(start_iter=0, cost_log=CostLog())
    with EventStorage() as hook.trainer.storage:
        hook.before_train()
    loss = wrapped({"image": load_images(range(1)), "gt_classes": torch.tensor([[0, 1, 2, 3]])})
    loss["loss_jigsaw"].backward()  # the reducer still works
    torch.save((model.erf_weights, model.erf_region_sums), f"{folder}/rank{rank}.pth")
    del wrapped, hook, loss
    leave_group()


class ProcessesTest(unittest.TestCase):
    def test_two_equal_one(self):
        one = build_model()
        set_statistics(one, 1.0)
        RefreshTest().run_hook(one)  # three images: two on rank 0, one on rank 1
        with tempfile.TemporaryDirectory() as folder:
            arguments = (2, folder, 3)
            torch.multiprocessing.spawn(measure_in_process, arguments, nprocs=2)
            found = [torch.load(Path(folder) / f"rank{rank}.pth") for rank in range(2)]
        for mine, other in zip(*found):
            self.assertTrue(torch.equal(mine, other))
        torch.testing.assert_close(found[0][0], one.erf_weights, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found[0][1], one.erf_region_sums, rtol=1e-6, atol=1e-9)


if __name__ == "__main__":
    unittest.main()
