"""Pre-training in Detectron2's engine: the paper's schedule, hooks, checkpoints, exact resume.

One iteration is one optimiser step on IMS_PER_BATCH Jigsaw images (Sec. 4.1).
"""

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
)
from torch import nn

from jigsaw_d2.checkpoint.loading import load_backbone
from jigsaw_d2.cost import CostLog, backbone_macs, device_name
from jigsaw_d2.data.build import build_jigsaw_eval_loader, build_jigsaw_train_loader
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.engine.erf_refresh import build_erf_refresh_hook
from jigsaw_d2.engine.hooks import (
    CheckpointHook,
    ContinueHook,
    MeterHook,
    MeterPrinter,
    WriterHook,
)
from jigsaw_d2.engine.interrupt import StopNotice
from jigsaw_d2.engine.lr_schedule import build_lr_scheduler
from jigsaw_d2.engine.optimizer import build_optimizer
from jigsaw_d2.engine.precision import Precision, configure_backends
from jigsaw_d2.engine.replay import save_step
from jigsaw_d2.engine.run_config import open_store, resolve_config, warn_of_changes
from jigsaw_d2.engine.state import (
    JigsawCheckpointer,
    average_statistics,
    check_same_start,
    collect_state,
    restore_state,
    truncate_metrics,
)
from jigsaw_d2.engine.train_step import Batch, TrainStep
from jigsaw_d2.evaluation import JigsawEvaluator
from jigsaw_d2.io import CheckpointError, RunError
from jigsaw_d2.modeling.activation_checkpointing import checkpoint_activations
from jigsaw_d2.modeling.backbones import unknown_explained
from jigsaw_d2.modeling.meta_arch import JigsawPretrainer
from jigsaw_d2.modeling.trainable import check_trainable, set_aside_unused

logger = logging.getLogger(__name__)


class JigsawTrainer(DefaultTrainer):
    """DefaultTrainer whose data are Jigsaw images and whose runs can be killed and resumed exactly.

    Attributes:
        store: the samples of DATASETS.TRAIN.
        cost_log: of OUTPUT_DIR.
        resumed: after a resume, what the hooks continue from; else empty.
    """

    def __init__(
        self, cfg: CfgNode, store: SampleStore | None = None, explicit: Sequence[str] = ()
    ) -> None:
        """
        Args:
            cfg: resolved here if it is not yet, see ``run_config.resolve_config``.
            store: opened from DATASETS.TRAIN by default.
            explicit: keys that the user has set.
        """
        # TrainerBase's: DefaultTrainer's own would build the loader before the iteration to start
        # from is known, and a scaler that CPUs do not have.
        super(DefaultTrainer, self).__init__()
        self.store = store or open_store(cfg)
        self.cfg = cfg = resolve_config(cfg, self.store, comm.get_world_size(), explicit)
        configure_backends(cfg)
        model = self.build_model(cfg)
        check_trainable(model)
        set_aside_unused(model)
        self.device = device = model.device
        size, bottom_up = cfg.INPUT.JIGSAW.TEMPLATE_SIZE, getattr(model.backbone, "bottom_up", None)
        size = (*size, len(cfg.MODEL.PIXEL_MEAN))
        self._macs = backbone_macs(model.backbone, *size)
        self._pyramid_macs = self._macs - backbone_macs(bottom_up, *size) if bottom_up else 0
        self.cost_log = CostLog(cfg.OUTPUT_DIR, device_name(device), writes=comm.is_main_process())
        if cfg.MODEL.JIGSAW.ACTIVATION_CHECKPOINTING:
            checkpoint_activations(model.backbone)
        if cfg.MODEL.JIGSAW.COMPILE:
            model.backbone.compile()
        optimizer = self.build_optimizer(cfg, model)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        # No device_ids: with them DDP copies each batch once more, and waits for that.
        parallel = create_ddp_model(
            model, broadcast_buffers=False, device_ids=None, gradient_as_bucket_view=True
        )
        precision = Precision.from_config(cfg)
        logger.info("computing in %s on %s", precision.dtype or torch.float32, self.cost_log.device)
        self._trainer = TrainStep(parallel, optimizer, precision, cfg.SOLVER.ACCUMULATION_STEPS)
        self._trainer.model.train()
        self.checkpointer = JigsawCheckpointer(model, cfg.OUTPUT_DIR)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.resumed: dict[str, Any] = {}
        self._notice = StopNotice()
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: CfgNode) -> JigsawPretrainer:
        """The registered META_ARCHITECTURE, on MODEL.DEVICE."""
        with unknown_explained(cfg):
            return super().build_model(cfg)

    build_optimizer = staticmethod(build_optimizer)
    build_lr_scheduler = staticmethod(build_lr_scheduler)

    @classmethod
    def build_train_loader(
        cls, cfg: CfgNode, start_iter: int = 0, store: SampleStore | None = None
    ) -> Iterable[Batch]:
        """Endless batches of this rank, from iteration ``start_iter`` on."""
        rank, size = comm.get_rank(), comm.get_world_size()
        return build_jigsaw_train_loader(
            cfg, rank=rank, world_size=size, start_iter=start_iter, store=store
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str | list[str]) -> Iterable[Batch]:
        """This rank's share of INPUT.JIGSAW.EVAL_IMAGES images from the store(s)."""
        rank, size = comm.get_rank(), comm.get_world_size()
        return build_jigsaw_eval_loader(cfg, dataset_name, rank=rank, world_size=size)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str | list[str]) -> DatasetEvaluator:
        """Accuracies per region and class, named by the store's categories."""
        return JigsawEvaluator(SampleStore(dataset_name).categories)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> OrderedDict:
        """Metrics on the held-out samples of DATASETS.TEST (its stores are parts of one set)."""
        if not cfg.DATASETS.TEST:
            return OrderedDict()
        stores = list(cfg.DATASETS.TEST)
        evaluator = evaluators[0] if evaluators else cls.build_evaluator(cfg, stores)
        # Compiled code is for training alone: in evaluation the last batch has another size.
        with Precision.from_config(cfg).autocast(), torch.compiler.set_stance("force_eager"):
            results = inference_on_dataset(model, cls.build_test_loader(cfg, stores), evaluator)
        if comm.is_main_process():
            print_csv_format(results)
        return OrderedDict(results)

    def build_hooks(self) -> list[HookBase]:
        """In the order of the work around a step."""
        cfg, model = self.cfg, self.checkpointer.model
        made = [
            hooks.IterationTimer(),
            MeterHook(self._macs, self._pyramid_macs),
            hooks.LRScheduler(),
            build_erf_refresh_hook(cfg, model, self.store, self._macs),
            CheckpointHook(cfg.SOLVER.CHECKPOINT_PERIOD, self._notice, cfg.TEST.EVAL_PERIOD),
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate),
        ]
        if comm.is_main_process():
            made.append(WriterHook())
        return [*made, ContinueHook()]

    def build_writers(self) -> list[EventWriter]:
        """Console, metrics.json and TensorBoard, without what a resumed run will write again."""
        folder = Path(self.cfg.OUTPUT_DIR)
        folder.mkdir(parents=True, exist_ok=True)  # 0.6's writers make it, later ones do not
        metrics = folder / "metrics.json"
        dropped = truncate_metrics(metrics, self.start_iter)
        if dropped:
            logger.info(
                "dropped %d lines of %s from iteration %d on", dropped, metrics, self.start_iter
            )
        board = TensorboardXWriter(str(folder), purge_step=self.start_iter)
        printers = [CommonMetricPrinter(self.max_iter), MeterPrinter(self.device)]
        return [*printers, JSONWriter(str(metrics)), board]

    def train(self) -> OrderedDict | None:
        """Run to SOLVER.MAX_ITER; returns the last evaluation's metrics on the main process.

        Raises:
            RunError: with the iteration, the sample ids and the file to replay.
        """
        loader = self.build_train_loader(self.cfg, start_iter=self.start_iter, store=self.store)
        self._trainer.feed(loader)
        with self._notice:
            super().train()
        return getattr(self, "_last_eval_results", None) if comm.is_main_process() else None

    def run_step(self) -> None:
        """One optimiser step; its scalars go to the storage."""
        scalars = self._trainer.run(self._stop_on_bad_loss)
        self.storage.put_scalars(**scalars)

    def _stop_on_bad_loss(self, scalars: dict[str, float], own: dict[str, float]) -> None:
        loss = own["total_loss"]
        said = "" if math.isfinite(loss) else self._keep_step(loss)
        # All wait until every step is kept: the first rank that ends takes the others with it.
        said = [text for text in comm.all_gather(said) if text] or [
            "it is their sum that overflows"
        ]
        raise RunError(f"iteration {self.iter}: {'; '.join(said)}")

    def _keep_step(self, loss: float) -> str:
        """Write what ``--replay`` repeats; what to tell about it."""
        path = Path(self.cfg.OUTPUT_DIR) / f"replay_{self.iter:07d}_rank{comm.get_rank()}.pth"
        try:
            save_step(path, self.cfg, self._trainer, self.checkpointer.model, self.iter, loss)
            kept = f"Repeat the step with train_net.py --replay {path}"
        except OSError as error:
            kept = f"The step could not be kept ({error})"
        ids = [row for batch in self._trainer.batches for row in batch["sample_ids"].tolist()]
        return (
            f"the loss is {loss}; nothing was updated. {kept}; "
            f"sample ids R1..R4 of its images: {ids[:8]}{' ... (all in the file)' * (len(ids) > 8)}"
        )

    def save_checkpoint(self, name: str) -> None:
        """Write ``name``.pth; every rank must call it."""
        average_statistics(self.checkpointer.model)
        state = collect_state(self)
        if comm.is_main_process():
            self.checkpointer.save(name, **state)

    def resume_or_load(self, resume: bool = True) -> None:
        """From OUTPUT_DIR's last checkpoint, or from MODEL.WEIGHTS, or from nothing.

        Raises:
            CheckpointError, ConfigError: see ``restore_state``.
            RunError: not all ranks start from the same.
        """
        if resume and self.checkpointer.has_checkpoint():
            path = self.checkpointer.get_checkpoint_file()
            state = self.checkpointer.load_state(path)
            warn_of_changes(self.cfg, state["jigsaw"]["config"])
            self.resumed = restore_state(self, state)
            self.start_iter = self.iter + 1
            logger.info("resuming at iteration %d", self.start_iter)
        elif self.cfg.MODEL.WEIGHTS:
            model, form = self.checkpointer.model, self.cfg.INPUT.FORMAT
            load_backbone(model, self.cfg.MODEL.WEIGHTS, input_format=form)
        check_same_start(self.checkpointer.model, self.start_iter, self.cfg.OUTPUT_DIR)

    def load_for_evaluation(self, resume: bool = False) -> None:
        """Load model and classifier of MODEL.WEIGHTS, or with ``resume`` of the last checkpoint.

        Raises:
            CheckpointError: neither is there, or it was trained on other categories.
        """
        path = self.checkpointer.get_checkpoint_file() if resume else self.cfg.MODEL.WEIGHTS
        if not path:
            raise CheckpointError(
                "nothing to evaluate: set MODEL.WEIGHTS to a checkpoint, or pass --resume for the "
                f"last one of OUTPUT_DIR {self.cfg.OUTPUT_DIR}"
            )
        categories = self.checkpointer.load_state(path)["jigsaw"]["store"]["categories"]
        if categories != self.store.categories:
            raise CheckpointError(
                f"{path} was trained on {categories}, not {self.store.categories}"
            )

    def _evaluate(self) -> OrderedDict:
        start = time.perf_counter()
        average_statistics(self.checkpointer.model)
        with self._notice.evaluating(self.device):
            self._last_eval_results = self.test(self.cfg, self.checkpointer.model)
        images = self.cfg.INPUT.JIGSAW.EVAL_IMAGES if self._last_eval_results else 0
        if images:
            seconds = (time.perf_counter() - start) * comm.get_world_size()
            height, width = self.cfg.INPUT.JIGSAW.TEMPLATE_SIZE
            self.cost_log.record(
                "evaluation",
                images=images,
                pixels=images * height * width,
                flops=2 * self._macs * images,
                seconds=seconds,
            )
        return self._last_eval_results
