"""A network borrowed for a measurement and given back as it was."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def measuring(network: nn.Module) -> Iterator[nn.Module]:
    """The bare network, in evaluation mode and with frozen weights, gradients on, for this block.

    Afterwards, even after an exception, modes, ``requires_grad``, statistics, ``.grad``, torch's
    random state and autograd's and autocast's state are what they were.
    """
    network = unwrap(network)
    modes = [(module, module.training) for module in network.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    cuda = sorted({p.device.index for p, _ in flags if p.device.type == "cuda"})
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(cuda))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        # A compiled backward frees what it saved on its first use; a measurement uses it per cell.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            network.eval()
            network.requires_grad_(False)
            yield network
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel and torch.compile."""
    while True:
        inner = getattr(network, "_orig_mod", None)
        if inner is None and isinstance(network, nn.parallel.DistributedDataParallel):
            inner = network.module
        if inner is None:
            return network
        network = inner
