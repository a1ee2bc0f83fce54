"""Effective receptive field (ERF) of any Detectron2 backbone, cell by cell, and Eq. 2 made of it.

Shape letters: N images; S = 4 regions R1..R4; H, W canvas pixels; h, w feature cells.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import Tensor, nn

from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.io import ConfigError, RunError
from jigsaw_d2.modeling.losses import NUM_REGIONS

# Times the gradient in float16, which without it rounds what is below 6e-8 to nothing.
FLOAT16_SCALE = 1024.0
BATCH_SIZE = 16  # images of one pass; bounds the memory
GRADS = {"abs": torch.abs, "relu": torch.relu}

# Luo et al. 2016, cited by the paper, leave the reduction open; this is ours.
DEFINITION = (
    "ERF of a cell = gradient of the sum of the cell's feature vector with respect to the "
    "normalised input image, {grad}, summed over the input channels, averaged over {images} "
    "image(s); network in evaluation mode"
)
GRAD_WORDS = {"abs": "absolute value", "relu": "positive part"}


@dataclass(frozen=True)
class ErfMeasurement:
    """Mean over images of what was measured.

    region_sums: float64 (h, w, S), the part of each cell's ERF inside each region; zero in cells
        that were not measured.
    region_maps: float32 (S, H, W), the ERF of all measured cells of each region together; None
        unless asked for.
    """

    region_sums: Tensor
    region_maps: Tensor | None


def erf_region_sums(
    backbone: nn.Module,
    images: Tensor,
    template: JigsawTemplate,
    feature: str = "res5",
    grad: str = "abs",
    **options: object,
) -> Tensor:
    """Float64 (h, w, S): the ERF of each cell summed over each region, mean over the images.

    Arguments and errors as ``measure_erf``, and sums that are not finite are refused. The network
    comes back in the mode, and with the statistics, it had.
    """
    measured = measure_erf(backbone, images, template, feature, grad, **options)
    return check_finite(measured.region_sums)


def measure_erf(
    backbone: nn.Module,
    images: Tensor,
    template: JigsawTemplate,
    feature: str = "res5",
    grad: str = "abs",
    *,
    cells: Sequence[tuple[int, int]] | None = None,
    with_maps: bool = False,
    batch_size: int = BATCH_SIZE,
    amp_dtype: torch.dtype | None = None,
) -> ErfMeasurement:
    """Region sums of every cell's ERF and, if asked, the map of each region's cells.

    One forward pass, then one backward pass to the input per cell, each for ``batch_size`` images
    together: h * w + 1 forward-equivalents an image, no gradient of any weight.

    Args:
        backbone: maps (N, 3, H, W) to a dict of features; may be wrapped (DDP, torch.compile). It
            must treat the images of a batch independently in evaluation mode.
        images: float (N, 3, H, W), normalised, of the template's size.
        template: the regions.
        feature: which of the backbone's outputs, of any stride.
        grad: "abs" or "relu", how signed gradients become an ERF.
        cells: (row, column) of those that are measured; None = all.
        with_maps: return ``region_maps`` too; they need no further passes.
        batch_size: images per pass; bounds the memory.
        amp_dtype: precision of the passes; None = that of the network. Sums are float64 always.

    Values that are not finite (float16 can overflow, weights diverge) are passed on: one rank that
    raised would leave the others waiting. ``region_weights`` refuses them.

    Raises:
        ConfigError: an unknown feature or ``grad``, images of another size than the template, or of
            one that the backbone cannot take.
    """
    _check_images(images, template)
    sums: dict[int, Tensor] = {}
    with measuring(backbone) as network:
        device = _device_of(network, images)
        maps = torch.zeros(NUM_REGIONS, *images.shape[2:], device=device)
        for chunk in images.split(batch_size):
            shape, cell_maps = _cell_maps(
                network, chunk.to(device), feature, grad, amp_dtype, cells
            )
            owners = _owners(template, shape) if with_maps else []
            for cell, erf in cell_maps:
                sums[cell] = sums.get(cell, 0) + _sum_regions(erf, template)
                if with_maps:
                    maps[owners[cell]] += erf.sum(dim=0)
    count = len(images)
    region_sums = torch.zeros(shape[0] * shape[1], NUM_REGIONS, dtype=torch.float64, device=device)
    region_sums[list(sums)] = torch.stack(list(sums.values()))
    region_sums = region_sums.view(*shape, NUM_REGIONS)
    return ErfMeasurement(region_sums / count, maps / count if with_maps else None)


def erf_maps(
    backbone: nn.Module,
    images: Tensor,
    cells: Sequence[tuple[int, int]],
    feature: str = "res5",
    grad: str = "abs",
) -> Tensor:
    """Whole ERF of chosen cells, no template needed.

    Args:
        cells: (row, column) of each, in feature cells; negative numbers count from the end.

    Returns:
        float32 (len(cells), H, W), mean over the images.

    Raises:
        ConfigError: as ``measure_erf``, or a cell outside the feature map.
    """
    with measuring(backbone) as network:
        device = _device_of(network, images)
        maps = torch.zeros(len(cells), *images.shape[2:], device=device)
        for chunk in images.split(BATCH_SIZE):
            _, found = _cell_maps(network, chunk.to(device), feature, grad, None, cells)
            for index, (_, erf) in enumerate(found):
                maps[index] += erf.sum(dim=0)
    return check_finite(maps / len(images))


def check_grad(grad: str) -> None:
    """Raise ``ConfigError`` unless ``grad`` names a way to make an ERF of signed gradients."""
    if grad not in GRADS:
        raise ConfigError(f"MODEL.JIGSAW.ERF.GRAD is {grad!r}; choose one of {', '.join(GRADS)}")


def _cell_maps(
    network: nn.Module,
    images: Tensor,
    feature: str,
    grad: str,
    amp_dtype: torch.dtype | None,
    cells: Sequence[tuple[int, int]] | None = None,
) -> tuple[tuple[int, int], Iterator[tuple[int, Tensor]]]:
    """(h, w), and per cell its row-major number and float (N, H, W) ERF of each image."""
    check_grad(grad)
    divisor = getattr(network, "size_divisibility", 0)
    if divisor > 1 and any(size % divisor for size in images.shape[2:]):
        raise ConfigError(
            f"images are {images.shape[2]}x{images.shape[3]}, but this backbone takes multiples of "
            f"{divisor}; choose another size"
        )
    images = images.detach().clone().requires_grad_()
    enabled = amp_dtype is not None
    with torch.autocast(images.device.type, dtype=amp_dtype or torch.bfloat16, enabled=enabled):
        features = network(images)
    if feature not in features:
        raise ConfigError(f"the network returns {', '.join(features)}, but no feature {feature!r}")
    values = features[feature]
    responses = values.to(torch.promote_types(values.dtype, torch.float32)).sum(dim=1)  # (N, h, w)
    h, w = responses.shape[1:]
    numbers = [_cell_number(cell, h, w) for cell in cells] if cells is not None else range(h * w)
    scale = FLOAT16_SCALE if amp_dtype is torch.float16 else 1.0
    return (h, w), _backward_per_cell(images, responses * scale, numbers, GRADS[grad], scale)


def _backward_per_cell(
    images: Tensor,
    responses: Tensor,
    numbers: Sequence[int],
    rectify: Callable[[Tensor], Tensor],
    scale: float,
) -> Iterator[tuple[int, Tensor]]:
    """One backward pass to the input for each cell, of all images together; ``scale`` is undone."""
    for number in numbers:
        # Images of a batch do not mix, so the gradient of their sum holds the gradient of each.
        (gradient,) = torch.autograd.grad(
            responses.flatten(1)[:, number].sum(), images, retain_graph=True
        )
        yield number, rectify(gradient).sum(dim=1) / scale


def _cell_number(cell: tuple[int, int], h: int, w: int) -> int:
    row, column = cell
    if not (-h <= row < h and -w <= column < w):
        raise ConfigError(f"cell {tuple(cell)} lies outside the {h}x{w} feature map")
    return row % h * w + column % w


def _owners(template: JigsawTemplate, shape: tuple[int, int]) -> list[int]:
    """Region of each cell, row-major."""
    stride = template.height // shape[0]
    regions = template.cell_regions(stride)
    if regions.shape != shape:
        raise ConfigError(
            f"the feature has {shape[0]}x{shape[1]} cells where the template "
            f"{template.height}x{template.width} makes {tuple(regions.shape)} of {stride} pixels"
        )
    return regions.flatten().tolist()


def _sum_regions(erf: Tensor, template: JigsawTemplate) -> Tensor:
    """Maps float (N, H, W) -> float64 (S,): sum over images and each region's pixels."""
    boxes = template.boxes.tolist()
    sums = [erf[:, y0:y1, x0:x1].sum(dtype=torch.float64) for x0, y0, x1, y1 in boxes]
    return torch.stack(sums)


def _device_of(network: nn.Module, images: Tensor) -> torch.device:
    return next((p.device for p in network.parameters()), images.device)


def _check_images(images: Tensor, template: JigsawTemplate) -> None:
    if images.ndim != 4 or len(images) == 0 or not images.is_floating_point():
        raise ConfigError(
            f"images are {images.dtype} {tuple(images.shape)}; give normalised float "
            "(N, 3, H, W), N > 0"
        )
    if tuple(images.shape[2:]) != (template.height, template.width):
        raise ConfigError(
            f"images are {images.shape[2]}x{images.shape[3]}, the template is "
            f"{template.height}x{template.width}; they must be equal"
        )


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


def region_weights(region_sums: Tensor, cell_regions: Tensor, tau: float = 0.7) -> Tensor:
    """Eq. 2: the weights of the four labels in every cell.

    Args:
        region_sums: float (h, w, S), non-negative.
        cell_regions: int64 (h, w) in [0, S), r of Eq. 2.
        tau: least weight of the cell's own region, in [0, 1].

    Returns:
        float64 (S, h, w), adding up to 1 in every cell. A cell that sees nothing outside its region
        (share 1) gives its own label weight 1, and so does a cell that sees nothing at all (a dead
        feature vector, 0 / 0 in Eq. 2): it tells nothing about the neighbours.

    Raises:
        ConfigError: shapes that do not belong together, negative sums, or tau outside [0, 1].
        RunError: sums that are not finite.
    """
    if region_sums.shape != (*cell_regions.shape, NUM_REGIONS):
        raise ConfigError(
            f"region sums {tuple(region_sums.shape)} do not fit {tuple(cell_regions.shape)} cells"
        )
    if not 0 <= tau <= 1:
        raise ConfigError(f"tau (MODEL.JIGSAW.TAU) is {tau}; it must lie in [0, 1]")
    sums = check_finite(region_sums.double().permute(2, 0, 1))
    if (sums < 0).any():
        raise ConfigError(
            "an ERF has negative sums; they are sums of absolute or positive gradients"
        )
    own = own_region_weights(cell_regions)
    outside = (sums * (1 - own)).sum(dim=0)
    # Not 1 - share: that difference loses all digits where nearly everything lies inside.
    own_share = 1 - outside / sums.sum(dim=0).clamp_min(torch.finfo(sums.dtype).tiny)
    own_weight = torch.where(outside > 0, own_share.clamp_min(tau), 1.0)
    others = sums / outside.where(outside > 0, torch.ones_like(outside))
    return torch.where(own > 0, own_weight, (1 - own_weight) * others)


def own_region_weights(cell_regions: Tensor) -> Tensor:
    """Float64 (S, h, w): weight 1 on each cell's own region, the limit tau = 1 of Eq. 2."""
    regions = torch.arange(NUM_REGIONS, device=cell_regions.device)
    return (cell_regions == regions[:, None, None]).double()


def region_shares(region_sums: Tensor, cell_regions: Tensor) -> Tensor:
    """Float64 (S, S): row r = how the ERF of a cell of region r spreads over R1..R4, cell mean.

    A dead cell counts as zeros.
    """
    shares = region_sums.double()
    shares = shares / shares.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.double).tiny)
    return torch.stack([shares[cell_regions == r].mean(dim=0) for r in range(NUM_REGIONS)])


def outside_shares(region_sums: Tensor, cell_regions: Tensor) -> Tensor:
    """Float64 (S,): the part of a cell's ERF outside its own region, mean over a region's cells."""
    shares = region_shares(region_sums, cell_regions)
    return shares.sum(dim=1) - shares.diagonal()


def format_summary(region_sums: Tensor, weights: Tensor, cell_regions: Tensor) -> str:
    """Table of four rows: each region's cells, where their ERF lies, and the labels they learn.

    Args:
        region_sums: float (h, w, S).
        weights: float (S, h, w) in force.
        cell_regions: int64 (h, w).
    """
    shares = region_shares(region_sums, cell_regions)
    outside = outside_shares(region_sums, cell_regions)
    rows = []
    for r in range(NUM_REGIONS):
        cells = cell_regions == r
        labels = weights[:, cells].double().mean(dim=1).tolist()
        rows.append([f"R{r + 1} ({cells.sum()})", *shares[r].tolist(), outside[r].item(), *labels])
    head = ["cells of", *(f"ERF in R{r}" for r in range(1, 5)), "outside", "w1", "w2", "w3", "w4"]
    return tabulate(rows, head, tablefmt="plain", floatfmt=".3f")


def check_finite(values: Tensor) -> Tensor:
    """The values, float of any shape (...), themselves.

    Raises:
        RunError: one of them is inf or nan.
    """
    if not torch.isfinite(values).all():
        raise RunError(
            "the ERF holds inf or nan: the network's weights have diverged, or float16 overflowed "
            "(MODEL.JIGSAW.ERF.AMP)"
        )
    return values
