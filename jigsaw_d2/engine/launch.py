"""One process or many, on one machine or several: Detectron2's ``launch``, or ``torchrun``."""

import contextlib
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from jigsaw_d2.engine.interrupt import STATUSES, passed_on
from jigsaw_d2.io import ConfigError, JigsawError, PeerLostError, RunError, lock_folder, write_text

logger = logging.getLogger(__name__)

# Seconds in which a thread gets its turn even on a crowded machine.
GLOO_RESTS = 0.2
# Set by torchrun for each process it starts.
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
# What Gloo, NCCL and the store of the process group say when a peer is gone or silent. Text, for
# Gloo raises a plain RuntimeError for everything.
_PEER_GONE = re.compile(
    "closed by peer|connection reset|broken pipe|timed? ?out|remote process|peer|"
    "nccl (communicator|error)|watchdog|socket",
    re.IGNORECASE,
)


def launch_job(
    main_func: Callable[..., Any],
    num_gpus: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: tuple = (),
    timeout: float = 600,
    device: str = "cuda",
) -> None:
    """Run ``main_func(*args)`` in every process of the job.

    Under torchrun this process is one of them and the four numbers are torchrun's; otherwise
    Detectron2's ``launch`` starts ``num_gpus`` processes on this machine. On CPUs they use Gloo.

    Args:
        timeout: seconds without a sign of life after which the others give up on a process.
        device: MODEL.DEVICE; with "cpu" the processes leave the machine's GPUs alone.

    Raises:
        ConfigError: more processes than GPUs.
        PeerLostError: a process of the job was killed, or did not answer in time.
        RunError: one that ``launch`` started met an error of this project's.
    """
    on_gpu = torch.device(device).type == "cuda"
    if all(name in os.environ for name in _TORCHRUN_VARIABLES):
        _join_torchrun(timeout, on_gpu)
        # Not in a finally: a rank that failed would wait in there for the others, and they for it.
        _run_and_leave("", timeout, main_func, *args)
        return
    if num_gpus * num_machines == 1:
        main_func(*args)
        return
    if on_gpu and torch.cuda.is_available() and num_gpus > torch.cuda.device_count():
        raise ConfigError(
            f"--num-gpus is {num_gpus}, but PyTorch sees {torch.cuda.device_count()} GPU(s)"
        )
    limit = timedelta(seconds=timeout)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if not on_gpu:
            # The processes see no GPU: Detectron2 would join them by NCCL if they did.
            stack.enter_context(mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""))
        try:
            with passed_on():
                launch(
                    *(_run_and_leave, num_gpus, num_machines, machine_rank, dist_url),
                    *((folder, timeout, main_func, *args), limit),
                )
        except ProcessExitedException as error:
            if error.exit_code in STATUSES:
                sys.exit(error.exit_code)
            raise PeerLostError(
                f"process {error.error_index} of this machine ended ({error.msg.splitlines()[0]}); "
                "the others were stopped; start again with --resume"
            ) from error
        except ProcessRaisedException as error:
            said = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
            if not said:
                raise
            # One that lost a peer may be the first to say so; the peer's own words say why.
            lost, text = min(said)
            raise (PeerLostError if lost else RunError)(text) from error


def _run_and_leave(folder: str, timeout: float, main_func: Callable[..., Any], *args: Any) -> None:
    """In each process; an error of ours is kept in ``folder`` for the one that started it."""
    if torch.distributed.get_backend() == "nccl":
        # Detectron2 makes this group on its first use, with half an hour's patience.
        side = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        comm._get_global_gloo_group = lambda: side
    try:
        main_func(*args)
    except (JigsawError, OSError) as error:
        if folder:
            rank = comm.get_local_rank()
            content = [isinstance(error, PeerLostError), f"process {rank}: {error}"]
            write_text(Path(folder) / f"{rank}.json", json.dumps(content))
        raise
    except SystemExit:  # of a notice to stop
        leave_group()
        raise
    leave_group()


def leave_group() -> None:
    """End this process's part in the job, after all that used the group is gone.

    A thread of Gloo's takes the interpreter's lock to let go of what a finished collective held.
    The end of the group, or of the process, waits for that thread while holding the lock: right
    behind a collective they would wait for each other for ever, so the thread is let through first.
    (Nothing in PyTorch tells when that thread has let go; hence a rest.)
    """
    time.sleep(GLOO_RESTS)
    torch.distributed.destroy_process_group()


def _join_torchrun(timeout: float, on_gpu: bool) -> None:
    """Do for a process of torchrun what ``launch`` does for its own."""
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if on_gpu:
        if local_size > torch.cuda.device_count():
            raise ConfigError(
                f"torchrun started {local_size} processes here, but PyTorch sees "
                f"{torch.cuda.device_count()} GPU(s); start as many, or set MODEL.DEVICE cpu"
            )
        torch.cuda.set_device(local_rank)
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout)
    )
    machines = torch.distributed.get_world_size() // local_size
    mine = torch.distributed.get_rank() // local_size
    for machine in range(machines):  # every process creates every group, in the same order
        ranks = list(range(machine * local_size, (machine + 1) * local_size))
        group = torch.distributed.new_group(ranks)
        if machine == mine:
            comm._LOCAL_PROCESS_GROUP = group
    logger.info("joined torchrun: rank %d of %d", comm.get_rank(), comm.get_world_size())


def lock_output(output_dir: str, eval_only: bool) -> contextlib.AbstractContextManager:
    """A lock of OUTPUT_DIR, which the main process of a training holds against another one.

    Raises:
        RunError: another job is writing it.
    """
    if eval_only or not comm.is_main_process():
        return contextlib.nullcontext()
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    return lock_folder(Path(output_dir))


class _OurErrorsInALine(logging.Filter):
    """Detectron2's loop logs the traceback of every error; ours say all there is to say."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, (JigsawError, OSError))


logging.getLogger("detectron2.engine.train_loop").addFilter(_OurErrorsInALine())


@contextlib.contextmanager
def explained(timeout: float) -> Iterator[None]:
    """Inside, errors of the machine, of workers and of peers become ours, in words.

    Args:
        timeout: SOLVER.PEER_TIMEOUT.
    """
    try:
        yield
    except (JigsawError, RuntimeError) as error:
        text = str(error)
        if "Original Traceback" in text and isinstance(error, JigsawError):  # from a worker
            raise type(error)(text.strip().splitlines()[-1].partition(": ")[2]) from None
        if "DataLoader worker" in text and not isinstance(error, JigsawError):
            raise RunError(
                f"a worker process of the loader died ({text.splitlines()[0]}): lower "
                "DATALOADER.NUM_WORKERS if memory or /dev/shm is full; --resume goes on"
            ) from error
        if isinstance(error, torch.OutOfMemoryError):
            raise RunError(
                f"out of GPU memory ({text.splitlines()[0]}): lower SOLVER.IMS_PER_BATCH or the "
                "size of the images"
            ) from error
        alone = comm.get_world_size() == 1
        if isinstance(error, JigsawError) or alone or not _PEER_GONE.search(text):
            raise
        raise PeerLostError(
            f"rank {comm.get_rank()} lost a peer: another process died, or said nothing for "
            f"SOLVER.PEER_TIMEOUT = {timeout:g} s ({text.splitlines()[0]}); see the other ranks' "
            "logs, then start again with --resume"
        ) from error
