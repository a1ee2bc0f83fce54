"""One optimiser step: forward, backward, check, update; accumulated, in mixed precision."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from jigsaw_d2.errors import JigsawError
from jigsaw_d2.training.precision import Precision
from jigsaw_d2.training.random_state import get_random_state

Batch = dict[str, Any]


class NonFiniteLossError(JigsawError, FloatingPointError):
    """A loss that is infinite or not a number; the parameters are those before the step."""


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
        local = torch.stack(
            [torch.as_tensor(v, dtype=torch.float32, device=device) for v in values.values()]
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
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = both

    def wait(self) -> tuple[dict[str, float], dict[str, float]]:
        """The scalars averaged over all ranks, and this rank's own."""
        if self._event is not None:
            self._event.synchronize()
        mean, local = self._host.tolist()
        return dict(zip(self.names, mean)), dict(zip(self.names, local))


@dataclass
class StepRecord:
    """What it takes to do the step again: its batches, and the random state before it."""

    batches: list[Batch] = field(default_factory=list)
    random_state: dict[str, Any] = field(default_factory=dict)


class TrainStep:
    """Runs steps of SOLVER.ACCUMULATION_STEPS backward passes each.

    The gradient is the mean over all images of the step, as of one large batch: each pass's loss, a
    mean over its images, is divided by the number of passes. (Batch norm sees the passes apart.)
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
        self.grad_scaler = precision.grad_scaler()
        self.data_loader: Iterable[Batch] = ()
        self._batches: Iterator[Batch] = iter(())
        self.record = StepRecord()

    def feed(self, data_loader: Iterable[Batch]) -> None:
        """Take batches from here on.

        The first is made at once: starting a loader draws from PyTorch's generator, which a resumed
        run sets to its old state only after this.
        """
        self.data_loader = data_loader
        batches = iter(data_loader)
        self._batches = itertools.chain([next(batches)], batches)

    def run(self, on_bad_loss: Callable[[dict[str, float], dict[str, float]], None]) -> dict:
        """One step.

        Args:
            on_bad_loss: called on every rank with the scalars (mean over ranks, own) when the mean
                loss is not finite, before any parameter changes. It is expected to raise.

        Returns:
            Scalars averaged over ranks: "total_loss", the losses by name where there are several,
            and "data_time", the seconds waited for data.
        """
        self.record = StepRecord(random_state=get_random_state())
        self.optimizer.zero_grad(set_to_none=True)
        report = self._accumulate()
        scalars, own = report.wait()
        if not torch.isfinite(torch.tensor(scalars["total_loss"])):
            on_bad_loss(scalars, own)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        return scalars

    def _accumulate(self) -> LossReport:
        """All backward passes of the step; its scalars, summed up over the passes."""
        sums: dict[str, Tensor | float] = {"data_time": 0.0}
        for n in range(self.accumulation_steps):
            last = n == self.accumulation_steps - 1
            batch, seconds = self._next_batch()
            self.record.batches.append(batch)
            sums["data_time"] += seconds
            with contextlib.nullcontext() if last else self._without_sync():
                losses = self._forward(batch)
                loss = sum(losses.values())
                terms = {"total_loss": loss, **(losses if len(losses) > 1 else {})}
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + value.detach().float()
                if last:
                    report = LossReport(sums, loss.device)
                self.grad_scaler.scale(loss).backward()
        return report

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of one pass, already divided by the number of passes."""
        with self.precision.autocast():
            losses = self.model(batch)
        return {name: value / self.accumulation_steps for name, value in losses.items()}

    def _next_batch(self) -> tuple[Batch, float]:
        start = time.perf_counter()
        batch = next(self._batches)
        return batch, time.perf_counter() - start

    def _without_sync(self) -> contextlib.AbstractContextManager:
        """Passes before the last keep their gradients to themselves."""
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()
