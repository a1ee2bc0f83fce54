"""What happens around the steps of a pre-training: speed, cost log, checkpoints, figures."""

import logging
import math
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage

from jigsaw_d2.cost import TRAIN_FORWARDS
from jigsaw_d2.engine.interrupt import StopNotice
from jigsaw_d2.engine.state import WRITE_PERIOD, set_random_state

logger = logging.getLogger(__name__)

# Written before an evaluation that no other checkpoint precedes, and again before the next.
BEFORE_EVALUATION = "model_before_evaluation"


class MeterHook(HookBase):
    """images_per_s, data_wait_share, erf_share and memory_mb; and the cost log of the training.

    A step's seconds count from its start to its end: ERF refreshes, evaluations and checkpoints,
    which come after, are no part of the speed.
    """

    def __init__(self, macs: int, pyramid_macs: int = 0) -> None:
        """
        Args:
            macs: multiply-accumulates of one image's forward pass.
            pyramid_macs: those of them that a feature pyramid adds to its bottom-up network.
        """
        self._macs = macs
        self._facts = {"macs_per_image": macs}
        if pyramid_macs:
            self._facts["pyramid_macs_per_image"] = pyramid_macs
        self._steps = 0
        self._seconds = self._run_seconds = self._start = 0.0

    def before_step(self) -> None:
        self._start = time.perf_counter()

    def after_step(self) -> None:
        """Scalars of the step just done; the cost log every WRITE_PERIOD steps and checkpoint."""
        storage, solver = self.trainer.storage, self.trainer.cfg.SOLVER
        elapsed = time.perf_counter() - self._start
        self._steps += 1
        self._seconds += elapsed
        self._run_seconds += elapsed
        waited = storage.latest().get("data_time", (0.0, 0))[0]
        storage.put_scalar("images_per_s", solver.IMS_PER_BATCH / max(elapsed, 1e-9))
        storage.put_scalar("data_wait_share", min(waited / max(elapsed, 1e-9), 1.0))
        erf = self.trainer.cost_log.seconds.get("erf_refresh", 0.0) / comm.get_world_size()
        storage.put_scalar("erf_share", erf / (erf + self._run_seconds), smoothing_hint=False)
        done = self.trainer.iter + 1
        if done % WRITE_PERIOD == 0:
            storage.put_scalar("memory_mb", memory_mb(self.trainer.device), False)
            self._flush()
        elif solver.CHECKPOINT_PERIOD > 0 and done % solver.CHECKPOINT_PERIOD == 0:
            self._flush()

    def after_train(self) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._steps:
            images = self._steps * self.trainer.cfg.SOLVER.IMS_PER_BATCH
            self.trainer.cost_log.record(
                "pretraining",
                images=images,
                pixels=images * math.prod(self.trainer.cfg.INPUT.JIGSAW.TEMPLATE_SIZE),
                flops=2 * self._macs * TRAIN_FORWARDS * images,
                seconds=self._seconds * comm.get_world_size(),
                **self._facts,
            )
        self._steps, self._seconds = 0, 0.0


def memory_mb(device: torch.device) -> float:
    """Most memory held at once, in MiB: by PyTorch on a GPU, by this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class MeterPrinter(EventWriter):
    """The log line that Detectron2's printer leaves out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def write(self) -> None:
        """The line, in iterations that were metered."""
        storage = get_event_storage()
        latest = storage.latest_with_smoothing_hint(WRITE_PERIOD)
        if latest.get("images_per_s", (0.0, -1))[1] != storage.iter:
            return  # no step since the last line
        value = {name: pair[0] for name, pair in latest.items()}
        line = (
            f" iter: {storage.iter}  {value['images_per_s']:.1f} images/s"
            f"  data wait: {value['data_wait_share']:.1%}  erf: {value['erf_share']:.1%}"
            f"  memory: {value.get('memory_mb', memory_mb(self._device)):.0f}M"
        )
        names = [f"region/R{r}_top1" for r in range(1, 5)]
        tops = [f"{100 * value[name]:.1f}" for name in names if name in value]
        logger.info("%s%s", line, f"  top-1 of R1..R4: {' '.join(tops)} %" if tops else "")


class CheckpointHook(HookBase):
    """model_XXXXXXX.pth every ``period`` iterations and at a notice, model_final.pth at the end.

    Runs on every rank, for each has a random state to save; rank 0 writes.
    """

    def __init__(self, period: int, notice: StopNotice | None = None, eval_period: int = 0) -> None:
        """
        Args:
            notice: to stop, which is listened to while training.
            eval_period: of evaluations, before each of which the state is written.
        """
        self._period, self._notice, self._eval_period = period, notice or StopNotice(), eval_period

    def before_train(self) -> None:
        self._notice.listen()

    def after_step(self) -> None:
        """Write the state where it is due; end the process where a notice asks all ranks to."""
        iteration, done = self.trainer.iter, self.trainer.iter + 1
        number, name = self._notice.agreed(iteration), f"model_{iteration:07d}"
        if done >= self.trainer.max_iter:
            name = "model_final"
        elif not number and not (self._period > 0 and done % self._period == 0):
            evaluates = self._eval_period > 0 and done % self._eval_period == 0
            name = BEFORE_EVALUATION if evaluates else ""
        if name:
            self.trainer.save_checkpoint(name)
        if number:
            comm.synchronize()  # the first process that ends takes the others with it
            logger.info(
                "stopped by %s: %s.pth holds all of iteration %d; the same command with --resume "
                "goes on from there",
                *(signal.Signals(number).name, name, iteration),
            )
            sys.exit(128 + number)


class ContinueHook(HookBase):
    """Last before the first step: random states and smoothing windows as the checkpoint left them.

    Building model, loader and writers draws random numbers; an unbroken run drew them once.
    """

    def before_train(self) -> None:
        """Put them back, if a checkpoint was resumed."""
        resumed = self.trainer.resumed
        if not resumed:
            return
        for name, values in resumed["events"].items():
            for value, iteration in values:
                self.trainer.storage.iter = iteration
                self.trainer.storage.put_scalar(name, value)
        self.trainer.storage.iter = self.trainer.iter
        if resumed["random_state"] is not None:
            set_random_state(resumed["random_state"], self.trainer.device)


class FirstBatchHook(HookBase):
    """figures/first_batch.png, and the same in TensorBoard: a look before a wait of days."""

    def after_step(self) -> None:
        """Draw it, after the first step alone."""
        if self.trainer.iter > 0:
            return
        from jigsaw_d2.visualization.figures import figure_pixels, save_figure  # with matplotlib
        from jigsaw_d2.visualization.jigsaw import batch_figure

        step = self.trainer._trainer
        path = Path(self.trainer.cfg.OUTPUT_DIR) / "figures" / "first_batch.png"
        figure = batch_figure(step.batches[0], step.data_loader)
        save_figure(figure, path)
        self.trainer.storage.put_image("first_batch", figure_pixels(figure))
        logger.info("the first batch is drawn in %s", path)


class WriterHook(PeriodicWriter):
    """Detectron2's, with writers made only when it is known where the run starts."""

    def __init__(self) -> None:
        super().__init__([], WRITE_PERIOD)

    def before_train(self) -> None:
        self._writers = self.trainer.build_writers()
