"""What a comparison runs: its arms, its seeds, its lengths; pure descriptions, nothing is run here.

An arm is a way to initialise the detector. Every arm meets the same detection config, which gives
each start the norm that serves it best, as Table 5 does; its length may differ, and that by the
budget rule alone:

    "total"      arms from scratch get the iterations that the pre-training cost (paper, Table 5)
    "detection"  every arm has the same detection iterations (paper, Table 3)

By either rule, what a user would pick instead pre-trains for what the Jigsaw run of its seed cost
before detection: "direct", the detector itself on small images (arXiv 2106.03112), and "lightly",
the backbone by LightlyTrain, which needs no labels.
"""

import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jigsaw_d2.io import ConfigError

if TYPE_CHECKING:
    from jigsaw_d2.tools.pipeline import DetectionSet, Pipeline

# Rows of Tables 1 and 2; other objectives go by their name alone.
OBJECTIVES = ("erf_adaptive", "block_wise", "global")
FIT_METHODS = ("pad_crop", "warp", "resize")
BUDGETS = ("total", "detection")
COSTS = ("seconds", "flops")
AGAIN_SEED_OFFSET = 1000  # between the seeds of an arm and of its A/A copy


@dataclass(frozen=True)
class Arm:
    """One initialisation: ``name`` in tables, ``slug`` in paths, ``kind`` as the fields say."""

    name: str
    kind: str  # "scratch", "jigsaw", "direct", "lightly" or "weights"
    pretrain: tuple[str, ...] = ()  # KEY VALUE overrides of the pre-training config
    extract: tuple[str, ...] = ()  # further arguments of the extraction
    weights: Path | None = None  # a converted file
    seed_offset: int = 0  # added to each seed
    length: float = 1.0  # of the pre-training, as a factor on the plan's

    @property
    def slug(self) -> str:
        """The name as part of a path."""
        return "".join(char if char.isalnum() else "-" for char in self.name)

    @property
    def waits(self) -> bool:
        """Whether its length follows from what the Jigsaw runs cost."""
        return self.kind in ("scratch", "direct", "lightly")


@dataclass(frozen=True)
class Plan:
    """A whole comparison: one run of every arm with every seed, under settings that all share."""

    preset: str
    about: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    pretrain_config: str
    detector_config: str
    pretrain_iterations: int = 0  # optimiser steps; 0 = the config's own
    detection_iterations: int = 0
    pretrain: tuple[str, ...] = ()  # KEY VALUE overrides
    detector: tuple[str, ...] = ()
    budget: str = "total"
    cost: str = "seconds"
    evaluations: int = 1  # of the detector, the last one included, spread evenly
    num_gpus: int = 1
    register: tuple[str, ...] = ()  # as the commands' flags say
    trust: bool = False
    same_norm: bool = False  # ``detector`` gives all arms one norm, and freezes nothing
    lightly_python: str = ""  # of the environment that LightlyTrain is in
    lightly: tuple[str, ...] = ()  # KEY=VALUE arguments of lightly_train.pretrain

    def pipeline(self, data: "DetectionSet", seed: int = 0) -> "Pipeline":
        """The maker of the stages on ``data``."""
        from jigsaw_d2.tools.pipeline import Pipeline  # not for --help: it brings torch in

        configs = (self.pretrain_config, self.detector_config, self.num_gpus)
        return Pipeline(data, *configs, tuple(self.register), self.trust, seed)

    def checked(self) -> "Plan":
        """Itself, if it can be run.

        Raises:
            ConfigError: what is wrong.
        """
        slugs, seeds = [arm.slug for arm in self.arms], self.seeds
        if not slugs or len(set(slugs)) != len(slugs):
            raise ConfigError(f"arms need names of their own; these are {', '.join(slugs)}")
        if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
            raise ConfigError(f"seeds {seeds}: give different numbers, 0 or more")
        if max(seeds) - min(seeds) >= AGAIN_SEED_OFFSET:
            raise ConfigError(f"seeds {seeds} must lie within {AGAIN_SEED_OFFSET} of each other")
        kinds = {arm.kind for arm in self.arms}
        if kinds & {"direct", "lightly"} and "jigsaw" not in kinds:
            raise ConfigError("arms direct and lightly take as long as a jigsaw arm: name one, too")
        if "lightly" in kinds:
            if self.cost != "seconds" or self.num_gpus > 1:
                raise ConfigError(
                    "arm lightly: its FLOPs are not counted, and it runs on one device; --cost "
                    "seconds --num-gpus 1"
                )
            check_lightly(self.lightly_python)
        return self


def jigsaw_arm(objective: str = "erf_adaptive") -> Arm:
    """Pre-training with an objective of ``jigsaw_d2.modeling.losses``."""
    return Arm(f"jigsaw {objective}", "jigsaw", ("MODEL.JIGSAW.OBJECTIVE", objective))


def check_lightly(python: str) -> None:
    """Raise ``ConfigError`` if ``python`` is no interpreter that has LightlyTrain."""
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('lightly_train') is None)"
    if not Path(python).is_file() or subprocess.run([python, "-c", find]).returncode:
        raise ConfigError(
            f"arm lightly: {f'{python} has no LightlyTrain' if python else 'no --lightly-python'}; "
            "make an environment of its own by\n  python -m venv lightly_env\n"
            "  lightly_env/bin/pip install lightly-train\n"
            "and name it by --lightly-python lightly_env/bin/python"
        )


SCRATCH = Arm("scratch", "scratch")
SCRATCH_AGAIN = Arm("scratch again", "scratch", seed_offset=AGAIN_SEED_OFFSET)
DIRECT, LIGHTLY = Arm("direct", "direct"), Arm("lightly", "lightly")
ARMS = "scratch, scratch-again, direct, lightly, jigsaw[:OBJECTIVE] or NAME=WEIGHTS"


def parse_arm(text: str) -> Arm:
    """An arm from the command line, one of ARMS.

    Raises:
        ConfigError: none of these, or a file or an objective that does not exist.
    """
    from jigsaw_d2.modeling import losses  # not for --help: it brings torch in

    for arm in (SCRATCH, SCRATCH_AGAIN, DIRECT, LIGHTLY):
        if text == arm.slug:
            return arm
    if text.split(":")[0] == "jigsaw":
        objective = text.partition(":")[2] or "erf_adaptive"
        if objective not in losses.OBJECTIVES:
            raise ConfigError(f"objective {objective!r} is none of {', '.join(losses.OBJECTIVES)}")
        return jigsaw_arm(objective)
    name, _, file = text.partition("=")
    if not name or not Path(file).is_file():
        raise ConfigError(
            f"arm {text!r}: give {ARMS}, an existing file that finetune_net.py takes as --weights"
        )
    return Arm(name, "weights", weights=Path(file).resolve())


def _variants(prefix: str, key: str, values: tuple[object, ...], base: Arm) -> tuple[Arm, ...]:
    return tuple(
        replace(base, name=f"{prefix} {value}", pretrain=(*base.pretrain, key, str(value)))
        for value in values
    )


_ERF, _BLOCK = jigsaw_arm(), jigsaw_arm("block_wise")
# The pyramid of the presets' FPN detector; boxes of the smallest canvas fitted, 64 px, reach p5.
_PYRAMID = (
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", "64"),
    *("MODEL.RESNETS.OUT_FEATURES", "['res3', 'res4', 'res5']"),
    *("MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']"),
    *("MODEL.JIGSAW.IN_FEATURES", "['p3', 'p4', 'p5']", "MODEL.JIGSAW.ASSIGN_BOX_SIZE", "16"),
)
ABLATIONS: dict[str, tuple[Arm, ...]] = {
    "objective": tuple(jigsaw_arm(objective) for objective in OBJECTIVES),  # Table 2
    # Table 1's best row is Table 2's block-wise one, so it was run with that objective.
    "fit": _variants("fit", "INPUT.JIGSAW.FIT", FIT_METHODS, _BLOCK),
    "context": _variants("context", "INPUT.JIGSAW.CONTEXT", (True, False), _ERF),  # Sec. 3.1
    "negatives": tuple(
        replace(_ERF, name=f"positives per negative {n}", extract=("--negative-ratio", str(n)))
        for n in (2, 10, 50)
    ),
    "levels": (  # Sec. 4.2 leaves it open
        replace(_ERF, name="res5"),
        *_variants(
            "p3 to p5,",
            "MODEL.JIGSAW.LEVELS",
            ("all", "assign"),
            replace(_ERF, pretrain=(*_ERF.pretrain, *_PYRAMID)),
        ),
    ),
    "tau": _variants("tau", "MODEL.JIGSAW.TAU", (0.5, 0.6, 0.7, 0.8, 0.9, 1.0), _ERF),  # Fig. 7a
    "iterations": tuple(  # Fig. 7b: 16k, 32k, 64k, 128k
        replace(_ERF, name=f"length x{factor:g}", length=factor) for factor in (0.25, 0.5, 1, 2)
    ),
}
PRESETS: dict[str, Plan] = {
    "smoke": Plan(
        preset="smoke",
        about="minutes on two CPU cores: does the machinery work, and how large is chance?",
        arms=(_ERF, SCRATCH, SCRATCH_AGAIN),
        seeds=(0, 1, 2),
        pretrain_config="jigsaw_R_18_cpu.yaml",
        detector_config="finetune/faster_rcnn_R_18_FPN_small.yaml",
        pretrain_iterations=600,
        detection_iterations=250,
        pretrain=(
            *("INPUT.JIGSAW.FIT_TO", "auto", "SOLVER.IMS_PER_BATCH", "32"),
            *("MODEL.JIGSAW.ERF.NUM_IMAGES", "4", "MODEL.JIGSAW.ERF.PERIOD", "200"),
        ),
        evaluations=2,
    ),
    "small": Plan(
        preset="small",
        about="a GPU-hour or a CPU night: ResNet-18, both dense objectives against scratch",
        arms=(_ERF, _BLOCK, SCRATCH, SCRATCH_AGAIN),
        seeds=(0, 1, 2),
        pretrain_config="jigsaw_R_18_cpu.yaml",
        detector_config="finetune/faster_rcnn_R_18_FPN_small.yaml",
        pretrain_iterations=1000,
        detection_iterations=3000,
        pretrain=(
            *("INPUT.JIGSAW.FIT_TO", "auto", "SOLVER.IMS_PER_BATCH", "32", "SOLVER.BASE_LR", "0.1"),
            *("SOLVER.WARMUP_ITERS", "100", "MODEL.JIGSAW.ERF.PERIOD", "200"),
        ),
        detector=(
            *("SOLVER.IMS_PER_BATCH", "8", "SOLVER.BASE_LR", "0.02"),
            *("SOLVER.WARMUP_ITERS", "150"),
        ),
        evaluations=5,
    ),
    "paper": Plan(
        preset="paper",
        about="the paper's lengths on COCO, scratch with group norm: days on eight GPUs",
        arms=(*ABLATIONS["objective"], SCRATCH, SCRATCH_AGAIN),
        seeds=(0, 1, 2),
        pretrain_config="jigsaw_R_50.yaml",
        detector_config="finetune/faster_rcnn_R_50_C4_1x.yaml",
        evaluations=6,
    ),
}
