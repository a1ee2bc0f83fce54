"""The optimizers of both trainings, by SOLVER.OPTIMIZER and SOLVER.LAYER_DECAY."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import Backbone
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn
from torch.optim import Optimizer

from jigsaw_d2.io import ConfigError

# Parameters that no transformer's recipe decays.
_EMBEDDINGS = (
    *("pos_embed", "absolute_pos_embed", "cls_token", "rel_pos_h", "rel_pos_w"),
    *("relative_position_bias_table", "relative_position_bias"),
)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """SGD or AdamW: decay WEIGHT_DECAY, for norms and biases what their own keys say.

    On a GPU in their fused form: one kernel, which also undoes float16's loss scaling, so that
    the host need not wait to hear whether a gradient overflowed. (Clipping looks at gradients
    before that, so with CLIP_GRADIENTS the plain form steps, and float16 waits once more.)

    Raises:
        ConfigError: another optimizer, or a LAYER_DECAY outside (0, 1].
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER not in ("SGD", "AdamW") or not 0 < solver.LAYER_DECAY <= 1:
        raise ConfigError(
            f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r} and LAYER_DECAY {solver.LAYER_DECAY}; "
            "choose SGD or AdamW, and a decay in (0, 1]"
        )
    is_sgd = solver.OPTIMIZER == "SGD"
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        overrides={} if is_sgd else {name: {"weight_decay": 0.0} for name in _EMBEDDINGS},
    )
    if solver.LAYER_DECAY < 1:
        backbone = backbone_of(model)
        backbone = getattr(backbone, "bottom_up", backbone)
        groups = _by_layer(groups, layer_factors(backbone, solver.LAYER_DECAY))
    on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    options: dict[str, Any] = {
        "lr": solver.BASE_LR,
        "weight_decay": solver.WEIGHT_DECAY,
        "fused": on_gpu and not solver.CLIP_GRADIENTS.ENABLED,
    }
    if is_sgd:
        options |= {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
    kind = torch.optim.SGD if is_sgd else torch.optim.AdamW
    optimizer = maybe_add_gradient_clipping(cfg, kind)(groups, **options)
    return start_momentum(optimizer) if is_sgd else optimizer


def backbone_of(model: nn.Module) -> nn.Module:
    """``model.backbone``, or in a project's own architecture the first of Detectron2's kind."""
    inside = (module for module in model.modules() if isinstance(module, Backbone))
    return getattr(model, "backbone", None) or next(inside, model)


def layer_factors(backbone: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Factor of the rate for each parameter: ``decay`` once for every block above its own.

    A block is what a number in a parameter's name counts, such as blocks.3 or res2.0. What comes
    before the first is the lowest; what comes later and is in none, a last norm, has factor 1.
    """
    blocks: list[str] = []
    places: dict[nn.Parameter, int | None] = {}
    for name, parameter in backbone.named_parameters():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is None:
            places[parameter] = None if blocks else 0
            continue
        block = ".".join(parts[: number + 1])
        if block not in blocks:
            blocks.append(block)
        places[parameter] = blocks.index(block) + 1
    top = len(blocks) + 1
    return {p: decay ** (top - (top if at is None else at)) for p, at in places.items()}


def _by_layer(
    groups: list[dict[str, Any]], factors: dict[nn.Parameter, float]
) -> list[dict[str, Any]]:
    """The groups, split so that each has one factor."""
    split: dict[tuple[int, float], dict[str, Any]] = {}
    for n, group in enumerate(groups):
        for parameter in group["params"]:
            factor = factors.get(parameter, 1.0)
            new = {**group, "params": [], "lr": group["lr"] * factor}
            split.setdefault((n, factor), new)["params"].append(parameter)
    return list(split.values())


def start_momentum(optimizer: Optimizer) -> Optimizer:
    """Let a fused SGD's momentum start from zero, from where its first step makes the gradient.

    PyTorch's own start is memory as it is found, written by the first step unless float16's loss
    scaling skips that one, as it often does: then the second step adds up whatever was there.
    """
    for group in optimizer.param_groups:
        if group["fused"] and group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
