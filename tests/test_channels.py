"""Images of four channels, 16 bits each: extracted, pre-trained on, converted, detected in."""

import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import yaml
from helpers_coco import annotation, write_json
from helpers_jobs import RUN
from helpers_run import tiny_options
from helpers_weights import FPN, SMALL, THIN

from jigsaw_d2 import __main__
from jigsaw_d2.checkpoint.reading import read_converted
from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.data.build import build_jigsaw_train_loader, jigsaw_stream
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.detection.config import setup_finetune
from jigsaw_d2.engine.run_config import resolve_config
from jigsaw_d2.engine.trainer import JigsawTrainer
from jigsaw_d2.io import ConfigError
from jigsaw_d2.tools import check, extract, run, visualize
from jigsaw_d2.tools.stages import Stage


def draw_set(folder: Path, count: int = 6) -> Path:
    """A COCO-format folder of uint16 (64, 64, 4) arrays: objects are bright in the last channel."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    entries, annotations = [], []
    for n in range(count):
        image = rng.integers(1000, 4000, (64, 64, 4), dtype=np.uint16)
        entries.append({"id": n + 1, "file_name": f"{n}.npy", "height": 64, "width": 64})
        for w, h in ((24, 20), (12, 30), (30, 10)):
            x, y = (int(v) for v in rng.integers(0, 30, 2))
            image[y : y + h, x : x + w, 3] += 40000
            one = annotation(n + 1, [float(x), float(y), float(w), float(h)], [1, 3][w > 20])
            annotations.append(one | {"area": float(w * h)})
        np.save(folder / f"{n}.npy", image)
    write_json(folder / "train.json", entries, annotations)
    return folder


def in_process(stage: Stage, argv: list[str]) -> None:
    """As ``run_subprocess``, without waiting for PyTorch again."""
    assert __main__.main(argv) == 0


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one command; every stage takes over what the one before has measured."""
    monkeypatch.setattr(RUN, in_process)
    monkeypatch.setattr(run, "finish", lambda job, seconds: job.run(seconds))
    monkeypatch.setattr("detectron2.engine.defaults.collect_env_info", str)
    data, out = draw_set(tmp_path / "set"), tmp_path / "out"
    source = ["--json", str(data / "train.json"), "--images", str(data), "--channels", "4"]
    source += ["--val-json", str(data / "train.json"), "--output", str(out), "--with-scratch"]
    options = dict(zip(*[iter(tiny_options(tmp_path))] * 2))
    pretrain = [
        s for k, v in options.items() if k not in ("DATASETS.TRAIN", "OUTPUT_DIR") for s in (k, v)
    ]
    pretrain += ["MODEL.BACKBONE.NAME", "build_resnet_backbone", *THIN, "MODEL.RESNETS.NORM", "BN"]
    pretrain += ["SOLVER.MAX_ITER", "2", "SOLVER.BASE_LR", "0.001"]
    pretrain += ["MODEL.JIGSAW.ERF.FIGURES", "True"]
    detector = [*SMALL, *THIN, "SOLVER.MAX_ITER", "2", "SOLVER.BASE_LR", "0.0001"]
    detector += ["MODEL.JIGSAW.SCRATCH_NORM", "BN"]
    configs = ["--config-file", "jigsaw_R_50.yaml", "--detector-config", FPN]
    assert run.main([*source, *configs, "--pretrain", *pretrain, "--detector", *detector]) == 0

    store = out / "samples" / "train" / "store"
    samples = SampleStore(store)
    assert (samples.channels, samples.dtype) == (4, np.uint16)
    whole = np.load(data / "0.npy")
    number = int(np.flatnonzero(samples.image_ids == 1)[0])
    x0, y0, x1, y1 = samples.boxes[number].astype(int)
    assert np.array_equal(samples.decode(number), whole[y0:y1, x0:x1])  # without loss
    pixels = np.concatenate([np.load(data / f"{n}.npy").reshape(-1, 4) for n in range(6)])
    assert samples.header["pixel_mean"] == pytest.approx(pixels.mean(axis=0), rel=1e-5)
    assert samples.header["pixel_std"] == pytest.approx(pixels.std(axis=0), rel=1e-5)
    assert "FORMAT: C4" in (out / "pretrain" / "config.yaml").read_text()
    arrays, metadata = read_converted(out / "weights" / "backbone.pkl")
    assert arrays["stem.conv1.weight"].shape[1] == 4 and metadata.input_format == "C4"
    assert list(metadata.pixel_std) == samples.header["pixel_std"]
    figure = tmp_path / "samples.png"
    assert visualize.main(["samples", str(store), "--output", str(figure)]) == 0 and figure.exists()
    for name in ("detector", "scratch"):
        assert "AP" in json.loads((out / name / "results.json").read_text())["bbox"]
        config = yaml.safe_load((out / name / "config.yaml").read_text())
        assert config["MODEL"]["PIXEL_MEAN"] == pytest.approx(samples.header["pixel_mean"])
    assert "all 265 tensors of the backbone" in (out / "detector" / "log.txt").read_text()
    with pytest.raises(ConfigError, match="INPUT.FORMAT is C4, but MODEL.PIXEL_MEAN is .123"):
        setup_finetune(FPN, "none", ["INPUT.FORMAT", "C4"])


def test_the_canvas_has_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 of what is not uint8, every channel drawn; as much memory is asked for."""
    data, store = draw_set(tmp_path / "set"), tmp_path / "store"
    source = ["--json", str(data / "train.json"), "--images", str(data)]
    assert check.main([*source, "--channels", "4"]) == 0
    extract.main([*source, "--output", str(store), "--channels", "4", "--workers", "0"])
    cfg = get_jigsaw_cfg("Base-JigsawPretrain.yaml", tiny_options(tmp_path, "INPUT.FORMAT", "RGBN"))
    images = jigsaw_stream(cfg, SampleStore(store))[range(2)]["image"]
    cfg.DATALOADER.NUM_WORKERS, free = 1, 2 * images.numel() * images.element_size()
    usage = SimpleNamespace(free=2 * free)  # two batches of four images, made ahead
    monkeypatch.setattr("jigsaw_d2.data.build.shutil.disk_usage", lambda folder: usage)
    build_jigsaw_train_loader(cfg)
    usage.free -= 1
    with pytest.raises(ConfigError, match="/dev/shm"):
        build_jigsaw_train_loader(cfg)
    assert images.dtype == torch.float32 and images.shape == (2, 4, 64, 64)
    assert images[:, 3].max() > 30000 and images[:, :3].max() < 4001
    assert all(images[:, c].max() > 1000 for c in range(4))


def test_numbers_of_the_users_stay(tmp_path: Path) -> None:
    """Though the trainer resolves the config once more."""
    data, store = draw_set(tmp_path / "set"), tmp_path / "store"
    source = ["--json", str(data / "train.json"), "--images", str(data)]
    extract.main([*source, "--output", str(store), "--channels", "4", "--workers", "0"])
    own = ("MODEL.PIXEL_MEAN", "[1.0, 2.0, 3.0, 4.0]")
    tiny = tiny_options(tmp_path, *own, "MODEL.BACKBONE.NAME", "build_resnet_backbone", *THIN)
    cfg = get_jigsaw_cfg("Base-JigsawPretrain.yaml", tiny)
    cfg = resolve_config(cfg, SampleStore(store), 1, own[:1])
    model = JigsawTrainer(cfg, explicit=own[:1]).cfg.MODEL
    assert list(model.PIXEL_MEAN) == [1, 2, 3, 4]
    assert list(model.PIXEL_STD) == SampleStore(store).header["pixel_std"]


def read_twice(path: str) -> np.ndarray:
    """A user's own reader: a picture beside its negative."""
    picture = cv2.imread(path)
    return np.concatenate([picture, 255 - picture], axis=2)


def test_a_users_reader(tiny_coco: Path, tmp_path: Path) -> None:
    source = ["--json", str(tiny_coco / "train.json"), "--images", str(tiny_coco / "images")]
    own = ["--channels", "6", "--reader", "test_channels:read_twice", "--workers", "0"]
    assert extract.main([*source, "--output", str(tmp_path / "six"), *own]) == 0
    store = SampleStore(tmp_path / "six")
    sample = store.decode(0).astype(int)
    assert sample.shape[2] == 6 and (sample[..., :3] + sample[..., 3:] == 255).all()
    assert store.header["pixel_mean"][0] + store.header["pixel_mean"][3] == pytest.approx(255)
