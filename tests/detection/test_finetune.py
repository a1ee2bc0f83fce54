"""Fine-tuning by command and by library: train, stop, resume, evaluate, at several scales."""

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pycocotools.cocoeval
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Boxes, Instances
from helpers_weights import (
    C4,
    FPN,
    MASK,
    RETINANET,
    SMALL,
    THIN,
    build_detector,
    convert,
    make_coco,
    small_detection_config,
)

from jigsaw_d2.cost import backbone_macs, read_cost_log
from jigsaw_d2.detection import finetune as finetune_module
from jigsaw_d2.detection.config import setup_finetune
from jigsaw_d2.detection.finetune import ComputeMeter, FastCOCOEvaluator, FinetuneTrainer, finetune
from jigsaw_d2.io import ConfigError, DataError, RunError, WeightsError
from jigsaw_d2.tools.finetune import main


@pytest.fixture()
def weights(tmp_path: Path) -> Path:
    return convert(tmp_path, *THIN)


def settings(tmp_path: Path, name: str, *more: str, masks: bool = True) -> list[str]:
    """Two small steps, which learn nothing and break nothing, on a set of this name of 4 images."""
    files = make_coco(tmp_path / name, masks=masks)
    sets = str((files[0][0],))
    data = ["DATASETS.COCO_FILES", str(files), "DATASETS.TRAIN", sets, "DATASETS.TEST", sets]
    short = ["SOLVER.BASE_LR", "0.0001", "SOLVER.MAX_ITER", "2", "SEED", "1"]
    # without a threshold some boxes are scored
    short += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "OUTPUT_DIR", str(tmp_path / "out")]
    return [*SMALL, *THIN, *short, *data, *more]


@pytest.mark.parametrize(("config", "tasks"), [(C4, {"bbox"}), (MASK, {"bbox", "segm"})])
def test_train_and_evaluate(config: str, tasks: set, weights: Path, tmp_path: Path, capsys) -> None:
    """What the user gets: changes as YAML, the full config, AP per class, metadata, cost."""
    arguments = ["--config-file", config, "--weights", str(weights)]
    assert main([*arguments, *settings(tmp_path, f"whole_{len(tasks)}")]) == 0
    said = capsys.readouterr().out
    assert "PIXEL_STD: [58.395, 57.12, 57.375]" in said and "FORMAT: RGB" in said
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert set(results) == tasks
    assert {"AP", "AP50", "AP-cell", "AP-plate", "AP-rod"} <= set(results["bbox"])
    config_text = (out / "config.yaml").read_text()
    assert "NUM_CLASSES: 3" in config_text and f"WEIGHTS: {weights}" in config_text
    assert (out / "weights_metadata.yaml").read_text() == weights.with_name(
        "weights.pkl.yaml"
    ).read_text()
    assert "all 265 tensors of the backbone loaded" in (out / "log.txt").read_text()
    assert "new, with random weights" in (out / "log.txt").read_text()
    assert "COCO's metrics by faster_coco_eval took" in (out / "log.txt").read_text()
    stages = read_cost_log(out)["stages"]
    assert (stages["finetuning"]["images"], stages["evaluation"]["images"]) == (2, 4)
    assert stages["finetuning"]["flops"] > 3 * stages["evaluation"]["flops"] / 2 * 0.9
    assert stages["finetuning"]["pixels"] == 2 * 64 * 64


# Padded to one size and to a multiple of 32: two of 64 x 64.
IMAGES = [{"image": torch.zeros(3, 40, 60)}, {"image": torch.zeros(3, 64, 33)}]


def test_compute_is_counted_with_the_padding_and_only_while_open(tmp_path: Path) -> None:
    cfg = small_detection_config(FPN, *THIN)
    detector = build_detector(cfg)
    with ComputeMeter(GeneralizedRCNNWithTTA(cfg, detector), str(tmp_path), "evaluation") as meter:
        detector(IMAGES)
    detector(IMAGES)
    assert (meter.images, meter.pixels) == (2, 2 * 64 * 64)
    meter.book()
    meter.book()  # nothing since: books nothing
    entry = read_cost_log(tmp_path)["stages"]["evaluation"]
    assert (entry["images"], entry["pixels"]) == (2, 2 * 64 * 64) and entry["seconds"] > 0
    flops = 2 * backbone_macs(detector.backbone, 64, 64)
    assert entry["flops"] == pytest.approx(2 * flops, rel=1e-3)
    training = ComputeMeter(detector, str(tmp_path), "finetuning")
    assert training.flops_per_pixel * 64 * 64 == pytest.approx(3 * flops, rel=1e-3)


def random_detections(json_file: Path, seed: int) -> list[dict]:
    """What a detector might find: boxes moved, missed, doubled, of other classes, of nothing."""
    rng = np.random.default_rng(seed)
    data = json.loads(json_file.read_text())
    labels = {c["id"]: k for k, c in enumerate(data["categories"])}
    boxes: dict[int, list] = {image["id"]: [] for image in data["images"]}
    for annotation in data["annotations"]:
        x, y, w, h = annotation["bbox"]
        for _ in range(rng.integers(0, 4)):
            dx, dy, dw, dh = rng.normal(0, 0.12, 4)
            moved = [x + dx * w, y + dy * h, x + (1 + dx + dw) * w, y + (1 + dy + dh) * h]
            wrong = rng.random() < 0.15
            label = rng.integers(len(labels)) if wrong else labels[annotation["category_id"]]
            boxes[annotation["image_id"]].append([*moved, np.round(rng.random(), 2), label])
    predictions = []
    for image in data["images"]:
        found = np.array(boxes[image["id"]] + [[0, 0, 9, 9, rng.random(), 0]], dtype=np.float32)
        instances = Instances((image["height"], image["width"]))
        instances.pred_boxes = Boxes(torch.from_numpy(found[:, :4]))
        instances.scores = torch.from_numpy(found[:, 4])
        instances.pred_classes = torch.from_numpy(found[:, 5]).long()
        masks = torch.zeros(len(found), image["height"], image["width"], dtype=torch.bool)
        for mask, box in zip(masks, found[:, :4].round().clip(0).astype(int)):
            mask[box[1] : box[3], box[0] : box[2]] = True
        instances.pred_masks = masks
        predictions.append({"image_id": image["id"], "instances": instances})
    return predictions


@pytest.mark.parametrize("seed", range(3))
def test_faster_coco_eval_gives_pycocotools_numbers(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each metric of boxes and masks, per class too; with crowds, ties of scores, empty images."""
    pytest.importorskip("faster_coco_eval")
    name, json_file, images = make_coco(tmp_path / f"metrics_{seed}", images=12, seed=seed)[0]
    content = json.loads(Path(json_file).read_text())
    content["annotations"] = content["annotations"][:-4]
    for annotation in content["annotations"][::7]:
        annotation["iscrowd"] = 1
    Path(json_file).write_text(json.dumps(content))
    register_coco_instances(name, {}, json_file, images)
    DatasetCatalog.get(name)  # so that Detectron2 knows the categories' ids
    predictions = random_detections(Path(json_file), seed)

    def metrics() -> dict:
        evaluator = FastCOCOEvaluator(name, ("bbox", "segm"), False, str(tmp_path))
        evaluator.reset()
        inputs = [{"image_id": found["image_id"]} for found in predictions]
        evaluator.process(inputs, predictions)
        return evaluator.evaluate()

    fast = metrics()
    monkeypatch.setattr(finetune_module, "COCOeval", pycocotools.cocoeval.COCOeval)
    slow = metrics()
    assert set(fast) == {"bbox", "segm"} and 5 < fast["bbox"]["AP"] < 95
    for task in fast:
        np.testing.assert_allclose(
            list(fast[task].values()), list(slow[task].values()), rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_annotation_counts_whatever_its_id(first: int, tmp_path: Path) -> None:
    """COCO's evaluation takes a match with the annotation of id 0 for none."""
    name, json_file, images = make_coco(tmp_path / f"id_{first}", images=1)[0]
    content = json.loads(Path(json_file).read_text())
    (kept,) = content["annotations"][:1]
    content["annotations"] = [kept | {"id": first}]
    Path(json_file).write_text(json.dumps(content))
    register_coco_instances(name, {}, json_file, images)
    DatasetCatalog.get(name)
    evaluator = FastCOCOEvaluator(name, ("bbox",), False, str(tmp_path))
    evaluator.reset()
    found = Instances((64, 64))
    x, y, width, height = kept["bbox"]
    found.pred_boxes = Boxes(torch.tensor([[x, y, x + width, y + height]], dtype=torch.float))
    found.scores, found.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.long)
    evaluator.process([{"image_id": 1}], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_stop_and_resume(weights: Path, tmp_path: Path) -> None:
    """A run is never started over; resumed, it goes on from its last checkpoint to the same end."""
    cfg = setup_finetune(FPN, weights, settings(tmp_path, "resumed", "TEST.EVAL_PERIOD", "1"))
    with pytest.raises(RunError, match="no checkpoint to evaluate"):
        finetune(cfg, eval_only=True)
    trained = finetune(cfg)
    stages = read_cost_log(tmp_path / "out")["stages"]  # no evaluation is part of the training
    assert stages["finetuning"]["images"] == 2 and stages["evaluation"]["images"] == 2 * 4
    assert finetune(cfg, eval_only=True)["bbox"]["AP50"] == pytest.approx(trained["bbox"]["AP50"])
    with pytest.raises(RunError, match="holds a run already: --resume"):
        finetune(cfg)
    cfg.SOLVER.MAX_ITER = 4
    finetune(cfg, resume=True)
    lines = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    steps = [json.loads(line) for line in lines if "total_loss" in line]
    assert [step["iteration"] for step in steps] == [1, 3]
    assert read_cost_log(tmp_path / "out")["stages"]["finetuning"]["images"] == 4
    other = convert(tmp_path, *THIN, name="other.pkl", seed=5)
    cfg.MODEL.WEIGHTS = str(other)
    (tmp_path / "out" / "weights_metadata.yaml").rename(tmp_path / "out" / "passport.yaml")
    with pytest.raises(RunError, match="started from other weights.*passport.yaml"):  # version 1's
        finetune(cfg, resume=True)


def test_proposals_without_res5(weights: Path, tmp_path: Path) -> None:
    """Detectron2's RPN on C4 has no res5; it is trained and evaluated all the same."""
    rpn = "COCO-Detection/rpn_R_50_C4_1x.yaml"
    cfg = setup_finetune(rpn, weights, settings(tmp_path, "proposals"))
    assert set(finetune(cfg)) == {"box_proposals"}


def test_jobs_that_cannot_be_done(weights: Path, tmp_path: Path) -> None:
    deeper = settings(tmp_path, "other_network", "MODEL.RESNETS.DEPTH", "101")
    with pytest.raises(ConfigError, match="config 101, weights 50"):
        setup_finetune(FPN, weights, deeper)
    with pytest.raises(WeightsError, match="DEPTH: file 50, network 101.*match-architecture"):
        finetune(setup_finetune(FPN, weights, deeper, force=True))
    out = ["OUTPUT_DIR", str(tmp_path / "boxes")]
    boxes = settings(tmp_path, "maskless", *out, masks=False)
    with pytest.raises(DataError, match="no segmentation"):
        finetune(setup_finetune(MASK, weights, boxes))
    deform = ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, True, True, True]"]
    deformable = convert(tmp_path, *THIN, *deform, name="deformable.pkl")
    with pytest.raises(RunError, match="cannot build.*not yet supported in res5"):
        finetune(setup_finetune(C4, deformable, [*boxes, *deform]))


def test_several_scales_at_test_time(weights: Path, tmp_path: Path) -> None:
    scales = ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(48, 64)"]
    scaled = settings(tmp_path, "scaled", *scales, "TEST.AUG.MAX_SIZE", "96")
    cfg = setup_finetune(FPN, weights, scaled)
    assert set(finetune(cfg)) == {"bbox", "bbox_TTA"}
    # Plain: 4 images. Augmented: 4 images x 2 scales x 2 flips.
    assert read_cost_log(tmp_path / "out")["stages"]["evaluation"]["images"] == 4 + 16
    cfg = setup_finetune(RETINANET, weights, [*scaled, "OUTPUT_DIR", str(tmp_path / "retina")])
    with pytest.raises(RunError, match="RetinaNet at one scale only"):
        finetune(cfg)


def test_from_scratch(tmp_path: Path) -> None:
    """Random weights, batch norm that trains, nothing frozen: every parameter moves."""
    free = ["MODEL.RESNETS.NORM", "BN", "SOLVER.CHECKPOINT_PERIOD", "1"]
    free += ["SOLVER.WARMUP_ITERS", "0", "SOLVER.BASE_LR", "0.01"]
    cfg = setup_finetune(FPN, "none", settings(tmp_path, "scratch", *free))
    finetune(cfg)
    one, two = (
        torch.load(tmp_path / "out" / f"model_{name}.pth", weights_only=True)["model"]
        for name in ("0000000", "final")
    )
    still = [
        k for k in one if "bottom_up" in k and k.endswith("weight") and torch.equal(one[k], two[k])
    ]
    assert not still


def test_on_from_a_whole_detector(tmp_path: Path, capsys) -> None:
    """The checkpoint of one fine-tuning as the start of another, heads and all."""
    first = settings(tmp_path, "first", "MODEL.RESNETS.NORM", "BN")
    finetune(setup_finetune(FPN, "none", first))
    checkpoint, out = tmp_path / "out" / "model_final.pth", tmp_path / "second_out"
    second = settings(tmp_path, "second", "OUTPUT_DIR", str(out), "MODEL.BACKBONE.FREEZE_AT", "0")
    assert main(["--config-file", FPN, "--weights", str(checkpoint), *second]) == 0
    assert "RESNETS: {NORM: BN, STRIDE_IN_1X1: false}" in capsys.readouterr().out
    log = (out / "log.txt").read_text()
    assert "tensors of the detector loaded" in log and "new, with random weights" not in log
    said = yaml.safe_load((out / "weights_metadata.yaml").read_text())
    assert said["origin"] == "detector" and len(said["digest"]) == 64
    cfg = setup_finetune(FPN, checkpoint, [*second, "SOLVER.MAX_ITER", "3"])
    finetune(cfg, resume=True)  # it is the same start
    torch.save({"model": build_detector(cfg).state_dict()}, checkpoint)
    with pytest.raises(RunError, match="started from other weights"):
        finetune(cfg, resume=True)


@pytest.mark.parametrize("at", ["step", "evaluation", "last evaluation"])
def test_told_to_stop_a_detector_goes_on_as_if_it_had_not_been(
    at: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "2", "SOLVER.BASE_LR", "0.01"]
    more += ["SEED", "-1"]
    given = settings(tmp_path, f"told_{at.replace(' ', '_')}", *more)

    def final(folder: str) -> dict:
        checkpoint = torch.load(tmp_path / folder / "model_final.pth", weights_only=True)
        return {**checkpoint["model"], "torch": checkpoint["random_states"][0]["torch"]}

    out = tmp_path / "out"
    told = []

    def tell(self, *args):
        result = (step if at == "step" else test)(self, *args)
        told.append(at == "evaluation" or len(told) == 1)  # in the second step or evaluation
        if told[-1] and told.count(True) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    step, test = FinetuneTrainer.run_step, FinetuneTrainer.test.__func__
    with monkeypatch.context() as patched:
        name, told_so = ("run_step", tell) if at == "step" else ("test", classmethod(tell))
        patched.setattr(FinetuneTrainer, name, told_so)
        with pytest.raises(SystemExit) as stopped:
            finetune(setup_finetune(FPN, weights, given))
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    names = {"step": "model_0000001.pth", "evaluation": "model_before_evaluation.pth"}
    assert (out / "last_checkpoint").read_text() == names.get(at, "model_final.pth")
    finetune(setup_finetune(FPN, weights, given), eval_only=True)  # which leaves the seed alone
    finetune(setup_finetune(FPN, weights, given), resume=True)
    resumed = final("out")
    seed = re.search(r"^SEED: (\d+)$", (out / "config.yaml").read_text(), re.MULTILINE)[1]
    cfg = setup_finetune(
        FPN, weights, [*given, "SEED", seed, "OUTPUT_DIR", str(tmp_path / "unbroken")]
    )
    finetune(cfg)
    whole = final("unbroken")
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_a_detector_that_diverges_says_what_to_lower(weights: Path, tmp_path: Path, caplog) -> None:
    wild = ["SOLVER.BASE_LR", "1e9", "SOLVER.MAX_ITER", "20", "SOLVER.CLIP_GRADIENTS.ENABLED"]
    wild += ["False", "SOLVER.WARMUP_ITERS", "0"]
    cfg = setup_finetune(FPN, weights, settings(tmp_path, "wild", *wild))
    with pytest.raises(
        RunError, match=r"iteration \d+: the detector diverged.*BASE_LR \(now 1e\+09"
    ):
        finetune(cfg)
    assert "Exception during training" not in caplog.text


def test_a_full_disk_leaves_the_last_checkpoint(weights: Path, tmp_path: Path, monkeypatch) -> None:
    """PyTorch's writer turns the system's error into one of its own."""
    cfg = setup_finetune(FPN, weights, settings(tmp_path, "full", "SOLVER.CHECKPOINT_PERIOD", "1"))
    save = torch.save

    def full(content: dict, stream) -> None:
        if "model_final" in stream.name:
            stream.write(b"half of it")
            raise RuntimeError("[enforce fail at inline_container.cc:858] . unexpected pos 64 vs 0")
        save(content, stream)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=r"model_final.pth.*model_0000000.pth is whole.*--resume"):
        finetune(cfg)
    assert [path.name for path in (tmp_path / "out").rglob("*tmp*")] == []
