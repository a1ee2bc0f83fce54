"""Probing some cells and filling in the rest, against measuring every cell."""

import pytest
import torch
from helpers_networks import small_pyramid, tiny_backbone

from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.modeling.erf import measure_erf, region_weights
from jigsaw_d2.modeling.erf_probes import MAX_PROBES, fill_between, probe_cells
from jigsaw_d2.modeling.meta_arch import JigsawPretrainer

TEMPLATE = JigsawTemplate(96, 96, 32, 32)


def test_few_cells_are_all_measured():
    assert probe_cells(7, 7) is None and probe_cells(4, 12) is None  # res5 of the paper
    sums = torch.rand(7, 7, 4, dtype=torch.float64)
    assert fill_between(sums, None) is sums


def test_a_lattice_reaches_every_row_and_column():
    for h, w in ((14, 14), (28, 28), (28, 20), (56, 56)):
        cells = probe_cells(h, w)
        assert len(set(cells)) == len(cells) <= MAX_PROBES
        assert all(0 <= y < h and 0 <= x < w for y, x in cells)
        rows, columns = ({cell[axis] for cell in cells} for axis in (0, 1))
        assert len(rows) >= min(h, 40) and len(columns) >= min(w, 40)


def staircase(count: int) -> torch.Tensor:
    """Falls from 0.9 to 0.1 in steps of four cells, as copies of a coarser feature make it."""
    return torch.linspace(0.9, 0.1, count // 4, dtype=torch.float64).repeat_interleave(4)


def products(above: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Region sums of cells that see independently along both axes."""
    a, b = above[:, None], left[None]
    return torch.stack([a * b, a * (1 - b), (1 - a) * b, (1 - a) * (1 - b)], dim=-1)


def test_steps_in_rows_and_columns_are_found():
    """Where a cell sees is a product along both axes: nothing else is to be smoothed."""
    sums = products(staircase(28), staircase(20))
    cells = probe_cells(28, 20)
    held = torch.full_like(sums, torch.nan)
    for y, x in cells:
        held[y, x] = sums[y, x]
    found = fill_between(held, cells)
    assert all(torch.equal(found[y, x], sums[y, x]) for y, x in cells)
    assert (found - sums).abs().max() < 0.03 and (found - sums).abs().mean() < 0.004


def test_dead_probes_tell_nothing():
    sums = products(staircase(28), staircase(28))
    cells = probe_cells(28, 28)
    for y, x in cells[10:20]:
        sums[y, x] = 0
    found = fill_between(sums, cells)
    expected = products(staircase(28), staircase(28))
    assert (found[cells[10]] == 0).all()  # measured, and dead
    rest = torch.ones(28, 28, dtype=torch.bool)
    rest[tuple(zip(*cells))] = False
    assert (found - expected)[rest].abs().mean() < 0.02
    dead = torch.zeros(28, 28, 4, dtype=torch.float64)
    assert torch.equal(fill_between(dead, cells), dead)
    sums[cells[3]] = torch.nan  # is passed on: the hook measures again, or refuses it
    assert fill_between(sums, cells)[cells[3]].isnan().all()


def jigsaw_images(n: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Four noisy textures, uint8 (n, 3, 96, 96), and their classes of six."""
    textures = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    classes = torch.randint(0, 6, (n, 4), generator=rng)
    images = textures.repeat(1, 1, 12, 12)[classes]  # (n, 4, 3, 96, 96)
    regions = TEMPLATE.cell_regions(1).expand(n, 1, 3, 96, 96)
    noise = torch.rand(n, 3, 96, 96, generator=rng)
    return (255 * (0.6 * images.gather(1, regions)[:, 0] + 0.4 * noise)).to(torch.uint8), classes


def resnet_18_pyramid() -> torch.nn.Module:
    """p3 to p5 of 64 channels on a ResNet-18, as configs/jigsaw_R_18_FPN_cpu.yaml has them."""
    features = ("res3", "res4", "res5")
    return tiny_backbone(
        *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", 64),
        *("MODEL.FPN.IN_FEATURES", list(features), "MODEL.RESNETS.DEPTH", 18),
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
        features=features,
    )


@pytest.mark.parametrize(
    "pyramid, mean, most",
    [
        (resnet_18_pyramid, 0.002, 0.02),
        # Few images on few channels are the worst case: what a cell sees is partly chance there.
        (lambda: small_pyramid(kernel=7, seed=1), 0.005, 0.05),
    ],
    ids=["ResNet-18", "thin"],
)
def test_weights_of_a_network_by_a_third_of_its_cells(pyramid, mean, most):
    """Random, and after a short training; p5 is exact, p3 near what all 144 cells give."""
    rng = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    model = JigsawPretrainer(
        backbone=pyramid(),
        in_features=["p3", "p4", "p5"],
        num_classes=5,
        template=TEMPLATE,
        pixel_mean=[120.0] * 3,
        pixel_std=[60.0] * 3,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for steps in (3, 20):  # the first for the norms' statistics alone
        for _ in range(steps):
            images, classes = jigsaw_images(8, rng)
            loss = model({"image": images, "gt_classes": classes})["loss_jigsaw"]
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            if steps == 20:
                optimizer.step()
        seen, level = model.preprocess(jigsaw_images(2, rng)[0]), model.levels["p3"]
        exact = measure_erf(model.backbone, seen, TEMPLATE, "p3").region_sums
        cells = probe_cells(*level.cell_regions.shape)
        some = measure_erf(model.backbone, seen, TEMPLATE, "p3", cells=cells).region_sums
        torch.testing.assert_close(some[tuple(zip(*cells))], exact[tuple(zip(*cells))])
        weights, ours = (
            region_weights(sums, level.cell_regions) for sums in (exact, fill_between(some, cells))
        )
        error = (ours - weights).abs()
        assert error.mean() < mean and error.max() < most
    assert losses[-1] < 0.7 * losses[0]
