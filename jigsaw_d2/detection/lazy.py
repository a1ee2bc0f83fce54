"""Fine-tuning by Detectron2's LazyConfigs: ``--config-file X.py model.backbone... = value``.

A LazyConfig knows nothing of weights' metadata: loaded by Detectron2's checkpointer, a file fills
every tensor and still sees BGR at std 1 through another stride. Here the metadata is applied to the
model's and the mappers' nodes, and the backbone loaded strictly.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import AMPTrainer, SimpleTrainer, create_ddp_model, default_writers, hooks
from detectron2.engine.defaults import default_setup
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, ListConfig, OmegaConf

from jigsaw_d2.checkpoint.loading import load_backbone
from jigsaw_d2.checkpoint.metadata import WeightsMetadata
from jigsaw_d2.data.sources import register_coco_files
from jigsaw_d2.detection.config import read_metadata
from jigsaw_d2.io import ConfigError, RunError, write_text
from jigsaw_d2.modeling.lazy import nodes, read_lazy_config

logger = logging.getLogger(__name__)


def load_lazy_config(
    path: str,
    weights: str | Path,
    overrides: Sequence[str] = (),
    force: bool = False,
    read: DictConfig | None = None,
) -> DictConfig:
    """The config in ``path``, or of that name in the zoo, with what ``weights`` require.

    Args:
        overrides: KEY=VALUE as Detectron2's lazyconfig_train_net.py takes them; besides,
            DATASETS.COCO_FILES='[["mine","train.json","images"]]' registers such sets.
        force: an override wins where it contradicts the weights.
        read: it has been read already; changed in place.

    Raises:
        ConfigError: no such config, or an override that contradicts the weights, with both.
    """
    cfg = read_lazy_config(path, overrides, read)
    if "model" not in cfg or "dataloader" not in cfg or "train" not in cfg:
        raise ConfigError(f"{path}: no model, dataloader and train in this LazyConfig")
    metadata = read_metadata(weights)
    if metadata.origin == "scratch":
        raise ConfigError(
            f"{path}: --weights none is for YAML configs, whose norms are made to train; give this "
            "LazyConfig norms that train and use Detectron2's own lazyconfig_train_net.py"
        )
    explicit = {override.lstrip("+").partition("=")[0] for override in overrides}
    apply_metadata(cfg, metadata, explicit, force)
    cfg.train.init_checkpoint = str(Path(weights).resolve())
    if "DATASETS" in cfg:
        files = OmegaConf.to_container(cfg.DATASETS.COCO_FILES)
        register_coco_files(SimpleNamespace(DATASETS=SimpleNamespace(COCO_FILES=files)))
        _fit_classes(cfg, explicit)
    return cfg


def write_plain_config(
    output: str, path: str, weights: str, overrides: Sequence[str] = (), force: bool = False
) -> str:
    """Write ``load_lazy_config``'s changes of ``path`` for Detectron2's own script; returns them.

    The written file is a LazyConfig, loads ``path`` and registers the sets of DATASETS.COCO_FILES.
    """
    cfg = read_lazy_config(path)
    before = OmegaConf.to_container(cfg, resolve=False)
    load_lazy_config(path, weights, overrides, force, cfg)
    sets = OmegaConf.to_container(cfg.pop("DATASETS", OmegaConf.create({"COCO_FILES": []})))
    changes = "\n".join(_assignments(before, OmegaConf.to_container(cfg, resolve=False)))
    lines = ["# For Detectron2's own tools/lazyconfig_train_net.py --config-file THIS."]
    if Path(path).is_file():
        lines += ["from detectron2.config import LazyConfig"]
        lines += [f"_cfg = LazyConfig.load({str(Path(path).resolve())!r})"]
    else:
        lines += ["from detectron2 import model_zoo", f"_cfg = model_zoo.get_config({path!r})"]
    for set_name, *files in sets["COCO_FILES"]:
        places = ", ".join(repr(str(Path(file).resolve())) for file in files)
        lines += ["from detectron2.data.datasets import register_coco_instances"]
        lines += [f"register_coco_instances({set_name!r}, {{}}, {places})"]
    lines += [f"{key} = _cfg[{key!r}]" for key in before]
    write_text(output, "\n".join([*lines, changes]) + "\n")
    return changes


def _assignments(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """Lines of Python that make plain values ``before`` those of ``after``."""
    if before == after:
        return
    kinds, pairs = {type(before), type(after)}, []
    if kinds == {dict}:
        yield from (f"del {place}[{key!r}]" for key in before if key not in after)
        pairs = [(key, before.get(key, ...), after[key]) for key in after]
    elif kinds == {list} and len(before) == len(after) and any(type(v) is dict for v in after):
        pairs = [(i, *values) for i, values in enumerate(zip(before, after))]
    else:
        yield f"{place} = {after!r}"
    for key, *values in pairs:
        below = f"{place}.{key}".lstrip(".") if str(key).isidentifier() else f"{place}[{key!r}]"
        yield from _assignments(*values, below)


def _fit_machine(cfg: DictConfig) -> None:
    """On a machine without GPU: the CPU, no synchronised norm, no mixed precision; logged."""
    if str(cfg.train.device).startswith("cuda") and not torch.cuda.is_available():
        logger.warning("no GPU here: train.device cuda -> cpu, without synchronised norms and AMP")
        cfg.train.device, cfg.train.amp.enabled = "cpu", False
        for node, _ in nodes(cfg.model):
            if "Sync" in str(node.get("norm", "")):
                node.norm = "BN"


def apply_metadata(
    cfg: DictConfig, metadata: WeightsMetadata, explicit: set[str], force: bool = False
) -> None:
    """Set channels, mean, std, stride and norm, in place; ``explicit`` keys are the user's.

    Raises:
        ConfigError: an explicit value that contradicts them, unless ``force``.
    """
    architecture, wanted = metadata.architecture, {}
    wanted["model.input_format"] = metadata.input_format
    wanted["model.pixel_mean"] = list(metadata.pixel_mean)
    wanted["model.pixel_std"] = list(metadata.pixel_std)
    for split in ("train", "test"):
        wanted[f"dataloader.{split}.mapper.image_format"] = metadata.input_format
    for node, place in nodes(cfg.model):
        target = node.get("_target_", "")
        home = str(getattr(target, "__module__", target))
        if not architecture.is_resnet or "backbone.resnet" not in home:
            continue
        if architecture.depth in (18, 34):
            node.pop("stride_in_1x1", None)  # basic blocks, which have no 1x1, refuse the word
        elif "stride_in_1x1" in node:
            wanted[f"model.{place}.stride_in_1x1"] = architecture.stride_in_1x1
        if "norm" in node:
            norm = "FrozenBN" if architecture.norm == "BN" else architecture.norm
            wanted[f"model.{place}.norm"] = norm
    conflicts = []
    for key, value in wanted.items():
        node, _, last = key.rpartition(".")
        holder = OmegaConf.select(cfg, node)
        if holder is None or last not in holder:  # FCOS does not say its input_format
            continue
        have = holder.get(last)
        have = list(have) if isinstance(have, ListConfig) else have
        if key in explicit and have != value:
            conflicts.append(f"{key}: config {have}, weights {value}")
        elif key not in explicit:
            holder[last] = value
    if conflicts and not force:
        raise ConfigError(f"config and weights contradict each other: {'; '.join(conflicts)}")


def build(cfg: DictConfig, place: str, path: str) -> Any:
    """What ``place``, such as "model", says in a LazyConfig that was read from ``path``.

    Raises:
        ConfigError: its program fails.
    """
    try:
        return instantiate(OmegaConf.select(cfg, place))
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{path}: its {place} cannot be built: {said}") from error


def finetune(
    path: str,
    weights: str,
    overrides: Sequence[str],
    *,
    resume: bool = False,
    eval_only: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Train and evaluate, as Detectron2's lazyconfig_train_net.py; every rank calls this.

    Raises:
        RunError: a run is in ``train.output_dir`` that was not to be resumed.
        JigsawError: weights or config that do not fit.
    """
    cfg = load_lazy_config(path, weights, overrides, force)
    _fit_machine(cfg)
    output = Path(cfg.train.output_dir)
    if (output / "last_checkpoint").is_file() and not (resume or eval_only):
        raise RunError(f"{output} holds a run: --resume continues it, another folder starts anew")
    setup_logger(str(output), comm.get_rank(), name="jigsaw_d2", abbrev_name="jigsaw")
    default_setup(cfg, SimpleNamespace(config_file="", eval_only=eval_only, resume=resume))
    model = build(cfg, "model", path).to(cfg.train.device)
    checkpointer = DetectionCheckpointer(model, str(output))
    resume = resume and checkpointer.has_checkpoint()
    if eval_only:
        if not checkpointer.has_checkpoint():
            raise RunError(f"{output} holds no checkpoint to evaluate")
        checkpointer.resume_or_load("", resume=True)
        return evaluate(cfg, model, path)
    if not resume:
        load_backbone(model, weights, not force)
    cfg.optimizer.params.model = model
    optimizer, loader = build(cfg, "optimizer", path), build(cfg, "dataloader.train", path)
    model = create_ddp_model(model, **cfg.train.ddp)
    kind = AMPTrainer if cfg.train.amp.enabled else SimpleTrainer
    trainer = kind(model, loader, optimizer)
    checkpointer = DetectionCheckpointer(model, str(output), trainer=trainer)
    is_main, period = comm.is_main_process(), cfg.train.log_period
    made = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=build(cfg, "lr_multiplier", path)),
        hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if is_main else None,
        hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, model, path)),
    ]
    if is_main:
        made.append(hooks.PeriodicWriter(default_writers(str(output), cfg.train.max_iter), period))
    trainer.register_hooks(made)
    start = 0
    if resume:
        checkpointer.resume_or_load("", resume=True)
        start = trainer.iter + 1
    try:
        trainer.train(start, cfg.train.max_iter)
    except FloatingPointError as error:
        raise RunError(
            f"the detector diverged: {' '.join(str(error).split())}; start again in another "
            "train.output_dir with a lower optimizer.lr"
        ) from error
    return dict(getattr(trainer, "_last_eval_results", None) or {})


def _fit_classes(cfg: DictConfig, explicit: set[str]) -> None:
    """Set the number of classes to that of the training set of DATASETS.COCO_FILES.

    Raises:
        ConfigError: there is no such set, or the user said another number.
    """
    names = cfg.dataloader.train.dataset.names
    name = names if isinstance(names, str) else names[0]
    if name not in DatasetCatalog.list():
        raise ConfigError(
            f"dataloader.train.dataset.names: no set {name!r} is registered; DATASETS.COCO_FILES "
            f"has {', '.join(entry[0] for entry in cfg.DATASETS.COCO_FILES)}"
        )
    DatasetCatalog.get(name)  # Detectron2 learns the classes while it reads the json
    classes = MetadataCatalog.get(name).thing_classes
    for place in ("model", "model.roi_heads"):
        node, key = OmegaConf.select(cfg, place), f"{place}.num_classes"
        if node is None or "num_classes" not in node:
            continue
        if key in explicit and node.num_classes != len(classes):
            said = f"{key}: config {node.num_classes}, dataset {name} has {len(classes)}"
            raise ConfigError(f"{said}: {', '.join(classes)}")
        node.num_classes = len(classes)


def evaluate(cfg: DictConfig, model: torch.nn.Module, path: str) -> dict[str, Any]:
    """Metrics of the config's own evaluator on its test set."""
    loader = build(cfg, "dataloader.test", path)
    results = inference_on_dataset(model, loader, build(cfg, "dataloader.evaluator", path))
    print_csv_format(results)
    return results
