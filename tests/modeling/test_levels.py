"""Several classified features: losses by hand and by literal loops, boxes and padding, refusals."""

import math

import pytest
import torch
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from helpers_networks import TINY_RESNET, small_pyramid, tiny_backbone, tiny_fpn
from torch.nn import functional as F

from jigsaw_d2.config import get_jigsaw_cfg, in_features
from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.io import ConfigError
from jigsaw_d2.modeling.erf import region_weights
from jigsaw_d2.modeling.levels import assigned_levels, used_cells
from jigsaw_d2.modeling.losses import OBJECTIVES
from jigsaw_d2.modeling.meta_arch import LOG_PERIOD, JigsawPretrainer

# Regions of 32x32 pixels: one cell of p5 each, 2x2 of p4, 4x4 of p3.
QUARTERS = JigsawTemplate(64, 64, 32, 32)
LN2, LN3 = math.log(2), math.log(3)


def build(*features: str, **options: object) -> JigsawPretrainer:
    torch.manual_seed(0)
    settings = dict(
        backbone=small_pyramid(),
        in_features=features or ("p4", "p5"),
        num_classes=2,
        template=QUARTERS,
        pixel_mean=[120.0] * 3,
        pixel_std=[60.0] * 3,
    )
    return JigsawPretrainer(**{**settings, **options})


def batch(n: int = 3, size: int = 64, classes: int = 3) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=rng)
    corner = torch.tensor([[0, 0], [32, 0], [0, 32], [32, 32]]).expand(n, 4, 2)
    sides = torch.randint(1, 33, (n, 4, 2), generator=rng)
    return {
        "image": images,
        "gt_classes": torch.randint(0, classes, (n, 4), generator=rng),
        "shown_boxes": torch.cat([corner, corner + sides], dim=-1),
    }


def two_levels() -> tuple[JigsawPretrainer, dict[str, torch.Tensor], torch.Tensor]:
    """Softmax (1/4, 1/4, 1/2) everywhere but for p4's R4, which is uniform; p4 mixes labels."""
    model = build()
    model.erf_weights_p4.copy_(0.6 * model.erf_weights_p4 + 0.1)  # 0.7 own, 0.1 each other
    logits = {
        name: torch.zeros(1, 3, *level.cell_regions.shape) for name, level in model.levels.items()
    }
    for each in logits.values():
        each[:, 2] = LN2
    logits["p4"][:, :, 2:, 2:] = 0
    return model, logits, torch.tensor([[2, 2, 2, 0]])


def test_two_levels_by_hand():
    model, logits, classes = two_levels()
    # p5, own labels alone: ln 2 of class 2 in R1, R2 and R3, ln 4 of class 0 in R4.
    p5 = [LN2, LN2, LN2, 2 * LN2]
    # p4: 0.7 ln 2 + 0.1 (ln 2 + ln 2 + ln 4) in R1, R2 and R3; ln 3, whatever the labels, in R4.
    p4 = [1.1 * LN2, 1.1 * LN2, 1.1 * LN2, LN3]
    expected = torch.tensor([[(a + b) / 2 for a, b in zip(p4, p5)]])
    torch.testing.assert_close(model.region_losses(logits, classes), expected)
    torch.testing.assert_close(model.loss(logits, classes), expected.mean())
    model.assignment, model.assign_box_size = "assign", 16
    # Boxes of 16, 31 and 4 pixels belong to p4, one of 32 to p5: floor(4 + log2(side / 16)).
    sides = torch.tensor([[16, 32, 4, 31]])
    boxes = torch.stack([torch.zeros(1, 4), torch.zeros(1, 4), sides, sides], dim=-1).long()
    expected = torch.tensor([[p4[0], p5[1], p4[2], p4[3]]])
    torch.testing.assert_close(model.region_losses(logits, classes, boxes), expected)
    torch.testing.assert_close(model.loss(logits, classes, boxes), expected.mean())


def test_equations_1_and_2_by_literal_loops_on_each_level():
    rng = torch.Generator().manual_seed(3)
    model, data = build(num_classes=4), batch(classes=5)
    logits, total = {}, 0.0
    for name, level in model.levels.items():
        h, w = level.cell_regions.shape
        sums = torch.rand(h, w, 4, generator=rng, dtype=torch.float64) ** 3
        level.erf_weights.copy_(region_weights(sums, level.cell_regions, model.tau))
        logits[name] = torch.randn(3, 5, h, w, generator=rng)
        for n in range(3):
            for r in range(4):
                cells = []
                for y in range(h):
                    for x in range(w):
                        own = 2 * (y >= h // 2) + (x >= w // 2)
                        if own != r:
                            continue
                        share = (sums[y, x] / sums[y, x].sum()).tolist()
                        first = max(0.7, share[r])
                        weights = [(1 - first) * s / (1 - share[r]) for s in share]
                        weights[r] = first
                        target = torch.zeros(5, dtype=torch.float64)
                        for weight, label in zip(weights, data["gt_classes"][n].tolist()):
                            target[label] += weight
                        log_p = logits[name][n, :, y, x].double().log_softmax(dim=0)
                        cells.append(-(target * log_p).sum().item())
                total += sum(cells) / len(cells) / (2 * 3 * 4)  # levels, images, regions
    assert model.loss(logits, data["gt_classes"]).item() == pytest.approx(total, rel=1e-5)


def test_boxes_go_where_detectron2_sends_them():
    boxes = batch(n=50)["shown_boxes"]
    found = assigned_levels(boxes, {"p3": 8, "p4": 16, "p5": 32}, 8)
    flat = Boxes(boxes.flatten(0, 1).float())
    assert found.flatten().tolist() == assign_boxes_to_levels([flat], 3, 5, 8, 4).tolist()
    assert set(found.flatten().tolist()) == {0, 1, 2}


def test_cells_of_padding_alone_do_not_count():
    # 17 x 5 pixels from the corner of R1: of 16-pixel cells the first two of the first row.
    boxes = torch.tensor([[[0, 0, 17, 5], [48, 16, 64, 32], [0, 32, 32, 64], [40, 40, 41, 41]]])
    used = used_cells(boxes, (4, 4), QUARTERS)
    rows = [[1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
    assert used.int().tolist() == [rows]
    rng = torch.Generator().manual_seed(0)
    classes = torch.tensor([[0, 1, 2, 0]])
    for objective in OBJECTIVES:
        model = build("p4", objective=objective, ignore_padding=True)
        logits = torch.randn(1, 3, 4, 4, generator=rng)
        cells = [[(0, 0), (0, 1)], [(1, 3)], [(2, 0), (2, 1), (3, 0), (3, 1)], [(2, 2)]]
        expected = []
        for r, label in enumerate(classes[0]):
            scores = torch.stack([logits[0, :, y, x] for y, x in cells[r]])
            if objective == "block_wise":
                scores = scores.mean(dim=0, keepdim=True)
            elif objective == "global":
                every = [cell for region in cells for cell in region]
                scores = torch.stack([logits[0, :, y, x] for y, x in every]).mean(0, keepdim=True)
            expected.append(F.cross_entropy(scores, label.expand(len(scores))).item())
        found = model.region_losses({"p4": logits}, classes, boxes)
        assert found[0].tolist() == pytest.approx(expected, rel=1e-5), objective


@pytest.mark.parametrize("options", [{}, {"levels": "assign"}, {"shared_classifier": False}])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_parameter_learns(objective, options):
    options = options | {"assign_box_size": 8, "ignore_padding": True}
    model = build("p3", "p4", "p5", objective=objective, **options)
    model(batch(n=16))["loss_jigsaw"].backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


@pytest.mark.parametrize("features", [("p2", "p3", "p4", "p5"), ("p5", "p6", "p4", "p2", "p3")])
def test_detectron2s_pyramid(features):
    template = JigsawTemplate(128, 128, 64, 64)
    model = build(*features, backbone=tiny_fpn(), template=template)
    assert model.in_features == tuple(sorted(features))
    model(batch(size=128))["loss_jigsaw"].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_one_classifier_for_all_or_one_each():
    shared, apart = build("p3", "p4", "p5"), build("p3", "p4", "p5", shared_classifier=False)
    names = {n for n, _ in shared.classifier.named_parameters()}
    assert names == {"weight", "bias"} and set(apart.classifier) == {"p3", "p4", "p5"}
    data = batch()
    images = shared.preprocess(data["image"])
    apart.load_state_dict(apart.state_dict() | shared.backbone.state_dict(prefix="backbone."))
    for each in apart.classifier.values():
        each.load_state_dict(shared.classifier.state_dict())
    ours, theirs = shared.eval().cell_logits(images), apart.eval().cell_logits(images)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_evaluation_is_the_mean_over_levels_or_the_assigned_one():
    data = batch()
    model = build("p3", "p4", "p5").eval()
    with torch.no_grad():
        logits = model.cell_logits(model.preprocess(data["image"]))
        means = [build(name).region_logits({name: each}) for name, each in logits.items()]
        torch.testing.assert_close(model(data)["region_logits"], sum(means) / 3)
        model.assignment, model.assign_box_size = "assign", 8
        level = assigned_levels(data["shown_boxes"], model.strides, 8)
        found = model(data)["region_logits"]
    for n in range(3):
        for r in range(4):
            torch.testing.assert_close(found[n, r], means[level[n, r]][n, r])


def test_metrics_by_level_and_region():
    model, data = build("p3", "p4", "p5"), batch()
    with EventStorage(LOG_PERIOD - 1) as storage:
        loss = model(data)["loss_jigsaw"].item()
    values = {name: value for name, (value, _) in storage.latest().items()}
    regions = [values[f"region/{p}_R{r}_loss"] for p in model.in_features for r in range(1, 5)]
    assert sum(regions) / 12 == pytest.approx(loss, rel=1e-5)
    mean = sum(values[f"region/{p}_R2_loss"] for p in model.in_features) / 3
    assert values["region/R2_loss"] == pytest.approx(mean, rel=1e-5)


def test_buffers_travel_under_the_features_names():
    state = build("p4", "p5").state_dict()
    names = {"erf_weights_p4", "erf_weights_p5", "erf_region_sums_p4", "erf_region_sums_p5"}
    assert {name for name in state if name.startswith("erf_")} == names
    assert state["erf_weights_p4"].shape == (4, 4, 4) and state["erf_weights_p5"].shape == (4, 2, 2)


def test_both_keys_are_read():
    keys = ["MODEL.JIGSAW.IN_FEATURE", "MODEL.JIGSAW.IN_FEATURES"]
    assert in_features(get_jigsaw_cfg()) == ["res5"]
    assert in_features(get_jigsaw_cfg("", [keys[0], "res4"])) == ["res4"]
    assert in_features(get_jigsaw_cfg("", [keys[1], "['p3', 'p4']"])) == ["p3", "p4"]
    with pytest.raises(ConfigError, match="IN_FEATURE is res4 and IN_FEATURES .'p3', 'p4'"):
        in_features(get_jigsaw_cfg("", [keys[1], "['p3', 'p4']", keys[0], "res4"]))
    with pytest.raises(ConfigError, match="name each feature once"):
        in_features(get_jigsaw_cfg("", [keys[1], "['p3', 'p3']"]))
    tiny = [*TINY_RESNET, "MODEL.JIGSAW.NUM_CLASSES", 2, keys[1], "['res4', 'res5']"]
    tiny += ["MODEL.RESNETS.OUT_FEATURES", "['res4', 'res5']"]
    tiny += ["MODEL.JIGSAW.SHARED_CLASSIFIER", "False"]
    model = JigsawPretrainer(get_jigsaw_cfg("Base-JigsawPretrain.yaml", tiny))
    assert model.in_features == ("res4", "res5")


def test_refusals():
    for options, message in (
        ({"in_features": ["p4", "p7"]}, "'p7'.*backbone returns p3, p4, p5"),
        ({"levels": "some"}, "LEVELS is 'some'.*all, assign"),
        # The largest region shows 32 pixels, which p5 gets from a box size of 16 on.
        ({"levels": "assign"}, "224.*32 pixels, so no sample would go to p5.*at most 16"),
        ({"levels": "assign", "in_features": ["p3", "p5"]}, "strides that double"),
        ({"template": JigsawTemplate(64, 64, 16, 32)}, "multiple of the feature's stride 32"),
        (
            {"backbone": tiny_backbone(features=("res4", "res5")), "in_features": ["res4", "res5"]},
            "SHARED_CLASSIFIER False",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            build(**options)
    data = batch()
    del data["shown_boxes"]
    with pytest.raises(ConfigError, match="need a batch with shown_boxes"):
        build(levels="assign", assign_box_size=16)(data)
