"""Where detection configs come from, and what differs between two."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from detectron2 import model_zoo
from helpers_weights import C4, FPN, RETINANET

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.detection.config import (
    changes_yaml,
    config_changes,
    get_key,
    load_detection_config,
)
from jigsaw_d2.io import ConfigError


def test_a_zoo_name_a_shipped_name_and_a_path(tmp_path: Path) -> None:
    assert load_detection_config(C4).MODEL.ROI_HEADS.NAME == "Res5ROIHeads"
    ours = load_detection_config("finetune/faster_rcnn_R_50_C4_1x.yaml")
    assert ours.MODEL.ROI_HEADS.NAME == "Res5ROIHeads" and ours.SOLVER.MAX_ITER == 95280
    (tmp_path / "mine.yaml").write_text("SOLVER:\n  MAX_ITER: 7\nVERSION: 2\n")
    assert load_detection_config(str(tmp_path / "mine.yaml")).SOLVER.MAX_ITER == 7


def test_a_zoo_base_lies_under_all_else_wherever_the_file_is(tmp_path: Path) -> None:
    """Own keys over the _BASE_ file's over the zoo's."""
    (tmp_path / "base.yaml").write_text("SOLVER:\n  MAX_ITER: 7\n  BASE_LR: 0.5\nVERSION: 2\n")
    (tmp_path / "leaf.yaml").write_text(
        f'_ZOO_BASE_: "{FPN}"\n_BASE_: "base.yaml"\nSOLVER:\n  BASE_LR: 0.25\n'
    )
    cfg = load_detection_config(str(tmp_path / "leaf.yaml"), ["SOLVER.GAMMA", "0.5"])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SOLVER.GAMMA) == (7, 0.25, 0.5)
    assert cfg.SOLVER.STEPS == (60000, 80000)  # the zoo's
    assert cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone"


LOADERS = [get_jigsaw_cfg, load_detection_config]


class TestCode:
    """Tags that run code are refused, but for those of Detectron2's own zoo."""

    @pytest.fixture()
    def bomb(self, tmp_path: Path) -> tuple[Path, Path]:
        witness, path = tmp_path / "ran", tmp_path / "bomb.yaml"
        call = f"open('{witness}', 'w').name"
        path.write_text(f'OUTPUT_DIR: !!python/object/apply:eval ["{call}"]\nVERSION: 2\n')
        return path, witness

    @pytest.mark.parametrize("load", LOADERS)
    def test_a_file_with_a_tag(self, load: Callable, bomb: tuple[Path, Path]) -> None:
        path, witness = bomb
        message = "bomb.yaml: refused.*tag !!python/object/apply:eval.*--trust"
        with pytest.raises(ConfigError, match=message):
            load(str(path))
        assert not witness.exists()
        assert load(str(path), trust=True).OUTPUT_DIR == str(witness) and witness.exists()

    @pytest.mark.parametrize(
        ("load", "line"),
        [
            *((load, "_BASE_: bomb.yaml") for load in LOADERS),
            *((load, "_BASE_: [leaf.yaml, bomb.yaml]") for load in LOADERS),
            (load_detection_config, "_ZOO_BASE_: FOLDER/bomb.yaml"),  # no file of the zoo's
        ],
    )
    def test_in_the_file_below(
        self, load: Callable, line: str, bomb: tuple[Path, Path], tmp_path: Path
    ) -> None:
        (tmp_path / "leaf.yaml").write_text("SEED: 1\nVERSION: 2\n")
        (tmp_path / "top.yaml").write_text(line.replace("FOLDER", str(tmp_path)) + "\n")
        with pytest.raises(ConfigError, match="bomb.yaml: refused"):
            load(str(tmp_path / "top.yaml"))
        assert not bomb[1].exists()

    def test_the_zoo_computes_its_anchors(self, tmp_path: Path) -> None:
        zoo = model_zoo.get_config_file(RETINANET)
        (tmp_path / "named.yaml").write_text(f'_ZOO_BASE_: "{RETINANET}"\n')
        (tmp_path / "below.yaml").write_text(f'_BASE_: "{zoo}"\n')
        for name in (RETINANET, str(tmp_path / "named.yaml"), str(tmp_path / "below.yaml")):
            assert len(load_detection_config(name).MODEL.ANCHOR_GENERATOR.SIZES[0]) == 3


def test_old_configs_are_upgraded_as_detectron2_does(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("MODEL:\n  WEIGHT: x.pkl\n")  # v1's name for WEIGHTS
    assert load_detection_config(str(tmp_path / "old.yaml")).MODEL.WEIGHTS == "x.pkl"


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("odd.yaml", [], "odd.yaml: no detection config.*COLOUR"),
        ("bad.yaml", [], "bad.yaml: no detection config"),
        ("empty.yaml", [], "empty.yaml: no config"),
        ("nothing.yaml", [], "no config 'nothing.yaml': not a file"),
        ("COCO-Detection/retinanet_R_50_FPN_1x.py", [], "a LazyConfig"),
        (FPN, ["NO.SUCH", "1"], "NO.SUCH"),
        (FPN, ["SOLVER.MAX_ITER", "many"], "MAX_ITER"),
        (FPN, ["SOLVER.MAX_ITER"], "overrides"),
    ],
)
def test_mistakes(
    name: str, overrides: list, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.yaml").write_text("COLOUR: red\nVERSION: 2\n")
    (tmp_path / "bad.yaml").write_text("A: [1\n")
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    with pytest.raises(ConfigError, match=message):
        load_detection_config(name, overrides)


def test_changes_between_two_configs() -> None:
    before = load_detection_config(FPN)
    after = before.clone()
    after.MODEL.RESNETS.STRIDE_IN_1X1 = False
    after.MODEL.PIXEL_STD = [1, 2, 3]
    after.MODEL.NEW = "key"  # unknown before: no change of it
    changes = config_changes(before, after)
    assert changes == {"MODEL.RESNETS.STRIDE_IN_1X1": False, "MODEL.PIXEL_STD": [1, 2, 3]}
    nested = {"MODEL": {"RESNETS": {"STRIDE_IN_1X1": False}, "PIXEL_STD": [1, 2, 3]}}
    assert yaml.safe_load(changes_yaml(changes)) == nested
    assert changes_yaml(config_changes(before, before)) == "{}\n"
    assert get_key(after, "MODEL.RESNETS.STRIDE_IN_1X1") is False
