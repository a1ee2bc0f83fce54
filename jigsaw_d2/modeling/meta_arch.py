"""The network that is pre-trained: a Detectron2 backbone and a 1x1 convolution over its cells.

Shape letters as in ``losses``: N images, S = 4 regions, K = C + 1 classes with background last,
H, W canvas pixels, h, w feature cells.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import FPN
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

import jigsaw_d2.modeling.backbones  # noqa: F401  (registers them)
from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.io import ConfigError
from jigsaw_d2.modeling import losses
from jigsaw_d2.modeling.erf import own_region_weights

# Iterations between two values of the training metrics: the period of Detectron2's writers, so
# that nothing is computed, and no GPU waited for, only to be thrown away.
LOG_PERIOD = 20


@META_ARCH_REGISTRY.register()
class JigsawPretrainer(nn.Module):
    """Classifies every cell of a Jigsaw image's feature map (Sec. 3.3).

    ``erf_weights``, float32 (S, h, w), are w_1..w_4 of Eq. 2 in force. They are a buffer, hence in
    every checkpoint; ``ErfRefreshHook`` renews them. Before the first refresh each cell's weight
    lies wholly on its own region. ``erf_region_sums``, float64 (h, w, S), is what they were
    computed from; zero before the first refresh.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        in_feature: str,
        num_classes: int,
        template: JigsawTemplate,
        objective: str = "erf_adaptive",
        tau: float = 0.7,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        channels_last: bool = False,
    ) -> None:
        """
        Args:
            backbone: Detectron2 backbone; its ``output_shape()`` tells ``in_feature``'s stride.
            in_feature: the feature map that is classified.
            num_classes: C, object categories without background.
            template: regions of the canvas, in multiples of the stride.
            objective: one of ``losses.OBJECTIVES``.
            tau: least weight of a cell's own region (Eq. 2); kept for ``ErfRefreshHook``.
            pixel_mean: one value a channel, in the order of the images, range [0, 255].
            pixel_std: likewise.
            channels_last: memory format of images and weights.

        Raises:
            ConfigError: an unknown objective or feature, no classes, or tau outside [0, 1].
        """
        super().__init__()
        shapes = backbone.output_shape()
        _check_settings(objective, in_feature, list(shapes), num_classes, tau)
        self.backbone = backbone
        self.in_feature = in_feature
        self.num_classes = num_classes
        self.template = template
        self.objective = objective
        self.tau = tau
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.classifier = nn.Conv2d(shapes[in_feature].channels, num_classes + 1, kernel_size=1)
        nn.init.normal_(self.classifier.weight, std=0.01)  # as Detectron2's classifiers
        nn.init.zeros_(self.classifier.bias)
        self.to(memory_format=self.memory_format)

        regions = template.cell_regions(shapes[in_feature].stride)
        shares = torch.as_tensor(template.area_shares(), dtype=torch.float32)
        self.register_buffer("cell_regions", regions, persistent=False)
        self.register_buffer("area_shares", shares, persistent=False)
        self.register_buffer("erf_weights", own_region_weights(regions).float())
        sums = torch.zeros(*regions.shape, losses.NUM_REGIONS, dtype=torch.float64)
        self.register_buffer("erf_region_sums", sums)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.register_buffer("pixel_shift", -self.pixel_mean / self.pixel_std, persistent=False)
        self.register_buffer("pixel_scale", 1 / self.pixel_std, persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The keyword arguments of ``__init__`` from a configuration."""
        jigsaw = cfg.MODEL.JIGSAW
        return {
            "backbone": build_backbone(cfg),
            "in_feature": jigsaw.IN_FEATURE,
            "num_classes": jigsaw.NUM_CLASSES,
            "template": JigsawTemplate(
                *cfg.INPUT.JIGSAW.TEMPLATE_SIZE, *cfg.INPUT.JIGSAW.TEMPLATE_SPLIT
            ),
            "objective": jigsaw.OBJECTIVE,
            "tau": jigsaw.TAU,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "channels_last": jigsaw.CHANNELS_LAST,
        }

    @property
    def device(self) -> torch.device:
        """Where the weights are and the images go."""
        return self.pixel_mean.device

    def forward(self, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """
        Args:
            batch: a batch of the Jigsaw loader, {"image": uint8 (N, 3, H, W), "gt_classes": int64
                (N, S), ...}, or Detectron2's list of N dicts with the same keys per image.

        Returns:
            training: {"loss_jigsaw": scalar}; every ``LOG_PERIOD`` iterations the current event
            storage also receives metrics per region and the value of each objective.
            evaluation: {"region_logits": float32 (N, S, K)}, the mean over each region's cells.
        """
        images, gt_classes = _collate(batch)
        logits = self.cell_logits(self.preprocess(images))
        if not self.training:
            return {"region_logits": self.region_logits(logits)}
        if gt_classes is None:
            raise ConfigError("a training batch without gt_classes; evaluate with .eval()")
        gt_classes = gt_classes.to(self.device, non_blocking=True)
        storage = _storage_due()
        if storage is not None:
            self._log_metrics(storage, logits.detach(), gt_classes)
        return {"loss_jigsaw": self.loss(logits, gt_classes)}

    def preprocess(self, images: Tensor) -> Tensor:
        """Images uint8 (N, 3, H, W) on any device -> normalised on the model's.

        Padding (0) becomes (0 - mean) / std: normalisation follows the stitching (Sec. 3.2).

        Returns:
            float32, to the bit as a detector computes it; or under autocast in its dtype, shifted,
            scaled, rounded and laid out by one kernel.
        """
        images = images.to(self.device, non_blocking=True)
        kind = self.device.type
        if not torch.is_autocast_enabled(kind):
            images = (images - self.pixel_mean) / self.pixel_std
            return images.contiguous(memory_format=self.memory_format)
        dtype = torch.get_autocast_dtype(kind)
        normalised = torch.empty_like(images, dtype=dtype, memory_format=self.memory_format)
        return torch.addcmul(self.pixel_shift, images, self.pixel_scale, out=normalised)

    def cell_logits(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) -> class scores of every cell, (N, K, h, w)."""
        logits = self.classifier(self.backbone(images)[self.in_feature])
        if logits.shape[2:] != self.cell_regions.shape:
            raise ConfigError(
                f"images of {tuple(images.shape[2:])} pixels give {self.in_feature} of "
                f"{tuple(logits.shape[2:])} cells, where the template has "
                f"{tuple(self.cell_regions.shape)}; give images of the template's size, "
                f"{self.template.height}x{self.template.width}"
            )
        return logits

    def region_logits(self, logits: Tensor) -> Tensor:
        """Cell logits (N, K, h, w) -> float32 (N, S, K), the mean over each region's cells."""
        return losses.region_means(logits.float(), self.cell_regions).transpose(1, 2)

    def loss(self, logits: Tensor, gt_classes: Tensor, objective: str | None = None) -> Tensor:
        """Scalar of an objective, by default the trained one, for cell logits (N, K, h, w)."""
        return losses.OBJECTIVES[objective or self.objective].loss(logits, gt_classes, self._canvas)

    def region_losses(self, logits: Tensor, gt_classes: Tensor) -> Tensor:
        """Float32 (N, S): what each region contributes to the objective that is trained."""
        return losses.OBJECTIVES[self.objective].region_losses(logits, gt_classes, self._canvas)

    @property
    def _canvas(self) -> losses.Canvas:
        return losses.Canvas(self.cell_regions, self.area_shares, self.erf_weights)

    @torch.no_grad()
    def _log_metrics(self, storage: EventStorage, logits: Tensor, gt_classes: Tensor) -> None:
        """region/R1_loss, _top1, _top5 ...; objective/erf_adaptive ...: of this rank's images."""
        ranks = losses.region_ranks(self.region_logits(logits), gt_classes)
        rows = {
            "loss": self.region_losses(logits, gt_classes).mean(dim=0),
            "top1": (ranks < 1).float().mean(dim=0),
            "top5": (ranks < 5).float().mean(dim=0),
        }
        names = [f"region/R{r + 1}_{what}" for what in rows for r in range(losses.NUM_REGIONS)]
        names += [f"objective/{name}" for name in losses.OBJECTIVES]
        values = [
            *rows.values(),
            *(self.loss(logits, gt_classes, o)[None] for o in losses.OBJECTIVES),
        ]
        for name, value in zip(names, torch.cat(values).tolist()):  # the one wait for the GPU
            storage.put_scalar(name, value, smoothing_hint=False)


def _collate(
    batch: Mapping[str, Any] | Sequence[Mapping[str, Any]],
) -> tuple[Tensor, Tensor | None]:
    """Images and classes of either form of batch; classes may be absent in evaluation."""
    if isinstance(batch, Mapping):
        return batch["image"], batch.get("gt_classes")
    images = torch.stack([record["image"] for record in batch])
    if any("gt_classes" not in record for record in batch):
        return images, None
    return images, torch.stack([torch.as_tensor(record["gt_classes"]) for record in batch])


def _storage_due() -> EventStorage | None:
    """The event storage, in the iterations whose metrics Detectron2's writers will write."""
    try:
        storage = get_event_storage()
    except AssertionError:  # no training loop around: 0.6 has no other way to ask
        return None
    _, logged = storage.latest().get("region/R1_loss", (0.0, -1))  # by the step's first pass
    is_due = (storage.iter + 1) % LOG_PERIOD == 0 and logged != storage.iter
    return storage if is_due else None


def _check_settings(
    objective: str, feature: str, features: list[str], num_classes: int, tau: float
) -> None:
    if objective not in losses.OBJECTIVES:
        raise ConfigError(
            f"MODEL.JIGSAW.OBJECTIVE is {objective!r}; choose one of {', '.join(losses.OBJECTIVES)}"
        )
    if feature not in features:
        raise ConfigError(
            f"MODEL.JIGSAW.IN_FEATURE is {feature!r}, but the backbone returns "
            f"{', '.join(features)}; add it to MODEL.RESNETS.OUT_FEATURES (or the like), or choose "
            "one of these"
        )
    if num_classes < 1:
        raise ConfigError(
            f"MODEL.JIGSAW.NUM_CLASSES is {num_classes}; set the number of object categories "
            "(training fills it in from the sample store)"
        )
    if not 0 <= tau <= 1:
        raise ConfigError(f"MODEL.JIGSAW.TAU is {tau}; it must lie in [0, 1]")


def check_trainable(model: nn.Module) -> None:
    """Refuse a built ``JigsawPretrainer`` of which parts could not learn, whatever made it so.

    A frozen norm or parameter, or a feature pyramid.

    Raises:
        ConfigError: naming the first few layers.
    """
    if any(isinstance(module, FPN) for module in model.modules()):
        raise ConfigError(
            f"MODEL.JIGSAW.IN_FEATURE {model.in_feature} is a level of a feature pyramid, most "
            "parameters of which would learn nothing; pre-train its bottom-up network: for a "
            "ResNet set MODEL.BACKBONE.NAME build_resnet_backbone and IN_FEATURE res5"
        )
    frozen = [  # anyone's norm with statistics that is not made to renew them
        name
        for name, module in model.named_modules()
        if hasattr(module, "running_mean") and not isinstance(module, _NormBase)
    ]
    fixed = [name for name, p in model.named_parameters() if not p.requires_grad]
    for names, what in ((frozen, "frozen batch norms"), (fixed, "parameters without gradient")):
        if names:
            raise ConfigError(
                f"{len(names)} {what} ({', '.join(names[:3])} ...): see MODEL.RESNETS.NORM and "
                "MODEL.BACKBONE.FREEZE_AT, or the backbone's own code"
            )
