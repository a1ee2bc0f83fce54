"""What commands share: help without heavy imports, --register in every process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.config.defaults import _C
from helpers_weights import C4, FPN, SMALL, THIN, make_coco

from jigsaw_d2.engine.pretrain import load_config
from jigsaw_d2.io import ConfigError
from jigsaw_d2.tools import finetune as finetune_command
from jigsaw_d2.tools import pretrain as pretrain_command
from jigsaw_d2.tools import run_command

HELP = """
import importlib, sys
from jigsaw_d2.__main__ import COMMANDS
for name in COMMANDS:
    parser = importlib.import_module(f"jigsaw_d2.tools.{name}").build_parser()
    said = parser.format_help()
    if name not in ("store", "visualize"):  # whose arguments are their sub-commands'
        assert all(action.help for action in parser._actions), name
        assert "--register MODULE" in said, name
heavy = {"torch", "detectron2", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_explains_every_argument_and_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


REGISTERS = """
from pathlib import Path
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import BACKBONE_REGISTRY, build_resnet_backbone

@BACKBONE_REGISTRY.register()
def build_my_backbone(cfg, input_shape):
    return build_resnet_backbone(cfg, input_shape)

register_coco_instances("my_registered_set", {{}}, {json!r}, {images!r})
"""


def test_finetune_knows_a_registered_set_and_backbone_in_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes: they start anew and import the module by themselves."""
    _, json_file, images = make_coco(tmp_path / "data")[0]
    (tmp_path / "my_registrations.py").write_text(REGISTERS.format(json=json_file, images=images))
    monkeypatch.syspath_prepend(str(tmp_path))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    settings = [*SMALL, *THIN, "MODEL.RESNETS.NORM", "BN", "SOLVER.MAX_ITER", "1"]
    settings += ["SOLVER.IMS_PER_BATCH", "2", "OUTPUT_DIR", str(tmp_path / "out")]
    settings += ["MODEL.BACKBONE.NAME", "build_my_backbone", "DATASETS.TEST", "()"]
    settings += ["MODEL.RPN.IN_FEATURES", "['res4']", "MODEL.ROI_HEADS.IN_FEATURES", "['res4']"]
    settings += ["MODEL.RESNETS.OUT_FEATURES", "['res4']"]
    settings += ["DATASETS.TRAIN", "('my_registered_set',)"]
    arguments = ["--config-file", C4, "--weights", "none", "--num-gpus", "2"]
    register = ["--register", "my_registrations"]
    assert run_command(finetune_command.main, [*arguments, *register, *settings]) == 0
    stages = json.loads((tmp_path / "out" / "cost.json").read_text())["stages"]
    assert stages["finetuning"]["images"] == 2
    assert (tmp_path / "out" / "model_final.pth").is_file()
    assert "my_registrations" in (tmp_path / "out" / "config.yaml").read_text()


def test_a_mistake_in_it_is_one_line(capsys: pytest.CaptureFixture) -> None:
    options = ["--config-file", FPN, "--weights", "none", "--register", "no_such_module"]
    assert run_command(finetune_command.main, options) == 2
    assert "no_such_module cannot be imported" in capsys.readouterr().err


def test_a_run_keeps_the_names_of_its_modules() -> None:
    """In its config, and so in its checkpoints, that others can say what it needs."""
    argv = ["--config-file", "jigsaw_R_18_cpu.yaml", "--register", "json", "--register", "json"]
    cfg = load_config(pretrain_command.build_parser().parse_args(argv))
    assert cfg.MODEL.JIGSAW.REGISTER == ["json"]


def test_trust_imports_them_for_who_opens_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the config's keys are known, to which they may add."""
    (tmp_path / "registers_for_a_run.py").write_text(
        "from detectron2.config.defaults import _C\n_C.MODEL.KEY_OF_A_RUN = 1"
    )
    (tmp_path / "config.yaml").write_text(
        "MODEL: {JIGSAW: {REGISTER: [registers_for_a_run]}, KEY_OF_A_RUN: 2}"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    argv = ["--config-file", str(tmp_path / "config.yaml")]
    parse = pretrain_command.build_parser().parse_args
    with pytest.raises(ConfigError, match=r"config.yaml: Non-existent config key: .*KEY_OF_A_RUN"):
        load_config(parse(argv))
    with pytest.raises(ConfigError, match=r"overrides .*: Non-existent key: MODEL.TYPO"):
        load_config(parse(["MODEL.TYPO", "1"]))
    assert "registers_for_a_run" not in sys.modules
    try:
        cfg = load_config(parse([*argv, "--trust"]))
        assert cfg.MODEL.KEY_OF_A_RUN == 2
        assert cfg.MODEL.JIGSAW.REGISTER == ["registers_for_a_run"]
    finally:
        del _C.MODEL["KEY_OF_A_RUN"]
    (tmp_path / "config.yaml").write_text("MODEL: {JIGSAW: {REGISTER: [no_such_module]}}")
    load_config(parse([*argv, "--trust"]))  # of which nothing may be needed
    assert "REGISTER: no_such_module is not imported (ModuleNotFoundError" in caplog.text


@pytest.mark.parametrize("key", ["MODEL.BACKBONE.NAME", "MODEL.META_ARCHITECTURE"])
def test_a_name_that_nobody_registered_is_one_line(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    _, json_file, images = make_coco(tmp_path / "data")[0]
    name = f"set of {key}"
    settings = [*SMALL, *THIN, "DATASETS.COCO_FILES", f"[['{name}', '{json_file}', '{images}']]"]
    settings += ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()", key, "build_nothing"]
    settings += ["MODEL.JIGSAW.REGISTER", "['its_module']", "OUTPUT_DIR", str(tmp_path / "out")]
    given = ["--config-file", C4, "--weights", "none"]
    assert run_command(finetune_command.main, [*given, *settings]) == 2
    assert "error: No object named 'build_nothing'" in (said := capsys.readouterr().err)
    assert said.endswith("its run had --register its_module: give the same\n")
