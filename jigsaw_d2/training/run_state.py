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

from jigsaw_d2 import __version__
from jigsaw_d2.data.store import SampleStore, hash_image_ids
from jigsaw_d2.training.checkpointing import CheckpointError
from jigsaw_d2.training.hooks import WRITE_PERIOD
from jigsaw_d2.training.random_state import gather_random_states

if TYPE_CHECKING:
    from jigsaw_d2.trainer import JigsawTrainer

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
            "rng": gather_random_states(),
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
    trainer._trainer.optimizer.load_state_dict(state["optimizer"])
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
