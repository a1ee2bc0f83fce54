"""Fine-tuning and evaluation of a detector, by Detectron2's own trainer and COCO evaluator."""

import json
import logging
import math
import re
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, default_setup, hooks
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, coco_evaluation
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from pycocotools import cocoeval
from pycocotools.coco import COCO
from torch import nn
from torch.optim import Optimizer

from jigsaw_d2.checkpoint import detector
from jigsaw_d2.checkpoint.loading import load_backbone
from jigsaw_d2.checkpoint.metadata import WeightsMetadata
from jigsaw_d2.data.arrays import make_reader
from jigsaw_d2.data.sources import register_coco_files
from jigsaw_d2.detection.array_mapper import ArrayMapper
from jigsaw_d2.detection.config import read_metadata
from jigsaw_d2.detection.data import check_registered
from jigsaw_d2.detection.kinds import build_evaluators, register_keypoints
from jigsaw_d2.detection.loader import ResumableLoader
from jigsaw_d2.detection.meter import ComputeMeter, CostLogHook, bare
from jigsaw_d2.engine.hooks import CheckpointHook
from jigsaw_d2.engine.interrupt import StopNotice
from jigsaw_d2.engine.launch import explained, lock_output
from jigsaw_d2.engine.optimizer import build_optimizer
from jigsaw_d2.engine.state import JigsawCheckpointer, get_random_state, set_random_state
from jigsaw_d2.io import RunError, write_text
from jigsaw_d2.modeling.backbones import unknown_explained

try:
    from faster_coco_eval.core.faster_eval_api import COCOeval
except ImportError:
    from pycocotools.cocoeval import COCOeval

logger = logging.getLogger(__name__)

METADATA_NAMES = ("weights_metadata.yaml", "passport.yaml")  # the second: version 1 of ours


def _coco_eval(truth: COCO, found: COCO, iou_type: str) -> object:
    """Of keypoints pycocotools', for the fast one takes no sets of pycocotools' there."""
    return (cocoeval.COCOeval if iou_type == "keypoints" else COCOeval)(truth, found, iou_type)


class FastCOCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator on faster-coco-eval (C++), or on pycocotools where that is absent."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """As Detectron2's, with ids above 0: a match with id 0 would count as none."""
        super().__init__(*args, **options)
        for number, entry in enumerate(self._coco_api.dataset.get("annotations", []), 1):
            entry["id"] = number
        if self._do_evaluation:
            self._coco_api.createIndex()

    def evaluate(self, img_ids: list[int] | None = None) -> dict[str, Any]:
        """Detectron2's metrics; the log says how long they took."""
        start = time.perf_counter()
        ours = {"COCOeval": _coco_eval, "COCOeval_opt": _coco_eval}  # no caller can choose it
        with mock.patch.multiple(coco_evaluation, **ours):
            results = super().evaluate(img_ids)
        seconds = time.perf_counter() - start
        logger.info("COCO's metrics by %s took %.2f s", COCOeval.__module__.split(".")[0], seconds)
        return results


class FinetuneTrainer(DefaultTrainer):
    """Detectron2's trainer; weights enter by the strict loader, AP is COCO's, per class too."""

    # False insists on weights that do not fit in every tensor
    strict = True
    origin = ""  # of MODEL.WEIGHTS

    def __init__(self, cfg: CfgNode) -> None:
        """As Detectron2's; checkpoints appear whole or not at all, a signal leaves one."""
        self._notice = StopNotice()
        super().__init__(cfg)
        model, trainer = self.checkpointer.model, weakref.proxy(self)
        self.checkpointer = JigsawCheckpointer(model, cfg.OUTPUT_DIR, trainer=trainer)
        self._device = next(model.parameters()).device

    def resume_or_load(self, resume: bool = True) -> None:
        """The last checkpoint of OUTPUT_DIR if ``resume`` and there is one, else MODEL.WEIGHTS."""
        if resume and self.checkpointer.has_checkpoint():
            rest = self.checkpointer.resume_or_load("", resume=True)
            self.start_iter = self._trainer.data_loader.start_iter = self.iter + 1
            states = rest.get("random_states", [])
            if len(states) == comm.get_world_size():
                mine = states[comm.get_rank()]
                self._trainer.data_loader.on_start = lambda: set_random_state(mine, self._device)
        elif self.origin == detector.ORIGIN:
            detector.load_detector(bare(self.model), self.cfg.MODEL.WEIGHTS, self.strict)
        elif self.cfg.MODEL.WEIGHTS:
            model, offsets = bare(self.model), self.cfg.MODEL.JIGSAW.NEW_OFFSETS
            load_backbone(model, self.cfg.MODEL.WEIGHTS, self.strict, new_offsets=offsets)
        else:
            logger.info("from scratch: every tensor is random")

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Detectron2's detector, unless it has no such one, e.g. C4 with a deformable res5."""
        try:
            with unknown_explained(cfg):
                return super().build_model(cfg)
        except AssertionError as error:
            raise RunError(f"Detectron2 cannot build this detector: {error}") from error

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """Detectron2's SGD, or as the pre-training's by SOLVER.OPTIMIZER and LAYER_DECAY."""
        is_plain = cfg.SOLVER.OPTIMIZER == "SGD" and cfg.SOLVER.LAYER_DECAY == 1
        return super().build_optimizer(cfg, model) if is_plain else build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> ResumableLoader:
        """Detectron2's batches, which a resumed run goes on with; of arrays by INPUT.FORMAT."""
        return ResumableLoader(cfg, ArrayMapper(cfg, is_train=True) if make_reader(cfg) else None)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict[str, Any]]]:
        """Detectron2's, of arrays where INPUT.FORMAT says so."""
        mapper = ArrayMapper(cfg, is_train=False) if make_reader(cfg) else None
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's, but for checkpoints; the cost log's first, as it counts steps alone."""
        period, eval_period = self.cfg.SOLVER.CHECKPOINT_PERIOD, self.cfg.TEST.EVAL_PERIOD
        replaced = (hooks.PeriodicCheckpointer, hooks.EvalHook, hooks.PeriodicWriter)
        made = super().build_hooks()
        return [
            CostLogHook(),
            *(hook for hook in made if not isinstance(hook, replaced)),
            CheckpointHook(period, self._notice, eval_period),
            hooks.EvalHook(eval_period, self._evaluate),
            *(hook for hook in made if isinstance(hook, hooks.PeriodicWriter)),
        ]

    def train(self) -> None:
        """Run to SOLVER.MAX_ITER and evaluate; a notice to stop is heeded until then."""
        with self._notice:
            super().train()

    def save_checkpoint(self, name: str) -> None:
        """Write ``name``.pth, with the random states of every rank, which all must call it."""
        states = comm.all_gather(get_random_state(self._device))
        if comm.is_main_process():
            state = {"trainer": self.state_dict(), "iteration": self.iter}
            self.checkpointer.save(name, **state, random_states=states)

    def state_dict(self) -> dict[str, Any]:
        """With the optimizer's state, which Detectron2 0.6 forgets."""
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of a checkpoint that Detectron2 0.6 wrote, without it."""
        super().load_state_dict(state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])

    def _evaluate(self) -> dict[str, Any]:
        with self._notice.evaluating(self._device):
            self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results

    def run_step(self) -> None:
        """One step of Detectron2's.

        Raises:
            RunError: the losses, or the boxes that were found, are not finite any more.
        """
        try:
            super().run_step()
        except (FloatingPointError, AssertionError) as error:
            text = " ".join(str(error).split())
            if isinstance(error, AssertionError) and "infinite or NaN" not in text:
                raise
            bad = re.findall(r"'(\w+)': (?:np\.float64\()?(?:nan|-?inf)", text)
            raise RunError(
                f"iteration {self.iter}: the detector diverged: "
                f"{', '.join(bad) + ' not finite' if bad else text}; nothing was updated. Start "
                f"again in another OUTPUT_DIR with a lower SOLVER.BASE_LR (now "
                f"{self.cfg.SOLVER.BASE_LR:g}), a longer SOLVER.WARMUP_ITERS or "
                f"SOLVER.CLIP_GRADIENTS.ENABLED True; here, {self.checkpointer.last_whole()}"
            ) from None

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, folder: str = "") -> DatasetEvaluator:
        """Of the set's kind; of COCO_FILES COCO's for boxes and what else the detector has."""
        output = Path(cfg.OUTPUT_DIR) / (folder or "inference")
        return build_evaluators(cfg, dataset_name, str(output), FastCOCOEvaluator)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """Evaluate on ``cfg.DATASETS.TEST``, and book what it cost."""
        with ComputeMeter(model, cfg.OUTPUT_DIR, "evaluation") as meter:
            results = super().test(cfg, model, evaluators)
        meter.book()
        return results

    @classmethod
    def test_all_scales(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate with test-time augmentation, TEST.AUG (Fig. 8, "ms test"); keys end in _TTA."""
        model = GeneralizedRCNNWithTTA(cfg, bare(model))
        evaluators = [cls.build_evaluator(cfg, name, "inference_TTA") for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, model, evaluators)
        return OrderedDict((f"{task}_TTA", values) for task, values in results.items())


def finetune(
    cfg: CfgNode, *, resume: bool = False, eval_only: bool = False, force: bool = False
) -> dict[str, Any]:
    """Train a detector as ``cfg`` says and evaluate it; every rank calls this.

    OUTPUT_DIR receives what Detectron2 users expect, ``results.json`` and the weights' metadata.

    Args:
        cfg: of ``setup_finetune``.
        resume: go on with the run in OUTPUT_DIR.
        eval_only: evaluate the last checkpoint in OUTPUT_DIR, without training.
        force: insist on weights that do not fit the backbone in every tensor.

    Returns:
        {"bbox": {"AP": ..., "AP50": ..., "AP-<class>": ...}, ...}; with several test sets, one such
        dict per set; {} on ranks other than the first.

    Raises:
        RunError: a run is in OUTPUT_DIR, or none to go on with; Detectron2 lacks what is asked.
        JigsawError: weights, config or data that do not fit.
    """
    with lock_output(cfg.OUTPUT_DIR, eval_only), explained(cfg.SOLVER.PEER_TIMEOUT):
        return _finetune(cfg, resume, eval_only, force)


def _finetune(cfg: CfgNode, resume: bool, eval_only: bool, force: bool) -> dict[str, Any]:
    register_coco_files(cfg)
    register_keypoints(cfg)
    metadata, output = read_metadata(cfg.MODEL.WEIGHTS), Path(cfg.OUTPUT_DIR)
    if comm.is_main_process():
        _check_output(output, metadata, resume or eval_only)
        check_registered(cfg)
    comm.synchronize()
    if cfg.TEST.AUG.ENABLED and cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        raise RunError(
            f"TEST.AUG.ENABLED: Detectron2 tests {cfg.MODEL.META_ARCHITECTURE} at one scale only; "
            "set it to False, or choose a Faster or Mask R-CNN"
        )
    setup_logger(str(output), comm.get_rank(), name="jigsaw_d2", abbrev_name="jigsaw")
    cfg = _settle_seed(cfg, resume or eval_only)
    default_setup(cfg, SimpleNamespace(config_file="", eval_only=eval_only, resume=resume))
    if comm.is_main_process():
        write_text(output / METADATA_NAMES[0], metadata.to_yaml())
    if eval_only:
        model = FinetuneTrainer.build_model(cfg)
        checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR)
        if not checkpointer.has_checkpoint():
            raise RunError(f"{output} holds no checkpoint to evaluate")
        checkpointer.resume_or_load("", resume=True)
        results = dict(FinetuneTrainer.test(cfg, model))
    else:
        trainer = FinetuneTrainer(cfg)
        trainer.strict, trainer.origin = not force, metadata.origin
        trainer.resume_or_load(resume=resume)
        trainer.train()
        model, results = trainer.model, dict(getattr(trainer, "_last_eval_results", None) or {})
    if cfg.TEST.AUG.ENABLED and cfg.DATASETS.TEST:
        results.update(FinetuneTrainer.test_all_scales(cfg, model))
    if not comm.is_main_process():
        return {}
    if results:
        write_text(output / "results.json", json.dumps(_finite(results), indent=1) + "\n")
    return results


def _settle_seed(cfg: CfgNode, resume: bool) -> CfgNode:
    """A SEED below 0 becomes that of the run that is there, or a new one; alike on all ranks."""
    if cfg.SEED >= 0:
        return cfg
    seed, path = comm.shared_random_seed(), Path(cfg.OUTPUT_DIR) / "config.yaml"
    if resume and path.is_file():
        earlier = re.search(r"^SEED: (\d+)$", path.read_text(), re.MULTILINE)
        seed = int(earlier[1]) if earlier else seed
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    cfg.freeze()
    return cfg


def _check_output(folder: Path, metadata: WeightsMetadata, resume: bool) -> None:
    """Whether OUTPUT_DIR is free, or holds the run that is to be resumed."""
    started = (folder / "last_checkpoint").is_file() or (folder / "metrics.json").is_file()
    if started and not resume:
        raise RunError(
            f"{folder} holds a run already: --resume continues it, another OUTPUT_DIR starts anew"
        )
    for earlier in (folder / name for name in METADATA_NAMES):
        if started and earlier.is_file():
            said = WeightsMetadata.from_yaml(earlier.read_text(), str(earlier))
            if said.digest != metadata.digest:
                raise RunError(
                    f"{folder} was started from other weights ({earlier}); resume with the same "
                    "--weights"
                )


def _finite(value: Any) -> Any:
    """JSON has no NaN; a metric that could not be computed becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
