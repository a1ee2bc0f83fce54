"""How well held-out samples are classified: per region, per class, background apart.

Every region of a Jigsaw image is one sample, classified by the mean of its cells' logits.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor

from jigsaw_d2.modeling.losses import NUM_REGIONS, region_ranks

# A hit is the true class among the TOPS best scores.
TOPS = (1, 5)


class JigsawEvaluator(DatasetEvaluator):
    """Counts hits; counts are integers, so their sum over ranks is the same in any order."""

    def __init__(self, class_names: Sequence[str]) -> None:
        """
        Args:
            class_names: the C categories; background is index C.
        """
        self._names = list(class_names)
        self.reset()

    def reset(self) -> None:
        """Forget all counts. Shape (region, true class, 1 + len(TOPS)): samples, then hits."""
        shape = (NUM_REGIONS, len(self._names) + 1, 1 + len(TOPS))
        self._counts = torch.zeros(shape, dtype=torch.int64)

    def process(self, inputs: Mapping[str, Any], outputs: Mapping[str, Tensor]) -> None:
        """Add one batch.

        Args:
            inputs: "gt_classes" int64 (N, S).
            outputs: "region_logits" float32 (N, S, K).
        """
        logits = outputs["region_logits"].cpu()
        classes = inputs["gt_classes"].cpu()
        ranks = region_ranks(logits, classes).flatten()
        rows = torch.stack([torch.ones_like(ranks), *(ranks < top for top in TOPS)], dim=1)
        regions = torch.arange(NUM_REGIONS).expand_as(classes).flatten()
        self._counts.index_put_((regions, classes.flatten()), rows, accumulate=True)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """{"jigsaw": metrics in percent} on the main process, None on the others.

        top1, top5 over all samples; top1_R1 .. per region; top1_objects and top1_background; and
        top1-NAME per category. What no sample belongs to is left out.
        """
        counts = sum(comm.gather(self._counts))
        if not comm.is_main_process():
            return None
        background = len(self._names)
        groups: dict[str, Tensor] = {"": counts.sum(dim=(0, 1))}
        groups |= {f"_R{r + 1}": counts[r].sum(dim=0) for r in range(NUM_REGIONS)}
        groups["_objects"] = counts[:, :background].sum(dim=(0, 1))
        groups["_background"] = counts[:, background].sum(dim=0)
        by_class = {f"-{name}": counts[:, c].sum(dim=0) for c, name in enumerate(self._names)}
        metrics = OrderedDict()
        for suffix, group in (groups | by_class).items():
            samples, *hits = group.tolist()
            for top, hit in zip(TOPS, hits):
                if samples:
                    metrics[f"top{top}{suffix}"] = 100.0 * hit / samples
        return OrderedDict(jigsaw=metrics)
