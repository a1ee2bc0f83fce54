"""What a run resumes from: checkpoints that are whole or not there, and what they hold.

``model_0004999.pth`` holds the state after iteration 4999. ``last_checkpoint`` names it only once
it is complete and on the disk, so a kill at any moment leaves the last good one as it was. Beside
the model a checkpoint has enough to go on as if nothing had happened:

    iteration      index of the last step done
    optimizer, scheduler, grad_scaler (float16 only)
    jigsaw
        config         YAML of the resolved config
        store          categories, fingerprint, dataset, hash of the source image ids
        sampler        seed, and number of the next Jigsaw image
        rng            random states of every rank
        events         last values of the scalars that writers smooth
        images_seen, code_version

All of it tensors, numbers, strings, lists and dicts: ``torch.load(weights_only=True)`` reads it.
"""

import json
import logging
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from jigsaw_d2 import __version__
from jigsaw_d2.data.store_format import hash_image_ids
from jigsaw_d2.io import CheckpointError, ConfigError, RunError, open_atomically, write_text
from jigsaw_d2.modeling.erf import unwrap

logger = logging.getLogger(__name__)

# Iterations between two lines of metrics.json and of the log, as Detectron2 has it.
WRITE_PERIOD = 20
# Of SOLVER, what a checkpoint's state holds: another value would be said, and not be.
_OF_THE_STATE = (
    *("IMS_PER_BATCH", "OPTIMIZER", "BASE_LR", "BIAS_LR_FACTOR", "MOMENTUM", "NESTEROV"),
    *("WEIGHT_DECAY", "WEIGHT_DECAY_NORM", "WEIGHT_DECAY_BIAS", "LAYER_DECAY"),
)


class JigsawCheckpointer(DetectionCheckpointer):
    """Writes {"model", **state} atomically and loads it strictly.

    ``state`` comes with each call of ``save``; nothing is looked up by matching names.
    """

    def save(self, name: str, **state: Any) -> None:
        """Write ``name``.pth and then let ``last_checkpoint`` name it."""
        path = Path(self.save_dir) / f"{name}.pth"
        logger.info("saving checkpoint to %s", path)
        try:
            with open_atomically(path) as stream:
                torch.save({"model": self.model.state_dict(), **state}, stream)
            self.tag_last_checkpoint(path.name)
        except (OSError, RuntimeError) as error:  # the latter is PyTorch's writer, on a full disk
            refused = next((e for e in (error, error.__context__) if isinstance(e, OSError)), None)
            reason = f"the disk is full, it seems ({str(error).splitlines()[0]})"
            reason = refused.strerror if refused else reason
            raise RunError(
                f"cannot write {path}: {reason}; {self.last_whole()} Make room, then the same "
                "command with --resume goes on"
            ) from error

    def last_whole(self) -> str:
        """Which checkpoint a resume would go on from, as a sentence."""
        if not self.has_checkpoint():
            return "there is no earlier checkpoint."
        return f"{Path(self.get_checkpoint_file()).name} is whole."

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """As Detectron2's, but the old tag holds until the new one is on the disk."""
        write_text(Path(self.save_dir) / "last_checkpoint", last_filename_basename)

    def load_state(self, path: str | Path) -> dict[str, Any]:
        """Load the model strictly; return the rest of the checkpoint.

        Raises:
            CheckpointError: unreadable, or keys or shapes that differ from the model's.
        """
        checkpoint = read_checkpoint(path)
        try:
            self.model.load_state_dict(checkpoint.pop("model"))
        except RuntimeError as error:
            raise CheckpointError(f"{path} is of another model: {error}") from error
        logger.info("loaded the model of %s", path)
        return checkpoint


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A run's checkpoint, on the CPU; only tensors and plain values are accepted.

    Raises:
        CheckpointError: missing, damaged, or not one of this project's.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        folder = Path(path).parent
        others = ", ".join(sorted(p.name for p in folder.glob("model_*.pth"))) or "none"
        raise CheckpointError(f"{path} is missing; checkpoints in its folder: {others}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); write the name of an earlier "
            "one into last_checkpoint to resume from that"
        ) from error
    if not isinstance(checkpoint, dict) or not {"model", "jigsaw"} <= set(checkpoint):
        raise CheckpointError(f"{path} is no pre-training checkpoint of jigsaw_d2")
    return checkpoint


def collect_state(trainer: DefaultTrainer) -> dict[str, Any]:
    """The state after the step that a ``JigsawTrainer`` has just done; every rank must call it."""
    step, cfg, model = trainer._trainer, trainer.cfg, unwrap(trainer.model)
    images_seen = (trainer.iter + 1) * cfg.SOLVER.IMS_PER_BATCH
    state = {
        "iteration": trainer.iter,
        "optimizer": step.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
        "jigsaw": {
            "config": cfg.dump(),
            "store": {
                "categories": list(trainer.store.categories),
                "fingerprint": trainer.store.fingerprint,
                "dataset": str(trainer.store.header.get("source", "")),
                "image_ids_hash": hash_image_ids(trainer.store.image_ids),
            },
            "sampler": {"seed": cfg.SEED, "position": images_seen},
            "rng": comm.all_gather(get_random_state(trainer.device)),
            "events": smoothed_events(trainer.storage),
            "images_seen": images_seen,
            "code_version": __version__,
            "set_aside": [n for n, p in model.named_parameters() if not p.requires_grad],
        },
    }
    if step.grad_scaler.is_enabled():
        state["grad_scaler"] = step.grad_scaler.state_dict()
    return state


def restore_state(trainer: DefaultTrainer, state: dict[str, Any]) -> dict[str, Any]:
    """Put ``trainer`` after the step at which ``state`` was collected.

    Returns:
        {"events", "random_state"}: what must wait until the loader and the storage exist;
        ``random_state`` is None where the number of ranks has changed.

    Raises:
        CheckpointError: the store is not the one that the run was training on.
        ConfigError: the batch has another size, or the optimiser other settings.
    """
    jigsaw = state["jigsaw"]
    if jigsaw["store"]["fingerprint"] != trainer.store.fingerprint:
        raise CheckpointError(
            f"DATASETS.TRAIN {', '.join(trainer.cfg.DATASETS.TRAIN)} changed since the checkpoint "
            "was written; give the old store back, or start a run in another OUTPUT_DIR with "
            "MODEL.WEIGHTS set to the checkpoint"
        )
    then, now = yaml.safe_load(jigsaw["config"])["SOLVER"], trainer.cfg.SOLVER
    changed = [key for key in _OF_THE_STATE if key in then and then[key] != now[key]]
    if changed:
        pairs = (f"SOLVER.{key} was {then[key]} and is {now[key]}" for key in changed)
        raise ConfigError(
            f"{'; '.join(pairs)}: the checkpoint's optimiser, rates and position in the images are "
            "those of the former; set it back (of IMS_PER_BATCH on fewer GPUs with a larger "
            "SOLVER.ACCUMULATION_STEPS), or start a run in another OUTPUT_DIR with MODEL.WEIGHTS "
            "set to the checkpoint"
        )
    _restore_optimizer(trainer._trainer.optimizer, state["optimizer"])
    trainer.scheduler.load_state_dict(state["scheduler"])
    if "grad_scaler" in state:
        trainer._trainer.grad_scaler.load_state_dict(state["grad_scaler"])
    trainer.iter = state["iteration"]
    states, size = jigsaw["rng"], comm.get_world_size()
    if len(states) != size:
        logger.warning(
            "the checkpoint is of %d processes, this run has %d: it goes on with the same images, "
            "but not bit for bit",
            *(len(states), size),
        )
    random_state = states[comm.get_rank()] if len(states) == size else None
    return {"events": jigsaw["events"], "random_state": random_state}


def check_same_start(model: nn.Module, start_iter: int, output_dir: str) -> None:
    """Refuse ranks that would go on from different iterations or weights; every rank calls it.

    Raises:
        RunError: on every rank, with what each of them found.
    """
    total = sum(p.detach().double().sum() for p in model.parameters()).item()
    starts = comm.all_gather((start_iter, total))
    if len(set(starts)) > 1:
        found = "; ".join(f"rank {r}: iteration {i}" for r, (i, _) in enumerate(starts))
        raise RunError(
            f"the ranks do not start from the same weights ({found}): OUTPUT_DIR {output_dir} and "
            "MODEL.WEIGHTS must be the same files on every machine; put them on a shared disk, or "
            "copy the checkpoints and last_checkpoint to all machines"
        )


def _restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load its state, but go on in the form that suits this machine, whatever the saved one was.

    PyTorch puts AdamW's count of steps where the form in the state wants it, so that is changed.
    """
    forms = [{key: group[key] for key in ("fused", "foreach")} for group in optimizer.param_groups]
    groups = [group | form for group, form in zip(state["param_groups"], forms)]
    optimizer.load_state_dict({**state, "param_groups": groups})


def smoothed_events(storage: EventStorage) -> dict[str, list[list[float]]]:
    """The last (value, iteration) pairs of each scalar that writers smooth."""
    names = [name for name, smooth in storage.smoothing_hints().items() if smooth]
    return {n: [list(v) for v in storage.history(n).values()[-WRITE_PERIOD:]] for n in names}


def get_random_state(device: torch.device) -> dict[str, Any]:
    """States of Python's, NumPy's and PyTorch's global generators: tensors, numbers and strings.

    ``torch.load(weights_only=True)`` reads them back.

    Args:
        device: its generator is among them where it is a GPU.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Continue where ``get_random_state`` was called; a CUDA state matters on a GPU only."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Replace every batch norm's running statistics by their mean over the ranks.

    Plain batch norm sees only its rank's images; evaluation, ERF and checkpoint use one model. Does
    nothing on one process.
    """
    if comm.get_world_size() == 1:
        return
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for buffer in (b for m in norms for b in (m.running_mean, m.running_var)):
        torch.distributed.all_reduce(buffer)
        buffer /= comm.get_world_size()


def truncate_metrics(path: Path, start_iter: int) -> int:
    """Drop from metrics.json what a resumed run writes again, and a line that a kill cut short.

    Args:
        path: one JSON object a line, each with "iteration".
        start_iter: first iteration that is run (again).

    Returns:
        Number of lines dropped.
    """
    if not path.is_file():
        return 0
    lines = path.read_text().splitlines()
    kept = [line for line in lines if _iteration(line) < start_iter]
    if len(kept) < len(lines):
        write_text(path, "".join(f"{line}\n" for line in kept))
    return len(lines) - len(kept)


def _iteration(line: str) -> float:
    """The line's iteration; infinite where the line is no whole record."""
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
