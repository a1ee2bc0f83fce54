"""Renews the label weights of Eq. 2 while training runs (Sec. 3.3: every 5,000 iterations)."""

import logging
import time
from collections.abc import Callable

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
from jigsaw_d2.modeling.losses import OBJECTIVES

logger = logging.getLogger(__name__)

# Images of one backward pass; the sums do not depend on it.
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
        # One forward pass, and one backward pass to the input a cell: as many products again.
        self._flops = 2 * macs * (1 + self._model.cell_regions.numel())

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

    def refresh(self, iteration: int, least_drift: float | None = None) -> float:
        """Measure and, unless the weights changed by no more than ``least_drift``, install them.

        Returns:
            The drift: mean absolute change of the weights against those in force.
        """
        start = time.perf_counter()
        model = self._model
        average_statistics(model)  # one network is measured, by parts
        measured = self._measure(iteration, self._amp_dtype)
        if self._amp_dtype and not measured.region_sums.isfinite().all():
            logger.warning("ERF not finite in %s; measured again without AMP", self._amp_dtype)
            measured = self._measure(iteration, None)
        sums = measured.region_sums
        weights = region_weights(sums, model.cell_regions, model.tau).to(model.erf_weights)
        _broadcast(sums, weights)
        drift = (weights - model.erf_weights).abs().mean().item()
        first = not model.erf_region_sums.any()
        installed = least_drift is None or drift > least_drift
        if installed:
            model.erf_weights.copy_(weights)
            model.erf_region_sums.copy_(sums)
        seconds = time.perf_counter() - start
        self._record(seconds)
        if comm.is_main_process():
            self._report(iteration, measured, drift, seconds, first, installed)
        return drift

    def _measure(self, iteration: int, amp_dtype: torch.dtype | None) -> ErfMeasurement:
        """Mean over the images of all ranks; maps, if any, of this rank's images alone."""
        model = self._model
        first = iteration * self._num_images
        last = first + self._num_images
        positions = range(first + comm.get_rank(), last, comm.get_world_size())
        total = torch.zeros_like(model.erf_region_sums)
        maps = None
        if positions:
            measured = measure_erf(
                model.backbone,
                model.preprocess(self._load_images(positions)),
                model.template,
                model.in_feature,
                self._grad,
                batch_size=BATCH_SIZES[model.device.type],
                with_maps=self._figures and comm.is_main_process(),
                amp_dtype=amp_dtype,
            )
            total += measured.region_sums * len(positions)
            maps = measured.region_maps
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(total)
        return ErfMeasurement(total / self._num_images, maps, self._num_images)

    def _report(
        self,
        iteration: int,
        measured: ErfMeasurement,
        drift: float,
        seconds: float,
        first: bool,
        installed: bool,
    ) -> None:
        """Log and event storage; the summary shows the weights in force from now on."""
        model, storage = self._model, self.trainer.storage
        sums, regions = measured.region_sums.cpu(), model.cell_regions.cpu()
        outside = outside_shares(sums, regions).tolist()
        if not first:
            storage.put_scalar("erf/drift", drift, smoothing_hint=False)
        for r, share in enumerate(outside):
            storage.put_scalar(f"erf/outside_share_R{r + 1}", share, smoothing_hint=False)
        storage.put_scalar("erf/seconds", seconds, smoothing_hint=False)
        change = "first measurement" if first else f"drift {drift:.4f}"
        verb = "ERF weights renewed" if installed else "ERF probed, weights kept"
        table = format_summary(sums, model.erf_weights.cpu(), regions)
        logger.info(
            "%s at iteration %d: %d images, %.1f s, %s%s",
            *(verb, iteration, measured.num_images, seconds, change),
            f"\n{table}" if installed else "",
        )
        if installed and measured.region_maps is not None:
            from jigsaw_d2.visualization.erf import erf_figure  # brings matplotlib in
            from jigsaw_d2.visualization.figures import figure_pixels

            shares = region_shares(sums, regions)
            figure = erf_figure([""], [measured.region_maps], [shares], model.template)
            storage.put_image("erf/regions", figure_pixels(figure))

    def _record(self, seconds: float) -> None:
        """The measurement's cost, to the trainer's cost log if it keeps one."""
        cost_log = getattr(self.trainer, "cost_log", None)
        if cost_log is None:
            return
        height, width = self._model.template.height, self._model.template.width
        cost_log.record(
            "erf_refresh",
            images=self._num_images,
            pixels=self._num_images * height * width,
            flops=self._num_images * self._flops,
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
    )
