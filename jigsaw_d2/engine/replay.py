"""A step that went wrong, kept in a file, and done again: ``train_net.py --replay FILE``."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.config_files import import_kept, refuse_program
from jigsaw_d2.engine.precision import Precision
from jigsaw_d2.engine.run_config import use_device
from jigsaw_d2.engine.state import set_random_state
from jigsaw_d2.engine.train_step import TrainStep
from jigsaw_d2.io import CheckpointError, open_atomically
from jigsaw_d2.modeling.backbones import unknown_explained
from jigsaw_d2.modeling.meta_arch import JigsawPretrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replay:
    """What the repeated step gave."""

    iteration: int
    loss: float
    recorded_loss: float
    # The first module, in order of execution, whose output is not finite; "" = none.
    first_bad_module: str
    # Parameters whose values were not finite before the step.
    bad_parameters: list[str]
    # Parameters whose gradients are not finite after it.
    bad_gradients: list[str]


def save_step(
    path: Path, cfg: CfgNode, step: TrainStep, model: nn.Module, iteration: int, loss: float
) -> None:
    """Write all that the step depends on: config, model, optimiser, scaler, batches, random state.

    The parameters are those before the step. (Running statistics of batch norm have seen it; a
    training step does not read them.)
    """
    content = {
        "jigsaw_replay": 1,
        "config": cfg.dump(),
        "iteration": iteration,
        "loss": loss,
        "model": model.state_dict(),
        "optimizer": step.optimizer.state_dict(),
        "grad_scaler": step.grad_scaler.state_dict(),
        "batches": step.batches,
        "random_state": step.random_state,
    }
    with open_atomically(path) as stream:
        torch.save(content, stream)


def replay_step(
    path: str | Path, overrides: list[str] | None = None, trust: bool = False
) -> Replay:
    """Repeat a kept step, watching every module, without changing anything.

    Args:
        path: the file that the stopped run named.
        overrides: KEY VALUE pairs, e.g. ["MODEL.DEVICE", "cpu"] or ["SOLVER.AMP.ENABLED", "False"].
        trust: run programs and import modules that the step's config names.

    Raises:
        CheckpointError: the file is no kept step.
        ConfigError: its config names a program, and ``trust`` is not given.
    """
    content = _read(path)
    kept = CfgNode.load_cfg(content["config"])
    import_kept(kept, path, trust)
    cfg = get_jigsaw_cfg()
    cfg.merge_from_other_cfg(kept)
    cfg.merge_from_list(overrides or [])
    refuse_program(cfg, path, overrides or [], trust)
    use_device(cfg)
    if cfg.MODEL.RESNETS.NORM == "SyncBN":
        logger.warning("SyncBN is replayed as BN: the other ranks' images are not in the file")
        cfg.MODEL.RESNETS.NORM = "BN"
    with unknown_explained(cfg):
        model: JigsawPretrainer = build_model(cfg)
    model.load_state_dict(content["model"])
    model.train()
    step = TrainStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        Precision.from_config(cfg),
        len(content["batches"]),
    )
    if content["grad_scaler"]:  # empty of a step that was not in float16
        step.grad_scaler.load_state_dict(content["grad_scaler"])
    step.feed(content["batches"])
    bad_parameters = [n for n, p in model.named_parameters() if not p.isfinite().all()]
    bad_modules = _watch(model)
    set_random_state(content["random_state"], model.device)
    scalars, _ = step._accumulate().wait()
    bad_gradients = [
        n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
    ]
    first = bad_modules[0] if bad_modules else ""
    loss = scalars["total_loss"]
    return Replay(content["iteration"], loss, content["loss"], first, bad_parameters, bad_gradients)


def _read(path: str | Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict) or "jigsaw_replay" not in content:
        raise CheckpointError(f"{path} is no step kept by a stopped run (replay_*.pth)")
    return content


def _watch(model: nn.Module) -> list[str]:
    """A list that fills with the names of leaf modules as their outputs turn out not finite."""
    bad: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and not output.isfinite().all():
                bad.append(name)

        return hook

    for name, module in model.named_modules():
        if not any(module.children()):
            module.register_forward_hook(watch(name))
    return bad
