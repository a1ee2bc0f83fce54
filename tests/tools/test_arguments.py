"""What commands share: help without heavy imports, --register in every process."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_weights import C4, FPN, SMALL, THIN, make_coco

from jigsaw_d2.io import ConfigError
from jigsaw_d2.tools import arguments
from jigsaw_d2.tools import finetune as finetune_command
from jigsaw_d2.tools import run_command

COMMANDS = ("convert", "finetune", "erf", "cost")
HEAVY = ("torch", "detectron2", "matplotlib", "numpy")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_argument(name: str, capsys: pytest.CaptureFixture) -> None:
    command = importlib.import_module(f"jigsaw_d2.tools.{name}")
    parser = command.build_parser()
    assert all(action.help for action in parser._actions)
    with pytest.raises(SystemExit) as done:
        command.main(["--help"])
    said = capsys.readouterr().out
    assert done.value.code == 0 and "--register MODULE" in said
    assert "examples:" in said or name in ("erf", "cost")


@pytest.mark.parametrize("name", COMMANDS)
def test_parsing_imports_nothing_heavy(name: str) -> None:
    """Without the package's own __init__, which is not the commands' to keep light."""
    code = f"""
import sys, types
package = types.ModuleType("jigsaw_d2")
package.__path__ = [{str(Path(arguments.__file__).parents[1])!r}]
sys.modules["jigsaw_d2"] = package
from jigsaw_d2.tools.{name} import build_parser
build_parser().format_help()
assert not [module for module in {HEAVY} if module in sys.modules]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="--register: no_such_module cannot be imported"):
        arguments.import_registered(["no_such_module"])


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


def test_a_mistake_in_it_is_one_line(capsys: pytest.CaptureFixture) -> None:
    options = ["--config-file", FPN, "--weights", "none", "--register", "no_such_module"]
    assert run_command(finetune_command.main, options) == 2
    assert "no_such_module cannot be imported" in capsys.readouterr().err
