"""evaluation.py: hits counted per region and class, by hand."""

import pytest
import torch

from jigsaw_d2.evaluation import JigsawEvaluator


def logits_for(ranks: list[list[int]], classes: torch.Tensor, num_classes: int) -> torch.Tensor:
    """float32 (N, 4, K) in which ``ranks[n][r]`` other classes score above the true one."""
    logits = torch.zeros(*classes.shape, num_classes)
    for n, row in enumerate(ranks):
        for r, rank in enumerate(row):
            true = int(classes[n, r])
            others = [k for k in range(num_classes) if k != true]
            logits[n, r, true] = 1.0
            logits[n, r, others[:rank]] = 2.0
    return logits


def test_counts_by_hand():
    # Categories a, b, c and background = 3; seven classes would be needed for top-5 to bite, so K
    # = 4 has top-5 = 100 % and is checked apart below.
    classes = torch.tensor([[0, 1, 2, 3], [0, 0, 3, 1]])
    logits = logits_for([[0, 1, 0, 0], [0, 2, 1, 0]], classes, 4)
    evaluator = JigsawEvaluator(["a", "b", "c"])
    evaluator.process({"gt_classes": classes[:1]}, {"region_logits": logits[:1]})
    evaluator.process({"gt_classes": classes[1:]}, {"region_logits": logits[1:]})
    metrics = evaluator.evaluate()["jigsaw"]
    assert metrics["top1"] == 100 * 5 / 8
    assert [metrics[f"top1_R{r}"] for r in (1, 2, 3, 4)] == [100.0, 0.0, 50.0, 100.0]
    assert metrics["top1_objects"] == 100 * 4 / 6
    assert metrics["top1_background"] == 50.0
    # a: true in image 0 R1 (hit), image 1 R1 (hit) and R2 (miss).
    assert metrics["top1-a"] == pytest.approx(200 / 3)
    assert metrics["top1-b"] == 50.0 and metrics["top1-c"] == 100.0
    assert metrics["top5"] == 100.0


def test_top5_counts_the_fifth_and_not_the_sixth():
    classes = torch.tensor([[0, 6, 3, 2]])
    logits = logits_for([[4, 5, 6, 0]], classes, 8)
    evaluator = JigsawEvaluator([f"c{i}" for i in range(7)])
    evaluator.process({"gt_classes": classes}, {"region_logits": logits})
    metrics = evaluator.evaluate()["jigsaw"]
    assert [metrics[f"top5_R{r}"] for r in (1, 2, 3, 4)] == [100.0, 0.0, 0.0, 100.0]


def test_a_dead_network_has_no_hits():
    evaluator = JigsawEvaluator(["a", "b"])
    classes = torch.tensor([[0, 1, 2, 0]])
    evaluator.process({"gt_classes": classes}, {"region_logits": torch.zeros(1, 4, 3)})
    evaluator.process({"gt_classes": classes}, {"region_logits": torch.full((1, 4, 3), torch.nan)})
    assert evaluator.evaluate()["jigsaw"]["top1"] == 0.0


def test_what_has_no_sample_has_no_metric_and_reset_forgets():
    evaluator = JigsawEvaluator(["a", "b"])
    classes = torch.zeros(1, 4, dtype=torch.int64)
    evaluator.process({"gt_classes": classes}, {"region_logits": torch.rand(1, 4, 3)})
    metrics = evaluator.evaluate()["jigsaw"]
    assert "top1-a" in metrics and "top1-b" not in metrics and "top1_background" not in metrics
    evaluator.reset()
    assert evaluator.evaluate()["jigsaw"] == {}
