"""One optimiser step: forward, backward, check, update; accumulated, in mixed precision."""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from jigsaw_d2.engine.precision import Precision
from jigsaw_d2.engine.state import get_random_state

Batch = dict[str, Any]
# What of a batch the network takes.
_INPUTS = ("image", "gt_classes")


class LossReport:
    """Scalars of a step on their way to the host, averaged over the ranks.

    The copy starts as soon as the forward pass is queued, and is waited for after the backward pass
    is queued behind it: on a GPU the host learns of a bad loss before it queues the update, and the
    GPU never runs dry for it.
    """

    def __init__(self, values: dict[str, Tensor | float], device: torch.device) -> None:
        """
        Args:
            values: scalars of this rank, by name; every rank has the same names in the same order.
            device: where they are reduced.
        """
        self.names = list(values)
        # torch.full writes a number by a kernel; torch.as_tensor would copy it, and wait for that.
        local = torch.stack(
            [
                v.float() if isinstance(v, Tensor) else torch.full((), v, device=device)
                for v in values.values()
            ]
        )
        mean = local
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            mean = local.clone()
            torch.distributed.all_reduce(mean)
            mean /= torch.distributed.get_world_size()
        both = torch.stack([mean, local])
        self._event = None
        if device.type == "cuda":
            self._host = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
            self._host.copy_(both, non_blocking=True)
            self._event = torch.cuda.current_stream(device).record_event()
        else:
            self._host = both

    def wait(self) -> tuple[dict[str, float], dict[str, float]]:
        """The scalars averaged over all ranks, and this rank's own."""
        if self._event is not None:
            self._event.synchronize()
        mean, local = self._host.tolist()
        return dict(zip(self.names, mean)), dict(zip(self.names, local))


class DeviceBatches:
    """Batches on the device. On a GPU each is copied there while the step before it runs.

    Attributes:
        waited: seconds for which the device had nothing to do but to wait for data.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        """
        Args:
            batches: of a loader; in pinned memory for a GPU.
            device: of the network.
        """
        self._batches = batches
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[Batch, Batch] | None = None
        self.waited = 0.0

    def take(self) -> tuple[Batch, Batch]:
        """The next batch as the loader made it, and with the network's inputs on the device."""
        if self._ahead is None:
            self._ahead = self._fetch()
        (batch, moved), self._ahead = self._ahead, None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for value in moved.values():
                if isinstance(value, Tensor) and value.is_cuda:
                    value.record_stream(current)  # its memory is the other stream's
        return batch, moved

    def fetch_ahead(self) -> None:
        """On a GPU, once a step's work is queued: start the next batch on its way there."""
        if self._stream is not None and self._ahead is None:
            queued = torch.cuda.current_stream(self._device).record_event()
            with contextlib.suppress(StopIteration):  # ``take`` will say so, if it is called
                self._ahead = self._fetch(queued)

    def _fetch(self, queued: torch.cuda.Event | None = None) -> tuple[Batch, Batch]:
        start = time.perf_counter()
        batch = next(self._batches)
        if queued is None or queued.query():  # else the device was busy all the while
            self.waited += time.perf_counter() - start
        if self._stream is None or not isinstance(batch, Mapping):
            return batch, batch
        with torch.cuda.stream(self._stream):
            inputs = {
                key: batch[key].to(self._device, non_blocking=True)
                for key in _INPUTS
                if key in batch
            }
        return batch, {**batch, **inputs}


class TrainStep:
    """Runs steps of SOLVER.ACCUMULATION_STEPS backward passes each.

    The gradient is the mean over all images of the step, as of one large batch: each pass's loss, a
    mean over its images, is divided by the number of passes. (Batch norm sees the passes apart.)

    Attributes:
        batches, random_state: what it takes to do the last step again.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        precision: Precision,
        accumulation_steps: int = 1,
    ) -> None:
        """
        Args:
            model: batch -> dict of scalar losses; bare or in DistributedDataParallel.
            optimizer: over its parameters.
            precision: of the forward pass.
            accumulation_steps: batches per optimiser step.
        """
        self.model = model
        self.optimizer = optimizer
        self.precision = precision
        self.accumulation_steps = accumulation_steps
        self.device = next(model.parameters()).device
        self.grad_scaler = precision.grad_scaler()
        self.data_loader: Iterable[Batch] = ()
        self._batches = DeviceBatches(iter(()), self.device)
        self.batches: list[Batch] = []
        self.random_state: dict[str, Any] = {}

    def feed(self, data_loader: Iterable[Batch]) -> None:
        """Take batches from here on.

        The first is made at once: starting a loader draws from PyTorch's generator, which a resumed
        run sets to its old state only after this.
        """
        self.data_loader = data_loader
        batches = iter(data_loader)
        self._batches = DeviceBatches(itertools.chain([next(batches)], batches), self.device)

    def run(self, on_bad_loss: Callable[[dict[str, float], dict[str, float]], None]) -> dict:
        """One step.

        Args:
            on_bad_loss: called on every rank with the scalars (mean over ranks, own) when the mean
                loss is not finite, before any parameter changes. It is expected to raise.

        Returns:
            Scalars averaged over ranks: "total_loss", the losses by name where there are several,
            and "data_time", the seconds for which the device waited for data.
        """
        self.batches, self.random_state = [], get_random_state(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        report = self._accumulate()
        scalars, own = report.wait()
        if not math.isfinite(scalars["total_loss"]):
            on_bad_loss(scalars, own)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        return scalars

    def _accumulate(self) -> LossReport:
        """All backward passes of the step; its scalars, summed up over the passes."""
        sums: dict[str, Tensor | float] = {"data_time": 0.0}
        ddp = isinstance(self.model, DistributedDataParallel)
        for n in range(self.accumulation_steps):
            last = n == self.accumulation_steps - 1
            batch, moved = self._batches.take()
            self.batches.append(batch)
            with contextlib.nullcontext() if last or not ddp else self.model.no_sync():
                losses = self._forward(moved)
                loss = sum(losses.values())
                terms = {"total_loss": loss, **(losses if len(losses) > 1 else {})}
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + value.detach().float()
                if last:
                    sums["data_time"], self._batches.waited = self._batches.waited, 0.0
                    report = LossReport(sums, loss.device)
                self.grad_scaler.scale(loss).backward()
            self._batches.fetch_ahead()
        return report

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of one pass, already divided by the number of passes."""
        with self.precision.autocast():
            losses = self.model(batch)
        return {name: value / self.accumulation_steps for name, value in losses.items()}
