"""configs/: each file changes the keys that its row of the paper names, and no others."""

import pytest
import yaml

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.config_files import config_dir

R50 = "jigsaw_R_50.yaml"
PYRAMID = {
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.JIGSAW.IN_FEATURES": ["p3", "p4", "p5"],
    "MODEL.JIGSAW.ASSIGN_BOX_SIZE": 64,
}
# File -> (what it builds on, the keys it changes beside OUTPUT_DIR).
ROWS = {
    "jigsaw_R_18.yaml": (R50, {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64}),
    "jigsaw_R_101.yaml": (R50, {"MODEL.RESNETS.DEPTH": 101}),
    "jigsaw_X_101_32x4d.yaml": (
        "jigsaw_R_101.yaml",
        {"MODEL.RESNETS.NUM_GROUPS": 32, "MODEL.RESNETS.WIDTH_PER_GROUP": 4},
    ),
    "jigsaw_R_50_DCN.yaml": (
        R50,
        {"MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, True, True, True]},
    ),
    "jigsaw_R_50_FPN.yaml": (R50, PYRAMID),
    "jigsaw_R_18_FPN_cpu.yaml": ("jigsaw_R_18_cpu.yaml", {**PYRAMID, "MODEL.FPN.OUT_CHANNELS": 64}),
    "jigsaw_R_50_GN.yaml": (R50, {"MODEL.RESNETS.NORM": "GN"}),
    "jigsaw_R_50_global.yaml": (R50, {"MODEL.JIGSAW.OBJECTIVE": "global"}),
    "jigsaw_R_50_block_wise.yaml": (R50, {"MODEL.JIGSAW.OBJECTIVE": "block_wise"}),
    # Table 1 equals Table 2's block-wise row, so its other rows were trained with that loss.
    "jigsaw_R_50_block_wise_warp.yaml": (
        "jigsaw_R_50_block_wise.yaml",
        {"INPUT.JIGSAW.FIT": "warp"},
    ),
    "jigsaw_R_50_block_wise_resize.yaml": (
        "jigsaw_R_50_block_wise.yaml",
        {"INPUT.JIGSAW.FIT": "resize"},
    ),
    "jigsaw_R_50_no_context.yaml": (R50, {"INPUT.JIGSAW.CONTEXT": False}),
    **{
        f"jigsaw_R_50_tau_{tau}.yaml": (R50, {"MODEL.JIGSAW.TAU": tau})
        for tau in (0.5, 0.6, 0.8, 0.9, 1.0)
    },
    **{
        f"jigsaw_R_50_{thousands}k.yaml": (R50, {"SOLVER.MAX_ITER": 1000 * thousands})
        for thousands in (16, 32, 128)
    },
}


def flat(name: str) -> dict[str, object]:
    """Every key of a config, dotted, with plain values."""

    def walk(node: dict, prefix: str) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in node.items():
            inner = isinstance(value, dict)
            found |= walk(value, f"{prefix}{key}.") if inner else {prefix + key: value}
        return found

    return walk(yaml.safe_load(get_jigsaw_cfg(name).dump()), "")


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_its_difference(name):
    base, changes = ROWS[name]
    ours, theirs = flat(name), flat(base)
    different = {key: ours[key] for key in ours if ours[key] != theirs[key]}
    assert different.pop("OUTPUT_DIR") == f"output/{name.removesuffix('.yaml')}"
    assert different == changes


def test_every_shipped_row_is_listed():
    shipped = {path.name for path in config_dir().glob("jigsaw_*.yaml")}
    assert shipped - set(ROWS) == {R50, "jigsaw_R_18_cpu.yaml"}
