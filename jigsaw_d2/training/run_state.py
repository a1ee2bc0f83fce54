"""What a checkpoint holds beside the model: enough to go on as if nothing had happened.

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

import logging
from typing import TYPE_CHECKING, Any

from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.optim import Optimizer

from jigsaw_d2 import __version__
from jigsaw_d2.io import RunError
from jigsaw_d2.sample_store import SampleStore
from jigsaw_d2.store.format import hash_image_ids
from jigsaw_d2.training.checkpointing import CheckpointError
from jigsaw_d2.engine.hooks import WRITE_PERIOD
from jigsaw_d2.training.random_state import gather_random_states

if TYPE_CHECKING:
    from jigsaw_d2.engine.trainer import JigsawTrainer

logger = logging.getLogger(__name__)


def collect_state(trainer: "JigsawTrainer") -> dict[str, Any]:
    """The state after the step that ``trainer`` has just done; every rank must call it."""
    step, cfg = trainer._trainer, trainer.cfg
    images_seen = (trainer.iter + 1) * cfg.SOLVER.IMS_PER_BATCH
    state = {
        "iteration": trainer.iter,
        "optimizer": step.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
        "jigsaw": {
            "config": cfg.dump(),
            "store": describe_store(trainer.store),
            "sampler": {"seed": cfg.SEED, "position": images_seen},
            "rng": gather_random_states(trainer.device),
            "events": smoothed_events(trainer.storage),
            "images_seen": images_seen,
            "code_version": __version__,
        },
    }
    if step.grad_scaler.is_enabled():
        state["grad_scaler"] = step.grad_scaler.state_dict()
    return state


def restore_state(trainer: "JigsawTrainer", state: dict[str, Any]) -> dict[str, Any]:
    """Put ``trainer`` after the step at which ``state`` was collected.

    Returns:
        {"events", "random_state"}: what must wait until the loader and the storage exist;
        ``random_state`` is None where the number of ranks has changed.

    Raises:
        CheckpointError: the store is not the one that the run was training on.
    """
    jigsaw = state["jigsaw"]
    if jigsaw["store"]["fingerprint"] != trainer.store.fingerprint:
        raise CheckpointError(
            f"DATASETS.TRAIN {', '.join(trainer.cfg.DATASETS.TRAIN)} changed since the checkpoint "
            "was written; give the old store back, or start a run in another OUTPUT_DIR with "
            "MODEL.WEIGHTS set to the checkpoint"
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
    """Load its state, but go on in the form that suits this machine, whatever the saved one was."""
    forms = [(group["fused"], group["foreach"]) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, (fused, foreach) in zip(optimizer.param_groups, forms):
        group["fused"], group["foreach"] = fused, foreach


def describe_store(store: SampleStore) -> dict[str, Any]:
    """What a checkpoint remembers of its data."""
    return {
        "categories": list(store.categories),
        "fingerprint": store.fingerprint,
        "dataset": str(store.header.get("source", "")),
        "image_ids_hash": hash_image_ids(store.image_ids),
    }


def smoothed_events(storage: EventStorage) -> dict[str, list[list[float]]]:
    """The last (value, iteration) pairs of each scalar that writers smooth."""
    names = [name for name, smooth in storage.smoothing_hints().items() if smooth]
    return {n: [list(v) for v in storage.history(n).values()[-WRITE_PERIOD:]] for n in names}
