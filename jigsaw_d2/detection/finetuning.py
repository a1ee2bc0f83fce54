"""Fine-tuning and evaluation of a detector, by Detectron2's own trainer and COCO evaluator."""

import json
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, default_setup
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.modeling import GeneralizedRCNN, GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from jigsaw_d2.data.sources import register_coco_files
from jigsaw_d2.detection.detection_data import check_annotations
from jigsaw_d2.detection.detector_compute import (
    LedgerHook,
    counted_images,
    record_compute,
    unwrapped,
)
from jigsaw_d2.detection.finetune_config import read_passport
from jigsaw_d2.errors import JigsawError
from jigsaw_d2.weights.backbone_loading import load_backbone
from jigsaw_d2.weights.passport import Passport
from jigsaw_d2.weights.weight_files import write_text

logger = logging.getLogger(__name__)

RESULTS_NAME = "results.json"
PASSPORT_NAME = "passport.yaml"


class FinetuneError(JigsawError, RuntimeError):
    """A run that must not start: its folder holds another one, or it asks the impossible."""


class FinetuneTrainer(DefaultTrainer):
    """Detectron2's trainer; weights enter by the strict loader, AP is COCO's, per class too."""

    def __init__(self, cfg: CfgNode, *, partial: bool = False) -> None:
        """
        Args:
            cfg: of ``setup_finetune``.
            partial: insist on weights that do not fit the backbone in every tensor.
        """
        super().__init__(cfg)
        self._partial = partial

    def resume_or_load(self, resume: bool = True) -> None:
        """The last checkpoint of OUTPUT_DIR if ``resume`` and there is one, else MODEL.WEIGHTS.

        Raises:
            BackboneMismatchError: see ``load_backbone``.
        """
        if resume and self.checkpointer.has_checkpoint():
            super().resume_or_load(resume=True)
        elif self.cfg.MODEL.WEIGHTS:
            load_backbone(
                unwrapped(self.model),
                self.cfg.MODEL.WEIGHTS,
                new_offsets=self.cfg.MODEL.JIGSAW.NEW_OFFSETS,
                partial=self._partial,
            )
        else:
            logger.info("from scratch: every tensor is random")

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Detectron2's detector.

        Raises:
            FinetuneError: Detectron2 has no such combination, e.g. C4 with a deformable res5.
        """
        try:
            return super().build_model(cfg)
        except AssertionError as error:
            raise FinetuneError(f"Detectron2 cannot build this detector: {error}") from error

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's, and the ledger of compute."""
        return [*super().build_hooks(), LedgerHook(self.cfg.OUTPUT_DIR)]

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, folder: str = "") -> DatasetEvaluator:
        """COCO's metrics for boxes and, where the detector has them, masks."""
        output = Path(cfg.OUTPUT_DIR) / (folder or "inference")
        return COCOEvaluator(dataset_name, output_dir=str(output))

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """Evaluate on ``cfg.DATASETS.TEST``, and enter its compute into the ledger."""
        start = time.perf_counter()
        with counted_images(model, training=False) as count:
            results = super().test(cfg, model, evaluators)
        record_compute(cfg.OUTPUT_DIR, "evaluation", count, time.perf_counter() - start, forwards=1)
        return results

    @classmethod
    def test_all_scales(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate with test-time augmentation, TEST.AUG (Fig. 8, "ms test"); keys end in _TTA."""
        model = GeneralizedRCNNWithTTA(cfg, unwrapped(model))
        evaluators = [cls.build_evaluator(cfg, name, "inference_TTA") for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, model, evaluators)
        return OrderedDict((f"{task}_TTA", values) for task, values in results.items())


def finetune(
    cfg: CfgNode, *, resume: bool = False, eval_only: bool = False, force: bool = False
) -> dict[str, Any]:
    """Train a detector as ``cfg`` says and evaluate it; every rank calls this.

    OUTPUT_DIR receives what Detectron2 users expect, and ``results.json`` and ``passport.yaml``.

    Args:
        cfg: of ``setup_finetune``.
        resume: go on with the run in OUTPUT_DIR.
        eval_only: evaluate the last checkpoint in OUTPUT_DIR, without training.
        force: insist on weights that do not fit the backbone in every tensor.

    Returns:
        {"bbox": {"AP": ..., "AP50": ..., "AP-<class>": ...}, ...}; with several test sets, one such
        dict per set; {} on ranks other than the first.

    Raises:
        FinetuneError: OUTPUT_DIR holds a run and ``resume`` is False, or none and it must.
        JigsawError: weights, config or data that do not fit.
    """
    register_coco_files(cfg)
    passport = read_passport(cfg.MODEL.WEIGHTS)
    if comm.is_main_process():
        check_output(cfg, passport, resume or eval_only)
    comm.synchronize()
    _check_multi_scale(cfg)
    if not eval_only:
        check_annotations(cfg)
    setup_logger(
        cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="jigsaw_d2", abbrev_name="jigsaw"
    )
    default_setup(cfg, SimpleNamespace(config_file="", eval_only=eval_only, resume=resume))
    if comm.is_main_process():
        write_text(Path(cfg.OUTPUT_DIR) / PASSPORT_NAME, passport.to_yaml(), force=True)
    model, results = _evaluate(cfg) if eval_only else _train(cfg, resume, partial=force)
    if cfg.TEST.AUG.ENABLED and cfg.DATASETS.TEST:
        results.update(FinetuneTrainer.test_all_scales(cfg, model))
    if not comm.is_main_process():
        return {}
    if results:
        text = json.dumps(_finite(results), indent=1)
        write_text(Path(cfg.OUTPUT_DIR) / RESULTS_NAME, text + "\n", force=True)
    return results


def check_output(cfg: CfgNode, passport: Passport, resume: bool) -> None:
    """Whether OUTPUT_DIR is free, or holds the run that is to be resumed.

    Raises:
        FinetuneError: neither.
    """
    folder = Path(cfg.OUTPUT_DIR)
    started = (folder / "last_checkpoint").is_file() or (folder / "metrics.json").is_file()
    if started and not resume:
        raise FinetuneError(
            f"{folder} holds a run already: --resume continues it, another OUTPUT_DIR starts anew"
        )
    earlier = folder / PASSPORT_NAME
    if started and earlier.is_file():
        digest = Passport.from_yaml(earlier.read_text(), str(earlier)).digest
        if digest != passport.digest:
            raise FinetuneError(
                f"{folder} was started from other weights ({earlier}: digest "
                f"{digest[:12] or 'none'}, now {passport.digest[:12] or 'none'}); resume with the "
                "same --weights"
            )


def _train(cfg: CfgNode, resume: bool, partial: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The trained detector and its last evaluation."""
    trainer = FinetuneTrainer(cfg, partial=partial)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer.model, dict(getattr(trainer, "_last_eval_results", None) or {})


def _evaluate(cfg: CfgNode) -> tuple[nn.Module, dict[str, Any]]:
    """The detector of OUTPUT_DIR's last checkpoint and its evaluation."""
    model = FinetuneTrainer.build_model(cfg)
    checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR)
    if not checkpointer.has_checkpoint():
        raise FinetuneError(f"{cfg.OUTPUT_DIR} holds no checkpoint to evaluate")
    checkpointer.resume_or_load("", resume=True)
    return model, dict(FinetuneTrainer.test(cfg, model))


def _check_multi_scale(cfg: CfgNode) -> None:
    if cfg.TEST.AUG.ENABLED and cfg.MODEL.META_ARCHITECTURE != GeneralizedRCNN.__name__:
        raise FinetuneError(
            f"TEST.AUG.ENABLED: Detectron2 tests {cfg.MODEL.META_ARCHITECTURE} at one scale only; "
            "set it to False, or choose a Faster or Mask R-CNN"
        )


def _finite(value: Any) -> Any:
    """JSON has no NaN; a metric that could not be computed becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
