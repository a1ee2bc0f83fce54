"""Numbers of the GPU against the CPU's: objectives, gradients, ERF."""

from collections.abc import Iterator

import torch
from gpu_checks.bench import AMP_DTYPES, Bench
from gpu_checks.report import Finding, expect
from torch import nn

from jigsaw_d2.modeling import losses
from jigsaw_d2.modeling.erf import measure_erf, region_weights
from jigsaw_d2.modeling.losses import OBJECTIVES


def objectives(bench: Bench) -> Iterator[Finding]:
    """Each objective's loss and gradients against the CPU's, float32; AMP's loss."""
    for objective in OBJECTIVES:
        cpu, gpu, batch = bench.twins(objective)
        want, got = (model(batch)["loss_jigsaw"] for model in (cpu, gpu))
        want.backward()
        got.backward()
        error = abs(got.item() / want.item() - 1)
        yield expect(f"{objective}: loss, relative error", f"{error:.1e}", "< 1e-4", error < 1e-4)
        cosine = nn.functional.cosine_similarity(_gradients(cpu), _gradients(gpu), dim=0).item()
        what = f"{objective}: gradients, cosine"
        yield expect(what, f"{cosine:.7f}", "> 0.9999", cosine > 0.9999)
        for name, dtype in AMP_DTYPES.items():
            with torch.autocast(bench.device, dtype=dtype), torch.no_grad():
                error = abs(gpu(batch)["loss_jigsaw"].item() / want.item() - 1)
            what = f"{objective}: {name} loss, relative error"
            yield bench.goal(what, f"{error:.1e}", "< 0.02", error < 0.02)


def loss_gradient(bench: Bench) -> Iterator[Finding]:
    """The loss's own gradient against autograd's, in float64."""
    regions = bench.twins("erf_adaptive")[1].cell_regions
    options = {"dtype": torch.float64, "device": bench.device}
    logits = torch.randn(4, 9, *regions.shape, **options, requires_grad=True)
    classes = torch.tensor([[8, 8, 8, 1], [0, 1, 2, 3], [4, 4, 4, 4], [7, 0, 7, 0]])
    classes = classes.to(bench.device)
    weights = torch.rand(4, *regions.shape, **options).softmax(dim=0)
    loss = losses.erf_adaptive_loss(logits, classes, weights, regions)
    (ours,) = torch.autograd.grad(loss, logits)
    dense = -(losses.soft_labels(weights, classes, 9) * logits.log_softmax(1)).sum(1)
    (theirs,) = torch.autograd.grad(losses.region_means(dense, regions).mean(), logits)
    error = (ours - theirs).abs().max().item()
    yield expect("largest difference", f"{error:.1e}", "< 1e-12", error < 1e-12)


def erf_numbers(bench: Bench) -> Iterator[Finding]:
    """Region sums of the ERF against the CPU's, and the label weights that AMP makes of them."""
    cpu, gpu, batch = bench.twins("erf_adaptive")
    images = cpu.preprocess(batch["image"])
    want = measure_erf(cpu.backbone, images, cpu.template).region_sums
    weights = region_weights(want, cpu.cell_regions)
    for name, dtype in {"fp32": None, **AMP_DTYPES}.items():
        measured = measure_erf(gpu.backbone, images, gpu.template, with_maps=True, amp_dtype=dtype)
        sums = measured.region_sums.cpu()
        if dtype is None:
            error = ((sums - want).abs() / want.clamp_min(1e-3 * want.max())).max().item()
            # Rounding to float32 alone moves them by 6e-4, against float64 on the CPU.
            yield expect("sums in fp32, relative", f"{error:.1e}", "< 2e-3", error < 2e-3)
        else:
            shift = (region_weights(sums, cpu.cell_regions) - weights).abs().max().item()
            what = f"label weights in {name}, largest change"
            yield bench.goal(what, f"{shift:.1e}", "< 0.01", shift < 0.01)


def _gradients(model: nn.Module) -> torch.Tensor:
    """All of them, one after the other: float64 on the CPU."""
    return torch.cat([p.grad.flatten().cpu().double() for p in model.parameters()])
