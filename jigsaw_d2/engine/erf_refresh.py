"""Renews the label weights of Eq. 2 while training runs (Sec. 3.3: every 5,000 iterations)."""

import logging
import time
from collections.abc import Callable, Mapping

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn

from jigsaw_d2.data.build import jigsaw_stream
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.engine.precision import Precision
from jigsaw_d2.engine.state import average_statistics
from jigsaw_d2.io import ConfigError
from jigsaw_d2.modeling.erf import (
    ErfMeasurement,
    check_grad,
    format_summary,
    measure_erf,
    outside_shares,
    region_shares,
    region_weights,
    unwrap,
)
from jigsaw_d2.modeling.erf_probes import fill_between, probe_cells
from jigsaw_d2.modeling.losses import OBJECTIVES

logger = logging.getLogger(__name__)

# Images of one backward pass at most.
BATCH_SIZES = {"cuda": 64, "cpu": 16}
# Probes per period when MAX_DRIFT watches the weights: ten times the refresh cost, still under 1 %.
PROBES_PER_PERIOD = 10


class ErfRefreshHook(HookBase):
    """Measures the ERF for its iterations, ahead of their steps, and installs the weights.

    Before the training for its first iteration, for others after the step before; where a run goes
    on from a checkpoint, the measurement of its first iteration is repeated, and is the same. Which
    iterations, and which images, follow from the iteration alone, and drift is taken against
    the model's buffers; so a resumed run does exactly what the unbroken one did. Each rank measures
    its share of the images; the weights of rank 0 are given to all.

    Several features share the images out among them, and of each at most 49 cells are probed: so
    all of them together cost no more than one.
    """

    def __init__(
        self,
        model: nn.Module,
        load_images: Callable[[range], Tensor],
        *,
        num_images: int = 64,
        period: int = 5000,
        first_iter: int = 0,
        grad: str = "abs",
        max_drift: float = 0.0,
        amp_dtype: torch.dtype | None = None,
        figures: bool = False,
        macs: int = 0,
        batch_size: int = BATCH_SIZES["cpu"],
    ) -> None:
        """
        Args:
            model: ``JigsawPretrainer``, bare or wrapped in DistributedDataParallel.
            load_images: positions (ints >= 0) -> uint8 (N, 3, H, W), the same on every rank.
            num_images: images per measurement, over all ranks.
            period: iterations from one refresh to the next.
            first_iter: iteration of the first one.
            grad: "abs" or "relu".
            max_drift: refresh early when the mean absolute change of the weights exceeds this; 0 =
                by period alone.
            amp_dtype: precision of the measurement; None = the network's own. Should it overflow,
                that measurement is repeated in the network's own.
            figures: put the regions' maps into the event storage at each refresh.
            macs: multiply-accumulates of one image's forward pass, for the cost log.
            batch_size: images of one backward pass; the sums do not depend on it.

        Raises:
            ConfigError: a period, first iteration, number of images, drift or ``grad`` that makes
                no sense.
        """
        settings = {"PERIOD": (period, 1), "NUM_IMAGES": (num_images, 1)}
        settings |= {"FIRST_ITER": (first_iter, 0), "MAX_DRIFT": (max_drift, 0)}
        for name, (value, least) in settings.items():
            if value < least:
                raise ConfigError(
                    f"MODEL.JIGSAW.ERF.{name} is {value}; it must be at least {least}"
                )
        check_grad(grad)
        self._model = unwrap(model)
        self._load_images = load_images
        self._num_images = num_images
        self._period = period
        self._first_iter = first_iter
        self._grad = grad
        self._max_drift = max_drift
        self._amp_dtype = amp_dtype
        self._figures = figures
        self._batch_size = batch_size
        levels = self._model.levels
        if num_images < len(levels):
            raise ConfigError(
                f"MODEL.JIGSAW.ERF.NUM_IMAGES is {num_images}, too few for {', '.join(levels)}"
            )
        # Of the paper's one feature every cell; None = all.
        self._cells = {
            name: probe_cells(*level.cell_regions.shape) if len(levels) > 1 else None
            for name, level in levels.items()
        }
        # One forward pass, and one backward pass to the input a cell: as many products again.
        passes = (
            len(self._images_of(name, 0))
            * (1 + len(self._cells[name] or level.cell_regions.flatten()))
            for name, level in levels.items()
        )
        self._flops = 2 * macs * sum(passes)

    def before_train(self) -> None:
        """For the first iteration of this run."""
        self._refresh_if_due(self.trainer.start_iter)

    def after_step(self) -> None:
        """For the iteration that comes next, if one does."""
        following = self.trainer.iter + 1
        if following < self.trainer.max_iter:
            self._refresh_if_due(following)

    def _refresh_if_due(self, iteration: int) -> None:
        """Refresh or probe, where this iteration is one for it."""
        since_first = iteration - self._first_iter
        if since_first >= 0 and since_first % self._period == 0:
            self.refresh(iteration)
        elif since_first > 0 and self._max_drift > 0:
            if since_first % max(self._period // PROBES_PER_PERIOD, 1) == 0:
                self.refresh(iteration, least_drift=self._max_drift)

    def refresh(self, iteration: int, least_drift: float | None = None) -> None:
        """Measure and, unless the weights changed by no more than ``least_drift``, install them.

        The drift is the mean absolute change of the weights against those in force.
        """
        start = time.perf_counter()
        average_statistics(self._model)  # one network is measured, by parts
        levels = self._model.levels
        found = {name: self._measure_level(name, iteration) for name in levels}
        weights = {name: self._weights(name, measured) for name, measured in found.items()}
        changes = ((weights[name] - level.erf_weights).abs() for name, level in levels.items())
        drift = sum(change.mean().item() for change in changes) / len(levels)
        first = not any(level.erf_region_sums.any() for level in levels.values())
        installed = least_drift is None or drift > least_drift
        if installed:
            for name, level in levels.items():
                level.erf_weights.copy_(weights[name])
                level.erf_region_sums.copy_(found[name].region_sums)
        seconds = time.perf_counter() - start
        self._record(seconds)
        if comm.is_main_process():
            self._report(iteration, found, drift, seconds, first, installed)

    def _measure_level(self, name: str, iteration: int) -> ErfMeasurement:
        """As ``_measure``, once more where that overflows; of every cell, the same on all ranks."""
        measured = self._measure(name, iteration, self._amp_dtype)
        if self._amp_dtype and not measured.region_sums.isfinite().all():
            logger.warning("ERF not finite in %s; measured again without AMP", self._amp_dtype)
            measured = self._measure(name, iteration, None)
        return measured

    def _weights(self, name: str, measured: ErfMeasurement) -> Tensor:
        """Eq. 2 of what was measured; that and the weights become those of rank 0."""
        level = self._model.levels[name]
        weights = region_weights(measured.region_sums, level.cell_regions, self._model.tau)
        weights = weights.to(level.erf_weights)
        _broadcast(measured.region_sums, weights)
        return weights

    def _images_of(self, name: str, iteration: int) -> range:
        """Positions of the images by which a feature is measured: its part of NUM_IMAGES."""
        features, first = self._model.in_features, iteration * self._num_images
        index = features.index(name)
        ends = (self._num_images * (index + n) // len(features) for n in (0, 1))
        return range(*(first + end for end in ends))

    def _measure(self, name: str, iteration: int, amp_dtype: torch.dtype | None) -> ErfMeasurement:
        """Mean over the images of all ranks; maps, if any, of this rank's images alone."""
        model, images = self._model, self._images_of(name, iteration)
        positions = images[comm.get_rank() :: comm.get_world_size()]
        total = torch.zeros_like(model.levels[name].erf_region_sums)
        maps = None
        if positions:
            measured = measure_erf(
                model.backbone,
                model.preprocess(self._load_images(positions)),
                model.template,
                name,
                self._grad,
                cells=self._cells[name],
                batch_size=self._batch_size,
                with_maps=self._figures and comm.is_main_process(),
                amp_dtype=amp_dtype,
            )
            total += measured.region_sums * len(positions)
            maps = measured.region_maps
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(total)
        filled = fill_between(total / len(images), self._cells[name])
        return ErfMeasurement(filled, maps)

    def _report(
        self,
        iteration: int,
        found: Mapping[str, ErfMeasurement],
        drift: float,
        seconds: float,
        first: bool,
        installed: bool,
    ) -> None:
        """Log and event storage; the summary shows the weights in force from now on."""
        storage, levels = self.trainer.storage, self._model.levels
        if not first:
            storage.put_scalar("erf/drift", drift, smoothing_hint=False)
        storage.put_scalar("erf/seconds", seconds, smoothing_hint=False)
        shares, tables = {}, []
        for name, level in levels.items():
            sums, regions = found[name].region_sums.cpu(), level.cell_regions.cpu()
            shares[name] = region_shares(sums, regions)
            title = f"{name}_" if len(levels) > 1 else ""
            for r, share in enumerate(outside_shares(sums, regions).tolist()):
                storage.put_scalar(f"erf/{title}outside_share_R{r + 1}", share, False)
            tables += [name] if title else []
            tables.append(format_summary(sums, level.erf_weights.cpu(), regions))
        change = "first measurement" if first else f"drift {drift:.4f}"
        verb = "ERF weights renewed" if installed else "ERF probed, weights kept"
        logger.info(
            "%s at iteration %d: %d images, %.1f s, %s%s",
            *(verb, iteration, self._num_images, seconds, change),
            "".join(f"\n{table}" for table in tables) if installed else "",
        )
        maps = {name: found[name].region_maps for name in levels}
        maps = {name: each for name, each in maps.items() if each is not None}
        if installed and maps:
            from jigsaw_d2.visualization.erf import erf_figure  # brings matplotlib in
            from jigsaw_d2.visualization.figures import figure_pixels

            names = list(maps) if len(levels) > 1 else [""]
            rows = (list(maps.values()), [shares[name] for name in maps])
            figure = erf_figure(names, *rows, self._model.template)
            storage.put_image("erf/regions", figure_pixels(figure))

    def _record(self, seconds: float) -> None:
        """The measurement's cost, to the trainer's cost log."""
        height, width = self._model.template.height, self._model.template.width
        self.trainer.cost_log.record(
            "erf_refresh",
            images=self._num_images,
            pixels=self._num_images * height * width,
            flops=self._flops,
            seconds=seconds * comm.get_world_size(),
        )


def _broadcast(*tensors: Tensor) -> None:
    """Rank 0's values to all ranks, in place."""
    if comm.get_world_size() > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)


def build_erf_refresh_hook(
    cfg: CfgNode, model: nn.Module, store: SampleStore, macs: int = 0
) -> ErfRefreshHook | None:
    """The hook of a configuration; None where the objective uses no ERF.

    Its images are Jigsaw images of ``store``, made as the training ones are but drawn with another
    seed, so that measuring leaves the training stream alone.
    """
    if not OBJECTIVES[cfg.MODEL.JIGSAW.OBJECTIVE].needs_erf:
        return None
    erf = cfg.MODEL.JIGSAW.ERF
    stream = jigsaw_stream(cfg, store)
    passes = comm.get_world_size() * cfg.SOLVER.ACCUMULATION_STEPS
    fits = max(1, cfg.SOLVER.IMS_PER_BATCH // passes)  # so does the training's
    return ErfRefreshHook(
        model,
        lambda positions: stream[positions]["image"],
        num_images=erf.NUM_IMAGES,
        period=erf.PERIOD,
        first_iter=erf.FIRST_ITER,
        grad=erf.GRAD,
        max_drift=erf.MAX_DRIFT,
        amp_dtype=Precision.from_config(cfg).dtype if erf.AMP else None,
        figures=erf.FIGURES,
        macs=macs,
        batch_size=min(fits, BATCH_SIZES[unwrap(model).device.type]),
    )
