"""A project's own detector: a small DETR, whose backbone lies where no zoo detector has it."""

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.config.defaults import _C
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

_C.MODEL.TINY_DETR = CfgNode({"NUM_QUERIES": 6, "NUM_CLASSES": 3})  # as such projects add keys


@META_ARCH_REGISTRY.register()
class TinyDetr(nn.Module):
    """Queries attend to the cells of res5; each becomes a class and a box (cx, cy, w, h)."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        node, width = cfg.MODEL.TINY_DETR, 16
        self.detr = nn.Module()
        self.detr.body = nn.ModuleList([build_backbone(cfg)])
        self.detr.proj = nn.Conv2d(self.detr.body[0].output_shape()["res5"].channels, width, 1)
        self.detr.queries = nn.Embedding(node.NUM_QUERIES, width)
        self.detr.decoder = nn.TransformerDecoderLayer(width, 2, 32, dropout=0.0, batch_first=True)
        self.detr.classes = nn.Linear(width, node.NUM_CLASSES + 1)
        self.detr.boxes = nn.Linear(width, 4)
        self.input_format = cfg.INPUT.FORMAT
        for name in ("PIXEL_MEAN", "PIXEL_STD"):
            values = torch.tensor(cfg.MODEL[name]).view(-1, 1, 1)
            self.register_buffer(name.lower(), values, persistent=False)

    def forward(self, batch: list[dict]) -> dict[str, Tensor] | list[dict]:
        images = [
            (x["image"].to(self.pixel_mean) - self.pixel_mean) / self.pixel_std for x in batch
        ]
        cells = self.detr.proj(self.detr.body[0](ImageList.from_tensors(images, 32).tensor)["res5"])
        queries = self.detr.queries.weight.expand(len(batch), -1, -1)
        found = self.detr.decoder(queries, cells.flatten(2).transpose(1, 2))
        logits, boxes = self.detr.classes(found), self.detr.boxes(found).sigmoid()
        if self.training:
            return self.losses(logits, boxes, [x["instances"] for x in batch])
        return [self.detect(*one) for one in zip(logits, boxes, images, batch)]

    def losses(self, logits: Tensor, boxes: Tensor, targets: list[Instances]) -> dict[str, Tensor]:
        total = {"loss_class": logits.sum() * 0, "loss_box": boxes.sum() * 0}
        for scores, found, target in zip(logits, boxes, targets):
            h, w = target.image_size
            x0, y0, x1, y1 = (target.gt_boxes.tensor / torch.tensor([w, h, w, h])).unbind(1)
            wanted = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=1)
            cost = torch.cdist(found, wanted, p=1) - scores.softmax(1)[:, target.gt_classes]
            rows, columns = linear_sum_assignment(cost.detach().numpy())
            labels = torch.full((len(scores),), scores.shape[1] - 1)
            labels[rows] = target.gt_classes[columns]
            total["loss_class"] = total["loss_class"] + F.cross_entropy(scores, labels)
            total["loss_box"] = total["loss_box"] + F.l1_loss(found[rows], wanted[columns])
        return total

    def detect(self, logits: Tensor, boxes: Tensor, image: Tensor, record: dict) -> dict:
        h, w = image.shape[1:]
        scores, labels = logits.softmax(1)[:, :-1].max(1)
        cx, cy, bw, bh = boxes.unbind(1)
        corners = torch.stack([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2], dim=1)
        scaled = Boxes(corners * torch.tensor([w, h, w, h]))
        found = Instances((h, w), pred_boxes=scaled, scores=scores, pred_classes=labels)
        return {"instances": detector_postprocess(found, record["height"], record["width"])}
