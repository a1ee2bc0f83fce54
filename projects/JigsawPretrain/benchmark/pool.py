"""Several runs of a comparison at once, each in a job of submitit: a process here, or of Slurm."""

import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmark.runner import FAILED, Comparison, Run
from jigsaw_d2.io import RunError
from jigsaw_d2.tools.stages import say


class RunJob:
    """A run as submitit's job: stopped by SIGTERM, it is queued again and goes on from there."""

    def __call__(self, comparison: Comparison, run: Run) -> Run:
        """Work in the job's own process."""
        return comparison.execute_run(run)

    def checkpoint(self, comparison: Comparison, run: Run) -> object:
        """What submitit queues in place of a job that was pre-empted."""
        from submitit.helpers import DelayedSubmission

        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm sends another while it queues again
        return DelayedSubmission(self, comparison, run)


class Pool:
    """Several runs at once, each in a job of submitit: a local process, or one of a cluster."""

    def __init__(self, folder: Path, jobs: int, gpus: int = 0, slurm: dict | None = None) -> None:
        """
        Args:
            jobs: at once, their logs in ``folder``; local ones share this machine's GPUs out.
            gpus: of each job.
            slurm: parameters of ``submitit.AutoExecutor``; None = local processes.
        """
        # What Slurm sends to a job that it pre-empts; submitit reads it while it is imported.
        os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "TERM")
        # A job must find what it unpickles.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        try:
            import submitit
        except ImportError:
            raise RunError("--jobs and --cluster need submitit: pip install submitit") from None
        self._gpus, self._jobs, self._local = gpus, jobs, slurm is None
        if self._local:
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
            self._executor = submitit.LocalExecutor(folder)
        else:
            self._executor = submitit.AutoExecutor(folder, "slurm", slurm_max_num_timeout=1000)
        options = slurm or {"timeout_min": 60 * 24 * 365}
        self._executor.update_parameters(name="jigsaw", gpus_per_node=gpus, **options)

    def map(self, comparison: Comparison, runs: Iterable[Run]) -> Iterator[Run]:
        """Each of ``runs``, executed, as they finish; leaving early cancels the others."""
        waiting, free, active = list(runs), list(range(self._jobs)), {}
        try:
            while waiting or active:
                while waiting and free:
                    slot, run = free.pop(0), waiting.pop(0)
                    if self._local and self._gpus:
                        self._executor.update_parameters(visible_gpus=self._visible(slot))
                    active[slot] = run, self._executor.submit(RunJob(), comparison, run)
                    say(f"{run}: job {active[slot][1].job_id}")
                for slot, (run, job) in [*active.items()]:
                    if job.done():
                        del active[slot]
                        free.append(slot)
                        yield _result(run, job)
                time.sleep(0.2)
        finally:
            for _, job in active.values():
                job.cancel()

    def _visible(self, slot: int) -> list[int]:
        """The GPUs of a job: neighbouring slots get neighbouring ones."""
        known = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        ids = [int(name) for name in known if name.isdigit()] or range(torch.cuda.device_count())
        return [ids[(slot * self._gpus + i) % len(ids)] for i in range(self._gpus)]


def _result(run: Run, job: object) -> Run:
    """What a finished job gave back; a job that died is a failed run."""
    try:
        return job.result()
    except RuntimeError as error:  # of submitit: no result, or our own mistake with its traceback
        line = str(error).strip().splitlines()[-1]
        return replace(run, status=FAILED, error=f"{line} (log: {job.paths.stderr})")
