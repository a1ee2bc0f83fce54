"""What of a built network trains: all of it, or it is said what does not, and why.

What a config asks for and what anyone's backbone makes of it are two things: modules are asked.
"""

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from jigsaw_d2.io import ConfigError
from jigsaw_d2.modeling.erf import measuring
from jigsaw_d2.modeling.meta_arch import JigsawPretrainer

logger = logging.getLogger(__name__)


def check_trainable(model: nn.Module) -> None:
    """Refuse a built ``JigsawPretrainer`` with a frozen norm or parameter, whatever made it so.

    Raises:
        ConfigError: naming the first few layers.
    """
    frozen = [  # anyone's norm with statistics that is not made to renew them
        name
        for name, module in model.named_modules()
        if hasattr(module, "running_mean") and not isinstance(module, _NormBase)
    ]
    fixed = [name for name, p in model.named_parameters() if not p.requires_grad]
    for names, what in ((frozen, "frozen batch norms"), (fixed, "parameters without gradient")):
        if names:
            raise ConfigError(
                f"{len(names)} {what} ({', '.join(names[:3])} ...): set MODEL.BACKBONE.FREEZE_AT 0 "
                "and MODEL.RESNETS.NORM auto, or change what the backbone's own code freezes"
            )


def set_aside_unused(model: JigsawPretrainer) -> None:
    """Freeze norms that serve outputs finer than the classified ones alone, as Swin has them.

    Neither trained nor converted, they start new in a detector.

    Raises:
        ConfigError: other parts do nothing: they would stay random, and stop DDP. Names a few.
    """
    size = (len(model.pixel_mean), model.template.height, model.template.width)
    with measuring(model.backbone) as backbone:
        images = torch.zeros(1, *size, device=model.device)
        norms, rest = unused_parameters(backbone.requires_grad_(True), model.in_features, images)
    if rest:
        raise ConfigError(
            f"{len(rest)} parameters of the backbone receive no gradient, for "
            f"MODEL.JIGSAW.IN_FEATURE(S) do not depend on them: {', '.join(rest[:5])}"
            f"{' ...' if len(rest) > 5 else ''}; let it build the classified outputs alone "
            "(OUT_FEATURES of MODEL.RESNETS, TIMM or TORCHVISION, MODEL.FPN.IN_FEATURES, "
            "out_features of a LazyConfig or your own), or classify the others too "
            "(MODEL.JIGSAW.IN_FEATURES)"
        )
    for name in norms:
        backbone.get_parameter(name).requires_grad_(False)
    if norms:
        logger.warning(
            "%d parameters of norms serve outputs finer than the classified ones alone, and are "
            "not trained; a detector starts them new: %s",
            *(len(norms), ", ".join(norms)),
        )


def unused_parameters(
    backbone: nn.Module, in_features: Sequence[str], images: Tensor
) -> tuple[list[str], list[str]]:
    """Names of the parameters on which none of ``in_features`` depends.

    Args:
        backbone: in evaluation mode, with gradients.
        images: float (N, C, H, W).

    Returns:
        Those of norms, modules of vectors alone, that only outputs with more cells than every one
        of ``in_features`` use; and the others.
    """
    names, parameters = zip(*backbone.named_parameters())
    features = backbone(images)
    maps = {
        name: value
        for name, value in features.items()
        if name in in_features or (isinstance(value, Tensor) and value.ndim == 4)
    }

    def used(outputs: Iterable[str]) -> set[str]:
        sums = [s for o in outputs if (s := maps[o].float().sum()).requires_grad]
        if not sums:
            return set()
        gradients = torch.autograd.grad(sum(sums), parameters, allow_unused=True, retain_graph=True)
        return {name for name, gradient in zip(names, gradients) if gradient is not None}

    cells = {name: value.shape[2:].numel() for name, value in maps.items()}
    finer = [name for name in cells if cells[name] > max(cells[n] for n in in_features)]
    idle = set(names) - used(in_features)
    modules = {n.rpartition(".")[0] for n, p in zip(names, parameters) if p.ndim > 1}
    of_norms = {n for n in idle if n.rpartition(".")[0] not in modules}
    norms = of_norms & (used(finer) - used(cells.keys() - set(finer)))
    return [n for n in names if n in norms], [n for n in names if n in idle - norms]
