"""The network that is pre-trained: a Detectron2 backbone and a 1x1 convolution over its cells.

Shape letters as in ``losses``: N images, S = 4 regions, K = C + 1 classes with background last,
L classified features (levels), H, W canvas pixels, h, w feature cells.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn

from jigsaw_d2.config import in_features
from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.io import ConfigError
from jigsaw_d2.modeling import losses
from jigsaw_d2.modeling.backbones import build_backbone
from jigsaw_d2.modeling.erf import own_region_weights
from jigsaw_d2.modeling.levels import Level, assigned_levels, check_levels, used_cells

# Iterations between two values of the training metrics: the period of Detectron2's writers, so
# that nothing is computed, and no GPU waited for, only to be thrown away.
LOG_PERIOD = 20


@META_ARCH_REGISTRY.register()
class JigsawPretrainer(nn.Module):
    """Classifies every cell of a Jigsaw image's feature map, or maps (Sec. 3.3).

    Of one feature the buffers of ``Level`` lie here under their names, of several with the
    feature's behind: ``erf_weights_p3``. They are in every checkpoint; ``ErfRefreshHook`` renews
    them.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        in_features: Sequence[str],
        num_classes: int,
        template: JigsawTemplate,
        objective: str = "erf_adaptive",
        tau: float = 0.7,
        shared_classifier: bool = True,
        levels: str = "all",
        assign_box_size: int = 224,
        ignore_padding: bool = False,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        channels_last: bool = False,
    ) -> None:
        """
        Args:
            backbone: Detectron2 backbone; its ``output_shape()`` tells the features' strides.
            in_features: the feature maps that are classified.
            num_classes: C, object categories without background.
            template: regions of the canvas, in multiples of the strides.
            objective: one of ``losses.OBJECTIVES``.
            tau: least weight of a cell's own region (Eq. 2); kept for ``ErfRefreshHook``.
            shared_classifier: one for all features, which then have as many channels; or one each.
            levels: "all" or "assign", see the key.
            assign_box_size: side in pixels of a box that "assign" gives to p4.
            ignore_padding: no loss where a cell has nothing but padding.
            pixel_mean: one value a channel, in the order of the images, range [0, 255].
            pixel_std: likewise.
            channels_last: memory format of images and weights.

        Raises:
            ConfigError: an unknown objective or feature, no classes, tau outside [0, 1], or levels
                that cannot share a classifier or be assigned boxes.
        """
        super().__init__()
        shapes = backbone.output_shape()
        _check_settings(objective, in_features, list(shapes), num_classes, tau)
        self.backbone = backbone
        self.in_features = tuple(sorted(in_features, key=lambda name: shapes[name].stride))
        self.strides = {name: shapes[name].stride for name in self.in_features}
        check_levels(levels, self.strides, assign_box_size, template)
        self.num_classes = num_classes
        self.template = template
        self.objective = objective
        self.tau = tau
        self.assignment = levels
        self.assign_box_size = assign_box_size
        self.ignore_padding = ignore_padding
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        channels = {name: shapes[name].channels for name in self.in_features}
        if shared_classifier:
            if len(set(channels.values())) > 1:
                raise ConfigError(
                    f"features of {channels} channels cannot share a classifier; set "
                    "MODEL.JIGSAW.SHARED_CLASSIFIER False"
                )
            self.classifier = _classifier(channels[self.in_features[0]], num_classes + 1)
        else:
            self.classifier = nn.ModuleDict(
                {name: _classifier(count, num_classes + 1) for name, count in channels.items()}
            )
        self.to(memory_format=self.memory_format)

        for name, stride in self.strides.items():
            regions = template.cell_regions(stride)
            sums = torch.zeros(*regions.shape, losses.NUM_REGIONS, dtype=torch.float64)
            buffers = Level(regions, own_region_weights(regions).float(), sums)
            for what, value in buffers._asdict().items():
                self.register_buffer(self._name(what, name), value, what != "cell_regions")
        shares = torch.as_tensor(template.area_shares(), dtype=torch.float32)
        self.register_buffer("area_shares", shares, persistent=False)
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
            "in_features": in_features(cfg),
            "num_classes": jigsaw.NUM_CLASSES,
            "template": JigsawTemplate(
                *cfg.INPUT.JIGSAW.TEMPLATE_SIZE, *cfg.INPUT.JIGSAW.TEMPLATE_SPLIT
            ),
            "objective": jigsaw.OBJECTIVE,
            "tau": jigsaw.TAU,
            "shared_classifier": jigsaw.SHARED_CLASSIFIER,
            "levels": jigsaw.LEVELS,
            "assign_box_size": jigsaw.ASSIGN_BOX_SIZE,
            "ignore_padding": jigsaw.IGNORE_PADDING,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "channels_last": jigsaw.CHANNELS_LAST,
        }

    @property
    def device(self) -> torch.device:
        """Where the weights are and the images go."""
        return self.pixel_mean.device

    @property
    def levels(self) -> dict[str, Level]:
        """The classified features, from fine to coarse."""
        return {
            name: Level(*(getattr(self, self._name(what, name)) for what in Level._fields))
            for name in self.in_features
        }

    def _name(self, what: str, feature: str) -> str:
        return what if len(self.in_features) == 1 else f"{what}_{feature}"

    def forward(self, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """
        Args:
            batch: a batch of the Jigsaw loader, {"image": uint8 (N, 3, H, W), "gt_classes": int64
                (N, S), ...}, or Detectron2's list of N dicts with the same keys per image; with
                "shown_boxes": int64 (N, S, 4) where ``levels`` or ``ignore_padding`` need them.

        Returns:
            training: {"loss_jigsaw": scalar}; every ``LOG_PERIOD`` iterations the current event
            storage also receives metrics per region and level and the value of each objective.
            evaluation: {"region_logits": float32 (N, S, K)}, the mean over each region's cells.
        """
        batch = _collate(batch)
        logits = self.cell_logits(self.preprocess(batch["image"]))
        boxes = self._boxes(batch)
        if not self.training:
            return {"region_logits": self.region_logits(logits, boxes)}
        if "gt_classes" not in batch:
            raise ConfigError("a training batch without gt_classes; evaluate with .eval()")
        gt_classes = batch["gt_classes"].to(self.device, non_blocking=True)
        storage = _storage_due()
        if storage is not None:
            detached = {name: each.detach() for name, each in logits.items()}
            self._log_metrics(storage, detached, gt_classes, boxes)
        return {"loss_jigsaw": self.loss(logits, gt_classes, boxes)}

    def _boxes(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """The shown samples' boxes on the device; None where nothing asks for them."""
        if self.assignment == "all" and not self.ignore_padding:
            return None
        if "shown_boxes" not in batch:
            raise ConfigError(
                "MODEL.JIGSAW.LEVELS assign and IGNORE_PADDING need a batch with shown_boxes, as "
                "the loader makes it for a config with these keys"
            )
        return batch["shown_boxes"].to(self.device, non_blocking=True)

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

    def cell_logits(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images (N, 3, H, W) -> class scores of every cell, (N, K, h, w) by feature."""
        features = self.backbone(images)
        logits = {}
        for name, level in self.levels.items():
            shared = isinstance(self.classifier, nn.Conv2d)
            logits[name] = (self.classifier if shared else self.classifier[name])(features[name])
            if logits[name].shape[2:] != level.cell_regions.shape:
                raise ConfigError(
                    f"images of {tuple(images.shape[2:])} pixels give {name} of "
                    f"{tuple(logits[name].shape[2:])} cells, where the template has "
                    f"{tuple(level.cell_regions.shape)}; give images of the template's size, "
                    f"{self.template.height}x{self.template.width}"
                )
        return logits

    def region_logits(self, logits: Mapping[str, Tensor], boxes: Tensor | None = None) -> Tensor:
        """Cell logits (N, K, h, w) by feature -> float32 (N, S, K), the mean over a region's cells.

        Of several features their mean, or each region's of the one that is assigned to it.
        """
        means = []
        for name, canvas in self._canvases(boxes).items():
            used = None if canvas.used is None else canvas.used[:, None]
            means.append(losses.region_means(logits[name].float(), canvas.cell_regions, used))
        return self._combine(means, boxes).transpose(1, 2)

    def loss(
        self,
        logits: Mapping[str, Tensor],
        gt_classes: Tensor,
        boxes: Tensor | None = None,
        objective: str | None = None,
    ) -> Tensor:
        """Scalar of an objective, by default the trained one, for cell logits by feature."""
        region_losses = self.region_losses(logits, gt_classes, boxes, objective)
        canvas = self._canvases(None)[self.in_features[0]]  # all have the same areas
        return losses.OBJECTIVES[objective or self.objective].reduce(region_losses, canvas)

    def region_losses(
        self,
        logits: Mapping[str, Tensor],
        gt_classes: Tensor,
        boxes: Tensor | None = None,
        objective: str | None = None,
    ) -> Tensor:
        """Float32 (N, S): what each region contributes to an objective, by default the trained one.

        Of several features the mean of their losses, or each region's on the one assigned to it.

        Args:
            logits: float (N, K, h, w) by feature.
            gt_classes: int64 (N, S).
            boxes: int64 (N, S, 4) XYXY canvas pixels that show samples, if they matter.
        """
        return self._combine(self._level_losses(logits, gt_classes, boxes, objective), boxes)

    def _level_losses(
        self,
        logits: Mapping[str, Tensor],
        gt_classes: Tensor,
        boxes: Tensor | None,
        objective: str | None = None,
    ) -> list[Tensor]:
        """Float32 (N, S) of each feature."""
        region_losses = losses.OBJECTIVES[objective or self.objective].region_losses
        canvases = self._canvases(boxes)
        return [region_losses(logits[name], gt_classes, canvases[name]) for name in canvases]

    def _combine(self, values: Sequence[Tensor], boxes: Tensor | None) -> Tensor:
        """Float (N, ..., S) of each feature -> one such: their mean, or the assigned one's."""
        if len(values) == 1:
            return values[0]
        if self.assignment == "all":
            return sum(values) / len(values)
        level = assigned_levels(boxes, self.strides, self.assign_box_size)  # (N, S)
        level = level.reshape(len(level), *(1 for _ in values[0].shape[2:]), losses.NUM_REGIONS)
        stacked = torch.stack(list(values))
        return stacked.gather(0, level.expand_as(values[0])[None])[0]

    def _canvases(self, boxes: Tensor | None) -> dict[str, losses.Canvas]:
        """What the objectives know, by feature."""
        canvases = {}
        for name, level in self.levels.items():
            used = None
            if self.ignore_padding and boxes is not None:
                used = used_cells(boxes, level.cell_regions.shape, self.template)
            canvases[name] = losses.Canvas(
                level.cell_regions, self.area_shares, level.erf_weights, used
            )
        return canvases

    @torch.no_grad()
    def _log_metrics(
        self,
        storage: EventStorage,
        logits: Mapping[str, Tensor],
        gt_classes: Tensor,
        boxes: Tensor | None,
    ) -> None:
        """region/R1_loss, _top1, _top5 ...; objective/erf_adaptive ...: of this rank's images.

        Of several features also region/p3_R1_loss ..., each feature's loss of every sample.
        """
        ranks = losses.region_ranks(self.region_logits(logits, boxes), gt_classes)
        by_level = self._level_losses(logits, gt_classes, boxes)
        rows = {
            "loss": self._combine(by_level, boxes).mean(dim=0),
            "top1": (ranks < 1).float().mean(dim=0),
            "top5": (ranks < 5).float().mean(dim=0),
        }
        regions = [f"R{r + 1}" for r in range(losses.NUM_REGIONS)]
        names = [f"region/{region}_{what}" for what in rows for region in regions]
        names += [f"objective/{name}" for name in losses.OBJECTIVES]
        values = [
            *rows.values(),
            *(self.loss(logits, gt_classes, boxes, o)[None] for o in losses.OBJECTIVES),
        ]
        if len(by_level) > 1:
            names += [f"region/{level}_{r}_loss" for level in self.in_features for r in regions]
            values += [each.mean(dim=0) for each in by_level]
        for name, value in zip(names, torch.cat(values).tolist()):  # the one wait for the GPU
            storage.put_scalar(name, value, smoothing_hint=False)


def _classifier(channels: int, classes: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, classes, kernel_size=1)
    nn.init.normal_(conv.weight, std=0.01)  # as Detectron2's classifiers
    nn.init.zeros_(conv.bias)
    return conv


def _collate(batch: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Either form of batch as the loader's; of a list's keys, those that every image has."""
    if isinstance(batch, Mapping):
        return batch
    keys = ("image", "gt_classes", "shown_boxes")
    return {
        key: torch.stack([torch.as_tensor(record[key]) for record in batch])
        for key in keys
        if all(key in record for record in batch)
    }


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
    objective: str, in_features: Sequence[str], features: list[str], num_classes: int, tau: float
) -> None:
    if objective not in losses.OBJECTIVES:
        raise ConfigError(
            f"MODEL.JIGSAW.OBJECTIVE is {objective!r}; choose one of {', '.join(losses.OBJECTIVES)}"
        )
    for feature in in_features:
        if feature not in features:
            raise ConfigError(
                f"MODEL.JIGSAW.IN_FEATURE(S) has {feature!r}, but the backbone returns "
                f"{', '.join(features)}; add it to MODEL.RESNETS.OUT_FEATURES (or the like), or "
                "choose one of these"
            )
    if num_classes < 1:
        raise ConfigError(
            f"MODEL.JIGSAW.NUM_CLASSES is {num_classes}; set the number of object categories "
            "(training fills it in from the sample store)"
        )
    if not 0 <= tau <= 1:
        raise ConfigError(f"MODEL.JIGSAW.TAU is {tau}; it must lie in [0, 1]")
