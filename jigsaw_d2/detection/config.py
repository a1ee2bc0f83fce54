"""Detection configs made fit for given weights, data and machine: what is required, never a guess.

A config file is a start, which the weights' metadata changes; a KEY VALUE override is the user's
will, which is refused where it contradicts the metadata.
"""

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog

from jigsaw_d2.checkpoint import detector
from jigsaw_d2.checkpoint.convert import check_free
from jigsaw_d2.checkpoint.metadata import Architecture, WeightsMetadata, fits
from jigsaw_d2.checkpoint.reading import is_detector, read_converted, read_tensors
from jigsaw_d2.config import add_jigsaw_config, flatten
from jigsaw_d2.config_files import find_config, import_kept, refuse_code, refuse_program
from jigsaw_d2.data.arrays import channels_of
from jigsaw_d2.detection.data import prepare_data
from jigsaw_d2.detection.kinds import fit_kind
from jigsaw_d2.io import ConfigError, write_text
from jigsaw_d2.modeling.backbones import library_of

logger = logging.getLogger(__name__)

# In a file: the zoo config that lies under it. ``_BASE_`` could only name a path, which an
# installed Detectron2 has elsewhere on every machine.
ZOO_BASE = "_ZOO_BASE_"
SCRATCH = "none"
NORM = "MODEL.RESNETS.NORM"
_NUM_CLASSES = ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES")
_PRETRAINING_KEYS = (
    *("SOLVER.REFERENCE_BATCH_SIZE", "SOLVER.ACCUMULATION_STEPS", "SOLVER.AMP.DTYPE"),
    *("SOLVER.TF32", "SOLVER.DETERMINISTIC"),
)
# Ours, which a config for Detectron2's own script does without.
_DONE_BEFORE = ("MODEL.JIGSAW.", "INPUT.JIGSAW.", "DATASETS.", "SOLVER.PEER_TIMEOUT")
# Random weights: the paper's input.
SCRATCH_METADATA = WeightsMetadata(
    "scratch", Architecture(), "RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
)


def load_detection_config(
    config_file: str, overrides: Sequence[str] = (), trust: bool = False
) -> CfgNode:
    """Detectron2's defaults and our keys + ``config_file`` + overrides; nothing applied yet.

    Args:
        config_file: a path, the name of a shipped file ("finetune/faster_rcnn_R_50_C4_1x.yaml"),
            or a name in Detectron2's model zoo. ``_ZOO_BASE_: <zoo name>`` in a file lays a zoo
            config under it, wherever the file lies.
        trust: let tags in the file run code, and import its MODEL.JIGSAW.REGISTER.

    Raises:
        ConfigError: none of the three; tags that could run code; unknown keys, other types.
    """
    try:
        path = where = str(find_config(config_file))
    except FileNotFoundError:
        path = where = _zoo_file(config_file)
    try:
        cfg = _merged(path, trust)
        where = f"overrides {list(overrides)}"
        cfg.merge_from_list(list(overrides))
        refuse_program(cfg, path, overrides, trust)
    except ConfigError:
        raise
    except (KeyError, ValueError, AssertionError, yaml.YAMLError) as error:
        raise ConfigError(f"{where}: no detection config: {error}") from None
    return cfg


def _merged(path: str, trust: bool) -> CfgNode:
    if path.endswith(".py"):
        raise ValueError("a LazyConfig; name one of the YAML configs")
    refuse_code(path, trust)
    loaded = CfgNode.load_yaml_with_base(path, allow_unsafe=True)
    import_kept(loaded, path, trust)
    cfg = get_cfg()
    add_jigsaw_config(cfg)
    zoo = loaded.pop(ZOO_BASE, None)
    if zoo is not None:
        refuse_code(_zoo_file(zoo), trust)  # which may be a name like ../../file.yaml
        cfg.merge_from_file(_zoo_file(zoo))
    if zoo is not None or loaded.get("VERSION") == cfg.VERSION:
        cfg.merge_from_other_cfg(CfgNode(loaded))
    else:
        cfg.merge_from_file(path)  # knows how to read older versions
    return cfg


def _zoo_file(name: str) -> str:
    try:
        return model_zoo.get_config_file(name)
    except RuntimeError:
        raise ConfigError(
            f"no config {name!r}: not a file, nor one of ours (finetune/...), nor in Detectron2's "
            "model zoo (such as COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml)"
        ) from None


def setup_finetune(
    config_file: str,
    weights: str | Path,
    overrides: Sequence[str] = (),
    *,
    match_architecture: bool = False,
    force: bool = False,
    trust: bool = False,
    here: bool = True,
) -> CfgNode:
    """The config with which ``weights`` can be fine-tuned on ``cfg.DATASETS``.

    Args:
        config_file, trust: see ``load_detection_config``.
        weights: a converted file, "none" to start from random weights, or a checkpoint of a whole
            detector with its config.yaml, whose norm is kept as it was trained.
        overrides: flat list [key, value, ...] as from the command line.
        match_architecture: take depth, groups, widths and deformable stages from the metadata
            instead of refusing a config of another network.
        force: where an override contradicts the metadata, let the override win.
        here: on this machine, which must have the data. If not, classes are those of the first
            training set if Detectron2 knows them, else the weights' own, else the config's.

    Raises:
        ConfigError: contradictions, each with both values.
        JigsawError: weights or datasets that cannot be read.
    """
    cfg = load_detection_config(config_file, overrides, trust)
    if "MODEL.WEIGHTS" in overrides[::2]:
        raise ConfigError("MODEL.WEIGHTS is set by --weights; leave it out of the overrides")
    ours = _changes_of_ours(cfg)
    if useless := [key for key in _PRETRAINING_KEYS if key in ours]:
        raise ConfigError(
            f"{', '.join(useless)}: of pre-training alone; Detectron2's trainer, which trains the "
            "detector, does not know them: leave them out"
        )
    metadata, explicit = read_metadata(weights), frozenset(overrides[::2])
    options = {"match_architecture": match_architecture, "force": force}
    apply_metadata(cfg, metadata, explicit=explicit, **options)
    counts = {len(cfg.MODEL.PIXEL_MEAN), len(cfg.MODEL.PIXEL_STD)}
    if channels_of(cfg.INPUT.FORMAT) and counts != {channels_of(cfg.INPUT.FORMAT)}:
        raise ConfigError(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT}, but MODEL.PIXEL_MEAN is {cfg.MODEL.PIXEL_MEAN} "
            f"and PIXEL_STD {cfg.MODEL.PIXEL_STD}: name as many, as the store's header.json does"
        )
    cfg.MODEL.WEIGHTS = "" if metadata.origin == "scratch" else str(Path(weights).resolve())
    if here:
        fit_kind(cfg)
        classes = prepare_data(cfg)
        fit_machine(cfg)
    else:
        known = [MetadataCatalog.get(name).get("thing_classes") for name in cfg.DATASETS.TRAIN[:1]]
        classes = next(filter(None, known), metadata.categories)
        if not classes or explicit & set(_NUM_CLASSES):
            return cfg
    for key in _NUM_CLASSES:
        if key in explicit and get_key(cfg, key) != len(classes):
            raise ConfigError(
                f"{key}: config {get_key(cfg, key)}, dataset {cfg.DATASETS.TRAIN} has "
                f"{len(classes)}: {', '.join(classes)}"
            )
        cfg.merge_from_list([key, len(classes)])
    return cfg


def read_metadata(weights: str | Path) -> WeightsMetadata:
    """Of a converted file or a detector's checkpoint; "none" (or "") is training from scratch."""
    if str(weights) in ("", SCRATCH):
        return SCRATCH_METADATA
    arrays, metadata = read_tensors(weights)
    if metadata is None and is_detector(arrays):
        return detector.detector_metadata(weights, arrays)
    # of anything else it says why not
    return metadata if metadata and metadata.digest else read_converted(weights)[1]


def apply_metadata(
    cfg: CfgNode,
    metadata: WeightsMetadata,
    *,
    explicit: frozenset[str] = frozenset(),
    match_architecture: bool = False,
    force: bool = False,
) -> None:
    """Set, in place, what ``metadata`` requires; ``explicit`` keys are the user's and stay.

    Raises:
        ConfigError: listing each key with both values.
    """
    wanted = cfg.MODEL.JIGSAW.ORIGIN
    if wanted and wanted != metadata.origin:
        raise ConfigError(
            f"MODEL.JIGSAW.ORIGIN is {wanted!r}, but the weights are {metadata.origin!r}: this "
            "config is a row of the paper's tables that starts from other weights"
        )
    network, use = metadata.network_config(), metadata.required_config()
    library = library_of((metadata.network or {}).get("backbone", ""))
    if library and library_of(cfg.MODEL.BACKBONE.NAME) != library:
        network["MODEL.BACKBONE.NAME"] = cfg.MODEL.BACKBONE.NAME.replace("resnet", library)
    if cfg.MODEL.JIGSAW.BACKBONE_FROM:  # it says what the network is
        network = {}
    is_scratch = metadata.origin == "scratch"
    goes_on = metadata.origin == detector.ORIGIN
    if goes_on:
        use[NORM] = metadata.architecture.norm
    if is_scratch:  # a norm that trains, nothing frozen; the user's input is as good as ours
        use = {k: v for k, v in use.items() if k not in explicit}
        use["MODEL.BACKBONE.FREEZE_AT"] = 0
        if cfg.MODEL.RESNETS.NORM in ("FrozenBN", ""):
            use[NORM] = cfg.MODEL.JIGSAW.SCRATCH_NORM
        if "MODEL.RESNETS.STRIDE_IN_1X1" not in explicit:
            use["MODEL.RESNETS.STRIDE_IN_1X1"] = False
    if cfg.MODEL.JIGSAW.NEW_OFFSETS and not any(metadata.architecture.deform_on_per_stage or ()):
        network.pop("MODEL.RESNETS.DEFORM_ON_PER_STAGE", None)
        # modulated: the zero offsets come with masks of sigmoid(0) = 1/2, no plain convolution
        network["MODEL.RESNETS.DEFORM_MODULATED"] = False
    conflicts = []
    for key, value in (network | use).items():
        have = get_key(cfg, key)
        # A frozen norm has the tensors of one that trains, and is still another.
        exact = key == NORM and (is_scratch or (goes_on and key not in explicit))
        trains = key in explicit and key.endswith(".FREEZE_NORM")  # as RESNETS.NORM BN says it
        if have == value or trains or (fits(key, have, value) and not exact):
            continue
        if (key in use or match_architecture) and key not in explicit:
            cfg.merge_from_list([key, value])
        else:
            conflicts.append(f"{key}: config {have}, weights {value}")
            if key.endswith("DEFORM_ON_PER_STAGE") and not any(value):
                conflicts[-1] += " (MODEL.JIGSAW.NEW_OFFSETS True starts the offsets at zero)"
    if conflicts and not force:
        raise ConfigError(
            f"config and weights contradict each other: {'; '.join(conflicts)}; leave the "
            "overrides out, or choose the config of the same network (finetune_net.py: --force "
            "insists on the config, --match-architecture takes the network from the weights)"
        )
    for conflict in conflicts:
        logger.warning("insisted on against the weights' metadata: %s", conflict)


def fit_machine(cfg: CfgNode) -> None:
    """On a machine without GPU: the CPU, no synchronised norm, no mixed precision; logged."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("no GPU here: MODEL.DEVICE cuda -> cpu")
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE != "cpu":
        return
    for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "RETINANET"):
        if "Sync" in cfg.MODEL[part].NORM:
            logger.warning("on a CPU: MODEL.%s.NORM %s -> BN", part, cfg.MODEL[part].NORM)
            cfg.MODEL[part].NORM = "BN"
    if cfg.SOLVER.AMP.ENABLED:
        logger.warning("on a CPU, where Detectron2 has none: SOLVER.AMP.ENABLED True -> False")
        cfg.SOLVER.AMP.ENABLED = False


def write_plain_config(path: str | Path, cfg: CfgNode, force: bool = False) -> None:
    """The same job as a config for Detectron2's own ``tools/train_net.py``, without our keys.

    Raises:
        ConfigError: ``path`` is in the way, or a key of ours without which it is another job.
    """
    check_free(path, force)
    ours = [key for key in _changes_of_ours(cfg) if not key.startswith(_DONE_BEFORE)]
    ours += ["INPUT.FORMAT"] * bool(channels_of(cfg.INPUT.FORMAT))
    if ours:
        raise ConfigError(
            f"{', '.join(ours)}: Detectron2's own script does not know such values; fine-tune with "
            "finetune_net.py"
        )
    changes = config_changes(get_cfg(), cfg)
    head = (
        "# For Detectron2's own tools/train_net.py --config-file THIS; written with the weights it "
        "names.\n# Register the datasets it names first, unless Detectron2 knows them.\n"
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, head + changes_yaml(changes | {"VERSION": 2}))


def _changes_of_ours(cfg: CfgNode) -> list[str]:
    """The keys that Detectron2 lacks, where ``cfg`` has other values than ``add_jigsaw_config``."""
    defaults = get_cfg()
    plain = dict(flatten(defaults))
    add_jigsaw_config(defaults)
    return [k for k, v in flatten(defaults) if k not in plain and get_key(cfg, k) != v]


def config_changes(before: CfgNode, after: CfgNode) -> dict[str, Any]:
    """{"A.B": value}: the plain values of ``before``'s keys that are others in ``after``."""
    now = dict(flatten(after))
    changed = {key: now[key] for key, old in flatten(before) if old != now[key]}
    return json.loads(json.dumps(changed))  # YAML knows lists, no tuples


def changes_yaml(changes: Mapping[str, Any]) -> str:
    """{"A.B": value} as a block that can be pasted into a config."""
    nested: dict[str, Any] = {}
    for key, value in changes.items():
        *nodes, last = key.split(".")
        functools.reduce(lambda node, part: node.setdefault(part, {}), nodes, nested)[last] = value
    return yaml.safe_dump(nested, sort_keys=True, default_flow_style=None)


def get_key(cfg: CfgNode, key: str) -> Any:
    """Value of a dotted key."""
    return functools.reduce(CfgNode.__getitem__, key.split("."), cfg)
