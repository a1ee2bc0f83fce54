"""Every configuration key that this project adds to Detectron2's, and where configs are found.

The defaults here are the paper's values ("Cheaper Pre-training Lunch", arXiv 2004.12178) or, where
the paper is silent, our decision with its reason beside the key (marked "ours").
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import detectron2
import yaml
from detectron2.config import CfgNode, get_cfg

from jigsaw_d2.io import ConfigError

OBJECTIVES = ("erf_adaptive", "block_wise", "global")
FIT_METHODS = ("pad_crop", "warp", "resize")
SAMPLINGS = ("uniform", "class_balanced")
ERF_GRADS = ("abs", "relu")
AMP_DTYPES = ("float16", "bfloat16", "auto")
AUTO_NORM = "auto"


def add_jigsaw_config(cfg: CfgNode) -> None:
    """Add the keys of Jigsaw pre-training to ``cfg``, in place.

    Harmless on a detection config: all defaults leave Detectron2's behaviour as it is.
    """
    _add_model_keys(cfg)
    _add_input_keys(cfg)
    _add_solver_keys(cfg)
    # COCO-format datasets that every command registers: a list of [name, json file, image folder].
    cfg.DATASETS.COCO_FILES = []


def _add_model_keys(cfg: CfgNode) -> None:
    cfg.MODEL.JIGSAW = CfgNode()
    # Backbone feature that is classified cell by cell; Sec. 3.3: the last feature map.
    cfg.MODEL.JIGSAW.IN_FEATURE = "res5"
    # Object categories without background, as Detectron2 counts; background becomes the last
    # index. 0: taken from the sample store when training starts.
    cfg.MODEL.JIGSAW.NUM_CLASSES = 0
    # "erf_adaptive" (Eq. 1-2, Table 2: 36.3 AP), "block_wise" (35.2 AP) or "global" (34.3 AP).
    cfg.MODEL.JIGSAW.OBJECTIVE = "erf_adaptive"
    # tau of Eq. 2, the least weight of a cell's own region; Fig. 7a: 0.6 to 0.8 serve equally.
    cfg.MODEL.JIGSAW.TAU = 0.7
    # Keep activations and weights in channels_last, which convolutions on GPUs under AMP are made
    # for. None: as a trial of a few steps says at the start of a run (ours).
    cfg.MODEL.JIGSAW.CHANNELS_LAST = False
    # Compile the backbone with torch.compile: slow start, faster steps (ours). ERF and evaluation
    # run it as it is.
    cfg.MODEL.JIGSAW.COMPILE = False
    # Keep the inputs of the backbone's blocks alone and compute what lies between twice: less
    # memory, a third more time (ours).
    cfg.MODEL.JIGSAW.ACTIVATION_CHECKPOINTING = False
    # Fine-tuning only. Where a detector's weights must come from: "jigsaw", "imagenet", "scratch",
    # or "" = anywhere. A table row's config names it, so that no row runs from the wrong file.
    cfg.MODEL.JIGSAW.ORIGIN = ""
    # Fine-tuning only. Start the offsets of deformable stages at zero, where they are a plain
    # convolution, if the weights have none: Fig. 8's ImageNet baseline is pre-trained without them.
    cfg.MODEL.JIGSAW.NEW_OFFSETS = False

    cfg.MODEL.JIGSAW.ERF = CfgNode()
    # Iterations between two refreshes of the weights of Eq. 2; Sec. 3.3: every 5k iterations.
    cfg.MODEL.JIGSAW.ERF.PERIOD = 5000
    # Iteration of the first refresh. Ours: 0, so that Eq. 2 holds from the first step.
    cfg.MODEL.JIGSAW.ERF.FIRST_ITER = 0
    # Training images per refresh, over all ranks (ours: the maps are averaged over images, and
    # only four sums per cell are kept).
    cfg.MODEL.JIGSAW.ERF.NUM_IMAGES = 64
    # How gradients become ERF: "abs" counts influence of either sign (ours); "relu" only positive,
    # as some public ERF tools do.
    cfg.MODEL.JIGSAW.ERF.GRAD = "abs"
    # Where SOLVER.AMP is on, measure in its precision too, so that a refresh stays as cheap as the
    # steps are (ours; bfloat16 moved ResNet-18's weights by 0.0002 on average, 0.002 at most).
    cfg.MODEL.JIGSAW.ERF.AMP = True
    # Refresh early once the mean absolute change of the weights, probed every PERIOD / 10
    # iterations, exceeds this; 0 = by period alone (the paper).
    cfg.MODEL.JIGSAW.ERF.MAX_DRIFT = 0.0
    # Figures of the maps in TensorBoard at each refresh.
    cfg.MODEL.JIGSAW.ERF.FIGURES = True


def _add_input_keys(cfg: CfgNode) -> None:
    cfg.INPUT.JIGSAW = CfgNode()
    # Canvas (height, width) in pixels, Fig. 4b; multiples of the feature's stride.
    cfg.INPUT.JIGSAW.TEMPLATE_SIZE = [224, 224]
    # First row and first column (y, x) of the lower and right regions, in pixels, Fig. 4b.
    cfg.INPUT.JIGSAW.TEMPLATE_SPLIT = [64, 64]
    # "pad_crop" (Sec. 3.2, Table 1: 35.2 AP), "warp" (34.6 AP) or "resize" (34.7 AP).
    cfg.INPUT.JIGSAW.FIT = "pad_crop"
    # Range of the one ratio that resizes a sample, both sides alike (Sec. 4.1).
    cfg.INPUT.JIGSAW.SCALE_RANGE = [0.8, 1.5]
    # Probability of a sample's horizontal flip (Sec. 4.1).
    cfg.INPUT.JIGSAW.FLIP_PROB = 0.5
    # False: show a positive's annotated box without the context stored around it (Sec. 3.1:
    # context brings +1.6 AP).
    cfg.INPUT.JIGSAW.CONTEXT = True
    # "uniform" over the samples of a group (the paper) or "class_balanced": repeat factors of
    # Detectron2's RepeatFactorTrainingSampler with DATALOADER.REPEAT_THRESHOLD (ours).
    cfg.INPUT.JIGSAW.SAMPLING = "uniform"
    # Held-out Jigsaw images per evaluation (ours), drawn with one fixed seed.
    cfg.INPUT.JIGSAW.EVAL_IMAGES = 2048
    cfg.INPUT.JIGSAW.EVAL_SEED = 0


def _add_solver_keys(cfg: CfgNode) -> None:
    # Batch size that BASE_LR, MAX_ITER, WARMUP_ITERS, ERF.PERIOD, CHECKPOINT_PERIOD and
    # EVAL_PERIOD are written for. Another IMS_PER_BATCH scales the rate linearly and the lengths
    # inversely (P4, ours). 0 = off: the numbers are taken as they stand.
    cfg.SOLVER.REFERENCE_BATCH_SIZE = 0
    # Backward passes per optimiser step; IMS_PER_BATCH is the whole step's, so memory falls (ours).
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # Under SOLVER.AMP.ENABLED: "float16" (with loss scaling), "bfloat16", or "auto": the one that a
    # trial of a few steps finds faster at the start of a run; on CPUs float32 is tried too (ours).
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Let float32 matrix products and convolutions use TF32 where the GPU has it (ours).
    cfg.SOLVER.TF32 = False
    # Only algorithms that give the same bits each time, on GPUs too, so that a resumed run repeats
    # the unbroken one there bit for bit; slower (ours). As train_net.py --deterministic.
    cfg.SOLVER.DETERMINISTIC = False
    # Seconds without a sign of life after which the ranks give up on a peer (ours).
    cfg.SOLVER.PEER_TIMEOUT = 600


def config_dir() -> Path:
    """Folder of the shipped YAML files: inside an installed package, or ``configs/`` of a checkout.

    Raises:
        FileNotFoundError: neither exists, as after a broken install.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "Base-JigsawPretrain.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"no configs beside {package}: reinstall jigsaw_d2, or run from a checkout of the project"
    )


def get_jigsaw_cfg(
    config_file: str = "", overrides: list[str] | None = None, trust: bool = False
) -> CfgNode:
    """Detectron2's defaults + our keys + ``config_file`` + ``KEY VALUE`` overrides, not frozen.

    Args:
        config_file: a path; or a name relative to ``configs/`` ("jigsaw_R_50.yaml", with or
            without a leading "configs/"), found in an installed package too. "" = defaults alone.
        overrides: flat list [key, value, ...] as from the command line.
        trust: let tags in ``config_file`` run code.

    Raises:
        FileNotFoundError: ``config_file`` is neither a path nor a shipped name.
        ConfigError: see ``refuse_code``.
    """
    cfg = get_cfg()
    add_jigsaw_config(cfg)
    if config_file:
        path = str(find_config(config_file))
        refuse_code(path, trust)
        cfg.merge_from_file(path)
    cfg.merge_from_list(overrides or [])
    return cfg


def find_config(name: str) -> Path:
    """Path of a config given as a path or as a name among the shipped ones.

    Raises:
        FileNotFoundError: naming both places that were searched.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = config_dir() / str(name).removeprefix("configs/")
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(p.name for p in config_dir().glob("*.yaml")))
    raise FileNotFoundError(f"no config {name!r}: not a file, nor among the shipped ones ({names})")


def refuse_code(path: str, trust: bool = False) -> None:
    """Look for YAML tags that could run code, in a config file and in the files of its ``_BASE_``.

    Detectron2 loads such by default. Here only files of its own model zoo may have them (RetinaNet
    computes its anchors so): they were installed with its code.

    Raises:
        ConfigError: naming the file and the tag; not with ``trust``.
    """
    zoo = Path(detectron2.__file__).parent / "model_zoo" / "configs"
    if trust or Path(path).resolve().is_relative_to(zoo.resolve()):
        return
    with CfgNode._open_cfg(path) as stream:
        try:
            values = yaml.safe_load(stream)
        except yaml.constructor.ConstructorError as error:
            problem = str(error.problem).replace("tag:yaml.org,2002:", "!!")
            tag = re.search("'(!.*)'", problem)
            raise ConfigError(
                f"{path}: refused, because reading it could run code from it "
                f"({f'the tag {tag[1]}' if tag else problem}); write the values out, or, if the "
                "file is your own, --trust reads it"
            ) from None
    bases = values.get("_BASE_", []) if isinstance(values, Mapping) else []
    for base in [bases] if isinstance(bases, str) else bases:
        base = os.path.expanduser(base)
        remote = base.startswith(("http://", "https://"))  # found as fvcore finds them
        refuse_code(base if remote else os.path.join(os.path.dirname(path), base))
