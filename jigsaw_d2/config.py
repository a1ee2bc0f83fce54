"""Every configuration key that this project adds to Detectron2's, and what follows from them.

The defaults here are the paper's values ("Cheaper Pre-training Lunch", arXiv 2004.12178) or, where
the paper is silent, our decision with its reason beside the key (marked "ours").
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg

from jigsaw_d2.config_files import find_config, import_kept, refuse_code, refuse_program
from jigsaw_d2.io import ConfigError

logger = logging.getLogger(__name__)

AUTO_NORM = "auto"
# SOLVER.LR_SCHEDULER_NAME of the paper's schedule. Detectron2's own "WarmupCosineLR" is another
# curve: its cosine starts at iteration 0 and the warm-up ends on it, below BASE_LR.
SCHEDULER_NAME = "WarmupThenCosineLR"
# Images per forward pass of one GPU below which batch statistics are taken over all GPUs. The paper
# has 64; 16 is where group norm's authors find batch norm's error to start rising.
MIN_IMAGES_PER_GPU = 16
_SYNC_NORMS = ("SyncBN", "naiveSyncBN", "nnSyncBN", "naiveSyncBN_N")


def add_jigsaw_config(cfg: CfgNode) -> None:
    """Add the keys of Jigsaw pre-training to ``cfg``, in place.

    Harmless on a detection config: all defaults leave Detectron2's behaviour as it is.
    """
    _add_model_keys(cfg)
    _add_input_keys(cfg)
    _add_solver_keys(cfg)
    # COCO-format datasets that every command registers: a list of [name, json file, image folder].
    cfg.DATASETS.COCO_FILES = []
    # Fine-tuning of a keypoint detector on COCO_FILES: names of the keypoints in their order, of
    # which left_... and right_... change places in a mirror; [] = those of the json's categories.
    cfg.DATASETS.KEYPOINTS = []


def _add_model_keys(cfg: CfgNode) -> None:
    cfg.MODEL.JIGSAW = CfgNode()
    # Backbone feature that is classified cell by cell; Sec. 3.3: the last feature map.
    cfg.MODEL.JIGSAW.IN_FEATURE = "res5"
    # Several features that are classified, such as ["p3", "p4", "p5"] of a feature pyramid, in
    # place of IN_FEATURE; [] = that one alone (ours; the paper leaves it open, Sec. 4.2).
    cfg.MODEL.JIGSAW.IN_FEATURES = []
    # Several features: one 1x1 classifier for all of them, as RetinaNet's heads are, or one each.
    cfg.MODEL.JIGSAW.SHARED_CLASSIFIER = True
    # Several features: "all", the mean of their losses; or "assign", where each region's loss
    # counts on the one to which Detectron2 would send a box of the shown size.
    cfg.MODEL.JIGSAW.LEVELS = "all"
    # LEVELS "assign": side in pixels of a box for p4; one half as large goes to p3. Detectron2's
    # own number is for images of 800 pixels; the paper's canvas shows boxes of at most 160.
    cfg.MODEL.JIGSAW.ASSIGN_BOX_SIZE = 224
    # Leave cells out of the loss on which there is nothing but padding (ours).
    cfg.MODEL.JIGSAW.IGNORE_PADDING = False
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
    # Of MODEL.BACKBONE.NAME build_lazy_backbone: the LazyConfig whose backbone is trained, a .py
    # file or a name in Detectron2's zoo; as train_net.py --backbone-from.
    cfg.MODEL.JIGSAW.BACKBONE_FROM = ""
    # Modules that registered what the run needs, as --register named them. Imported from here with
    # --trust alone, for a config is no program; who opens the run without them is told which.
    cfg.MODEL.JIGSAW.REGISTER = []
    # Fine-tuning only. Where a detector's weights must come from: "jigsaw", "imagenet", "scratch",
    # or "" = anywhere. A table row's config names it, so that no row runs from the wrong file.
    cfg.MODEL.JIGSAW.ORIGIN = ""
    # Fine-tuning only. Start the offsets of deformable stages at zero, where they are a plain
    # convolution, if the weights have none: Fig. 8's ImageNet baseline is pre-trained without them.
    cfg.MODEL.JIGSAW.NEW_OFFSETS = False
    # Fine-tuning only. The norm of a backbone that starts from random weights where the config's
    # RESNETS.NORM is frozen, or none; Table 5: group norm.
    cfg.MODEL.JIGSAW.SCRATCH_NORM = "GN"

    cfg.MODEL.TIMM = CfgNode()
    # Network of MODEL.BACKBONE.NAME build_timm_backbone, build_timm_fpn_backbone or
    # build_retinanet_timm_fpn_backbone: any of timm.list_models() that has features.
    cfg.MODEL.TIMM.NAME = ""
    # Further arguments of timm.create_model: a list of [name, value], as ["img_size", 1024].
    cfg.MODEL.TIMM.KWARGS = []
    # File of timm's own pre-trained weights of that network; "" = random weights.
    cfg.MODEL.TIMM.WEIGHTS = ""
    # Outputs by stride: stem (2), res2 (4), res3 (8), res4 (16), res5 (32). [] = all; in a
    # pre-training on res4, ["res4"], so that nothing is built that learns nothing.
    cfg.MODEL.TIMM.OUT_FEATURES = []
    # Keep batch norm's statistics and weights, which the few images of a detector's batch spoil;
    # set for a detector whose weights have batch norm, refused in a pre-training.
    cfg.MODEL.TIMM.FREEZE_NORM = False
    cfg.MODEL.TORCHVISION = CfgNode()
    # As of MODEL.TIMM, for build_torchvision_backbone and so on: any of
    # torchvision.models.list_models() that is a chain of modules.
    cfg.MODEL.TORCHVISION.NAME = ""
    cfg.MODEL.TORCHVISION.KWARGS = []
    cfg.MODEL.TORCHVISION.WEIGHTS = ""
    cfg.MODEL.TORCHVISION.OUT_FEATURES = []
    cfg.MODEL.TORCHVISION.FREEZE_NORM = False

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
    # Function that reads an image file as an array (h, w, C), "module:name", where INPUT.FORMAT is
    # C and a number ("C4") or a letter for each channel; "" = npy, tiff, png as they are.
    cfg.INPUT.READER = ""
    cfg.INPUT.JIGSAW = CfgNode()
    # Canvas (height, width) in pixels, Fig. 4b; multiples of the feature's stride.
    cfg.INPUT.JIGSAW.TEMPLATE_SIZE = [224, 224]
    # First row and first column (y, x) of the lower and right regions, in pixels, Fig. 4b.
    cfg.INPUT.JIGSAW.TEMPLATE_SPLIT = [64, 64]
    # "auto": choose canvas, split and scale range for the store and for a detector that shows its
    # images at INPUT.MIN_SIZE_TRAIN and MAX_SIZE_TRAIN, by the paper's ratios (data/fit.py, ours).
    cfg.INPUT.JIGSAW.FIT_TO = ""
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
    # Draw R1 from the smaller and R4 from the larger half of the square-like samples, each as often
    # as before: less padding, less cut away (ours; the paper draws two and sorts them).
    cfg.INPUT.JIGSAW.SIZE_AWARE = False
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
    # "SGD" (the paper) or "AdamW", for transformers, in both trainings. AdamW decays no position
    # embeddings; SOLVER.WEIGHT_DECAY_NORM 0 and WEIGHT_DECAY_BIAS 0 free norms and biases (ours).
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Factor of the rate from each block of the backbone to the one below it, as ViTDet fine-tunes
    # with 0.7 to 0.9; 1 = one rate for all (ours).
    cfg.SOLVER.LAYER_DECAY = 1.0
    # Let float32 matrix products and convolutions use TF32 where the GPU has it (ours).
    cfg.SOLVER.TF32 = False
    # Only algorithms that give the same bits each time, on GPUs too, so that a resumed run repeats
    # the unbroken one there bit for bit; slower (ours). As train_net.py --deterministic.
    cfg.SOLVER.DETERMINISTIC = False
    # Seconds without a sign of life after which the ranks give up on a peer (ours).
    cfg.SOLVER.PEER_TIMEOUT = 600


def get_jigsaw_cfg(
    config_file: str = "", overrides: list[str] | None = None, trust: bool = False
) -> CfgNode:
    """Detectron2's defaults + our keys + ``config_file`` + ``KEY VALUE`` overrides, not frozen.

    Args:
        config_file: a path; or a name relative to ``configs/`` ("jigsaw_R_50.yaml", with or
            without a leading "configs/"), found in an installed package too. "" = defaults alone.
        overrides: flat list [key, value, ...] as from the command line.
        trust: let tags in ``config_file`` run code, and import its MODEL.JIGSAW.REGISTER.

    Raises:
        FileNotFoundError: ``config_file`` is neither a path nor a shipped name.
        ConfigError: unknown keys, other types; see ``refuse_code`` and ``refuse_program``.
    """
    path = where = str(find_config(config_file)) if config_file else ""
    try:
        if path:
            refuse_code(path, trust)
            import_kept(CfgNode.load_yaml_with_base(path, allow_unsafe=True), path, trust)
        cfg = get_cfg()
        add_jigsaw_config(cfg)
        if path:
            cfg.merge_from_file(path)
        where = f"overrides {overrides}"
        cfg.merge_from_list(overrides or [])
    except ConfigError:
        raise
    except (KeyError, ValueError, AssertionError, yaml.YAMLError) as error:
        raise ConfigError(f"{where}: {error.args[0] if error.args else error}") from None
    refuse_program(cfg, config_file, overrides or [], trust)
    program = Path(cfg.MODEL.JIGSAW.BACKBONE_FROM)
    if program.is_file():  # to be found from every folder
        cfg.merge_from_list(["MODEL.JIGSAW.BACKBONE_FROM", str(program.resolve())])
    return cfg


def keep_registered(cfg: CfgNode, modules: Sequence[str]) -> None:
    """Write the modules of --register into the run's settings, after those that are there."""
    names = list(dict.fromkeys([*cfg.MODEL.JIGSAW.REGISTER, *modules]))
    cfg.merge_from_list(["MODEL.JIGSAW.REGISTER", names])


def scale_to_batch(cfg: CfgNode) -> CfgNode:
    """A config whose rate and lengths fit IMS_PER_BATCH instead of REFERENCE_BATCH_SIZE.

    With k = IMS_PER_BATCH / REFERENCE_BATCH_SIZE: BASE_LR is multiplied by k; MAX_ITER,
    WARMUP_ITERS, STEPS, CHECKPOINT_PERIOD, EVAL_PERIOD, ERF.PERIOD and ERF.FIRST_ITER are divided
    by k and rounded (what was positive stays at least 1), so that every event happens after as many
    images as before. REFERENCE_BATCH_SIZE becomes IMS_PER_BATCH: scaling the result again, or a
    run's saved config.yaml, changes nothing.

    Args:
        cfg: left as it is.

    Raises:
        ConfigError: a batch size that is not positive.
    """
    cfg = cfg.clone()
    batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_BATCH_SIZE
    if batch < 1 or reference < 0:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {batch} and SOLVER.REFERENCE_BATCH_SIZE {reference}; "
            "the first must be positive, the second positive or 0 (off)"
        )
    if reference in (0, batch):
        return cfg
    frozen = cfg.is_frozen()
    cfg.defrost()
    k = batch / reference

    def length(iterations: int) -> int:
        return max(round(iterations / k), 1) if iterations > 0 else iterations

    solver, erf = cfg.SOLVER, cfg.MODEL.JIGSAW.ERF
    solver.BASE_LR *= k
    for node, key in (
        (solver, "MAX_ITER"),
        (solver, "WARMUP_ITERS"),
        (solver, "CHECKPOINT_PERIOD"),
        (cfg.TEST, "EVAL_PERIOD"),
        (erf, "PERIOD"),
        (erf, "FIRST_ITER"),
    ):
        node[key] = length(node[key])
    solver.STEPS = tuple(length(step) for step in solver.STEPS)
    solver.REFERENCE_BATCH_SIZE = batch
    logger.info(
        "batch of %d instead of %d images: BASE_LR %g, MAX_ITER %d, WARMUP_ITERS %d, "
        "ERF.PERIOD %d, CHECKPOINT_PERIOD %d, EVAL_PERIOD %d",
        *(batch, reference, solver.BASE_LR, solver.MAX_ITER, solver.WARMUP_ITERS),
        *(erf.PERIOD, solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD),
    )
    if frozen:
        cfg.freeze()
    return cfg


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("A.B", value) of every leaf of a config, or of plain dicts within each other."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def keywords(pairs: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Keyword arguments by name, of a KWARGS key.

    Raises:
        ConfigError: it is no list of pairs.
    """
    try:
        return dict(pairs)
    except (TypeError, ValueError):
        text = f"KWARGS {pairs}: write [NAME, VALUE] pairs, such as [['img_size', 224]]"
        raise ConfigError(text) from None


def in_features(cfg: CfgNode) -> list[str]:
    """The features that are classified: IN_FEATURES, or where that is empty IN_FEATURE.

    Raises:
        ConfigError: one is named twice, or the two keys contradict each other.
    """
    jigsaw = cfg.MODEL.JIGSAW
    several = list(jigsaw.IN_FEATURES) or [jigsaw.IN_FEATURE]
    if len(set(several)) < len(several):
        raise ConfigError(f"MODEL.JIGSAW.IN_FEATURES is {several}: name each feature once")
    if jigsaw.IN_FEATURE not in (*several, "res5"):
        raise ConfigError(
            f"MODEL.JIGSAW.IN_FEATURE is {jigsaw.IN_FEATURE} and IN_FEATURES {several}; set one of "
            "the two (IN_FEATURES [] is none)"
        )
    return several


def resolve_norm(cfg: CfgNode, world_size: int, part: str = "RESNETS") -> str:
    """The norm that MODEL.RESNETS.NORM stands for on this machine, said in the log when chosen.

    ``part`` "FPN": MODEL.FPN.NORM, by the same rules.

    "auto" is SyncBN where several GPUs see few images each, and BN elsewhere. A synchronised norm
    on one process or on a CPU, where it cannot run, becomes BN, which computes the same there.
    """
    norm = cfg.MODEL[part].NORM
    on_gpu = str(cfg.MODEL.DEVICE).startswith("cuda")
    can_sync = on_gpu and world_size > 1
    images = cfg.SOLVER.IMS_PER_BATCH // (world_size * cfg.SOLVER.ACCUMULATION_STEPS)
    if norm == AUTO_NORM:
        chosen = "SyncBN" if can_sync and images < MIN_IMAGES_PER_GPU else "BN"
        where = f"{world_size} process(es) on {'GPU' if on_gpu else 'CPU'}, {images} images each"
        if chosen == "SyncBN":
            where += f"; from {MIN_IMAGES_PER_GPU} on it would be BN, faster: SyncBN waits a layer"
        logger.info("MODEL.%s.NORM auto -> %s (%s)", part, chosen, where)
        return chosen
    if norm in _SYNC_NORMS and world_size == 1:
        logger.info("MODEL.%s.NORM %s -> BN: one process has nothing to synchronise", part, norm)
        return "BN"
    if norm in _SYNC_NORMS and not on_gpu:
        raise ConfigError(
            f"MODEL.{part}.NORM is {norm}, which does not run on MODEL.DEVICE {cfg.MODEL.DEVICE}; "
            "choose BN, GN or auto"
        )
    return norm


def check_trainable_config(cfg: CfgNode) -> None:
    """Refuse settings that freeze layers, or that do not build the classified features.

    Detectron2's defaults do both: they are made for fine-tuning.

    Raises:
        ConfigError: naming the key, its value and the value it should have.
    """
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if freeze_at > 0:
        raise ConfigError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}: the stem would stay random; set it to 0"
        )
    if cfg.MODEL.BACKBONE.NAME != "build_resnet_backbone":
        return  # what others make of these keys is seen on the built network
    resnets, features = cfg.MODEL.RESNETS, in_features(cfg)
    if resnets.NORM == "FrozenBN":
        raise ConfigError(
            "MODEL.RESNETS.NORM is FrozenBN: statistics would stay those of no data; "
            "set BN, SyncBN, GN or auto"
        )
    absent = sorted(set(features) - set(resnets.OUT_FEATURES))
    if absent:
        raise ConfigError(
            f"MODEL.RESNETS.OUT_FEATURES is {list(resnets.OUT_FEATURES)} without "
            f"{', '.join(absent)} of MODEL.JIGSAW.IN_FEATURE(S), which would not be built; add it"
        )
