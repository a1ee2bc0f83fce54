"""Activations that are computed twice instead of kept, for backbones too large for the memory."""

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from jigsaw_d2.io import ConfigError


def checkpoint_activations(backbone: nn.Module) -> int:
    """Let each block keep its input alone; the backward pass computes the rest once more.

    A block is a module with parts of its own that stands in an ``nn.Sequential`` or
    ``nn.ModuleList``, as ResNet's residual blocks do. Gradients and batch norm's statistics are
    what they were: the second pass leaves the statistics alone.

    Returns:
        How many blocks there are.

    Raises:
        ConfigError: none.
    """
    blocks = list(_blocks(backbone))
    if not blocks:
        raise ConfigError(
            "MODEL.JIGSAW.ACTIVATION_CHECKPOINTING: this backbone has no blocks (modules with "
            "parts inside an nn.Sequential or nn.ModuleList); set it to False"
        )
    for block in blocks:
        _checkpoint(block)
    return len(blocks)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Outermost blocks, none inside another."""
    for child in module.children():
        listed = isinstance(module, (nn.Sequential, nn.ModuleList))
        is_list = isinstance(child, (nn.Sequential, nn.ModuleList))
        if listed and not is_list and any(child.children()):
            yield child
        else:
            yield from _blocks(child)


def _checkpoint(block: nn.Module) -> None:
    """Replace ``block.forward``; names of modules and parameters stay."""
    forward = block.forward
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]

    @contextlib.contextmanager
    def statistics_left_alone() -> Iterator[None]:
        """While the forward pass is repeated, which must not count its batch twice."""
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
        try:
            yield
        finally:
            for norm, momentum in zip(norms, momenta):
                norm.momentum = momentum

    def contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        return contextlib.nullcontext(), statistics_left_alone()

    def checkpointed(*inputs: object, **named: object) -> object:
        if not block.training:
            return forward(*inputs, **named)
        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **named)

    block.forward = checkpointed
