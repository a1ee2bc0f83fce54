"""Detectron2 at work on this machine's libraries: launch, training, COCO evaluation, drawing."""

import datetime
import json
import os

import detectron2
import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, create_ddp_model, launch
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from PIL import Image

from jigsaw_d2.engine.launch import leave_group

ADAPTED = os.path.isfile(
    os.path.join(os.path.dirname(detectron2.__file__), "jigsaw_adaptation.json")
)
# x, y, width, height of the one object in each of four images of 96 x 64 pixels.
BOXES = [(8, 8, 40, 40), (20, 10, 30, 48), (50, 4, 40, 20), (2, 30, 60, 30)]


@pytest.fixture
def coco_set(tmp_path):
    """Name of a registered set of four images with a bright rectangle each, two categories."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number, (x, y, w, h) in enumerate(BOXES, start=1):
        pixels = rng.integers(0, 80, (64, 96, 3), dtype=np.uint8)
        pixels[y : y + h, x : x + w] += 150
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 64, "width": 96})
        annotations.append(
            {"id": number, "image_id": number, "category_id": 1 + number % 2, "iscrowd": 0}
            | {"bbox": [x, y, w, h], "area": w * h}
        )
    categories = [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}]
    annotations_file = tmp_path / "set.json"
    annotations_file.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    name = f"detectron2_running_{os.getpid()}"
    register_coco_instances(name, {}, str(annotations_file), str(tmp_path))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def _tiny_cfg(zoo_name, dataset, output_dir):
    cfg = model_zoo.get_config(zoo_name)
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 2
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 50
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (dataset,), (dataset,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR = 2, 2, 1e-3
    cfg.SOLVER.STEPS = (1,)
    cfg.OUTPUT_DIR = str(output_dir)
    return cfg


class _Trainer(DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)


@pytest.mark.parametrize("name", ["faster_rcnn_R_50_FPN_1x", "retinanet_R_50_FPN_1x"])
def test_a_zoo_detector_trains_evaluates_and_resumes(name, coco_set, tmp_path):
    """Two steps by DefaultTrainer with its hooks, evaluation at the end, one more step resumed."""
    torch.manual_seed(0)
    cfg = _tiny_cfg(f"COCO-Detection/{name}.yaml", coco_set, tmp_path)
    trainer = _Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert set(trainer.test(cfg, trainer.model)["bbox"]) >= {"AP", "AP50"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    losses = [line["total_loss"] for line in lines if "total_loss" in line]
    assert losses and np.isfinite(losses).all()

    cfg.SOLVER.MAX_ITER = 3
    resumed = _Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    resumed.train()
    assert resumed.iter == 3 and (tmp_path / "model_final.pth").is_file()


def _rank_main(folder):
    """Runs in each process: what Detectron2's comm, a collective and its DDP give."""
    total = torch.full((3,), float(comm.get_rank() + 1))
    torch.distributed.all_reduce(total)
    model = torch.nn.Linear(1, 1, bias=False)
    parallel = create_ddp_model(model, broadcast_buffers=False)
    # d(w * x)/dw is x: 1 in the first process, 2 in the second
    parallel(torch.full((1, 1), float(comm.get_rank() + 1))).sum().backward()
    report = {
        "backend": torch.distributed.get_backend(),
        "ranks": [comm.get_local_rank(), comm.get_local_size(), comm.get_world_size()],
        "sum": total.tolist(),
        "gathered": comm.all_gather({"rank": comm.get_rank()}),
        "seed": comm.shared_random_seed(),
        "grad": model.weight.grad.item(),
    }
    comm.synchronize()
    with open(os.path.join(folder, f"{comm.get_rank()}.json"), "w") as file:
        json.dump(report, file)
    leave_group()


@pytest.mark.skipif(not ADAPTED, reason="other releases may want CUDA for launch or DDP")
def test_launch_runs_two_processes_without_cuda(tmp_path, monkeypatch):
    """Gloo, as newer Detectron2 does; the processes see no GPU even where there is one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launch(
        _rank_main,
        num_gpus_per_machine=2,
        dist_url=f"file://{tmp_path}/rendezvous",
        args=(str(tmp_path),),
        timeout=datetime.timedelta(minutes=2),
    )
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for rank, report in enumerate((first, second)):
        assert report["backend"] == "gloo" and report["ranks"] == [rank, 2, 2]
        assert report["sum"] == [3.0, 3.0, 3.0] and report["grad"] == 1.5
        assert report["gathered"] == [{"rank": 0}, {"rank": 1}]
    assert first["seed"] == second["seed"]
