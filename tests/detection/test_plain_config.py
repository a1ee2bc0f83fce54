"""The config for Detectron2's own tools/train_net.py runs where our code is unknown."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from detectron2.config import get_cfg
from helpers_weights import CATEGORIES, FPN, RESNET_18, SMALL, THIN, convert, make_coco

from jigsaw_d2.detection.config import setup_finetune, write_plain_config
from jigsaw_d2.io import ConfigError
from jigsaw_d2.tools.convert import main

# What tools/train_net.py does with --config-file, in a process that never imports our package.
TRAIN_NET = """
import sys
from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
config, name, json_file, images, output = sys.argv[1:]
register_coco_instances(name, {}, json_file, images)
cfg = get_cfg()
cfg.merge_from_file(config)
cfg.merge_from_list(["OUTPUT_DIR", output])
trainer = DefaultTrainer(cfg)
trainer.resume_or_load(resume=False)
trainer.train()
assert not [module for module in sys.modules if module.startswith("jigsaw")]
print("DONE", cfg.MODEL.ROI_HEADS.NUM_CLASSES)
"""


def test_detectron2s_trainer_runs_it_without_us(tmp_path: Path) -> None:
    weights = convert(tmp_path, *THIN)
    name, json_file, images = make_coco(tmp_path / "plain_data")[0]
    overrides = [*SMALL, *THIN, "DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()"]
    overrides += ["SOLVER.MAX_ITER", "1"]
    cfg = setup_finetune(FPN, weights, overrides, here=False)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3  # the weights', as the set is unknown here
    chosen = [*overrides, "MODEL.ROI_HEADS.NUM_CLASSES", "7"]
    assert setup_finetune(FPN, weights, chosen, here=False).MODEL.ROI_HEADS.NUM_CLASSES == 7
    write_plain_config(tmp_path / "plain.yaml", cfg)
    arguments = [str(tmp_path / "plain.yaml"), name, json_file, images, str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_NET, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.rstrip().endswith(f"DONE {len(CATEGORIES)}")
    log = done.stdout + done.stderr  # new heads are missing in the file; the backbone is not
    missing = log[log.index("not found in the checkpoint") :].split("DONE")[0]
    assert "bottom_up" not in missing and "roi_heads" in missing


def test_only_detectron2s_keys_and_only_what_differs(tmp_path: Path) -> None:
    weights = convert(tmp_path, *THIN)
    row = "finetune/faster_rcnn_R_50_C4_1x_jigsaw.yaml"
    cfg = setup_finetune(row, weights, THIN, here=False)
    write_plain_config(tmp_path / "plain.yaml", cfg)
    written = yaml.safe_load((tmp_path / "plain.yaml").read_text())
    plain = get_cfg()
    plain.merge_from_file(str(tmp_path / "plain.yaml"))  # refuses keys that are not its own
    assert plain.MODEL.WEIGHTS == str(weights) and plain.SOLVER.MAX_ITER == 95280
    assert plain.MODEL.PIXEL_STD == [58.395, 57.12, 57.375] and plain.INPUT.FORMAT == "RGB"
    assert "ROI_HEADS" not in written["MODEL"]  # C4 with COCO's 80 classes is the default
    assert "JIGSAW" not in written["MODEL"] and "COCO_FILES" not in written["DATASETS"]
    with pytest.raises(ConfigError, match="--force"):
        write_plain_config(tmp_path / "plain.yaml", cfg)


@pytest.mark.parametrize(
    "overrides",
    [("SOLVER.OPTIMIZER", "AdamW"), ("SOLVER.LAYER_DECAY", "0.8"), ("INPUT.READER", "own:read")],
)
def test_what_would_train_otherwise_there_is_refused(overrides: tuple, tmp_path: Path) -> None:
    cfg = setup_finetune(FPN, convert(tmp_path, *THIN), [*THIN, *overrides], here=False)
    with pytest.raises(ConfigError, match=f"{overrides[0]}: Detectron2's own script"):
        write_plain_config(tmp_path / "plain.yaml", cfg)


def test_the_command_writes_both(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    weights = convert(tmp_path, *RESNET_18, name="first.pkl")
    arguments = ["--input", str(weights), "--output", str(tmp_path / "w.pkl")]
    arguments += ["--config-file", FPN, "--write-config", str(tmp_path / "p.yaml")]
    assert main([*arguments, "--match-architecture", "SOLVER.MAX_ITER", "9"]) == 0
    said = capsys.readouterr().out
    assert "input_format: RGB" in said and f"{FPN} changed in" in said
    assert "fills 100 tensors of that detector; new in it: backbone.fpn_lateral2, " in said
    plain = get_cfg()
    plain.merge_from_file(str(tmp_path / "p.yaml"))
    assert (plain.MODEL.RESNETS.DEPTH, plain.SOLVER.MAX_ITER) == (18, 9)
