"""What the tests of the CUDA path run in processes of their own, on the devices of ``fake_cuda``.

    cuda_child.py SCENARIO FOLDER RESULT

Writes the scenario's runs, each as ``pretrain`` returns it, to the JSON file RESULT. FOLDER has their
OUTPUT_DIRs and the store of ``helpers_run.tiny_options``.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import detectron2.engine.defaults
import fake_cuda
import torch
from helpers_run import tiny_options

import jigsaw_d2.commands.pretrain
from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.trainer import JigsawTrainer

CONFIGS = Path(__file__).parents[1] / "configs"
PRECISIONS = {
    "fp32": ("SOLVER.AMP.ENABLED", False),
    "bf16": ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"),
    "fp16": ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16"),
}
# The ERF is measured before iterations 0 and 12; evaluation and checkpoint follow 11.
LONG_RUN = (
    *("SOLVER.MAX_ITER", 22, "SOLVER.CHECKPOINT_PERIOD", 12, "TEST.EVAL_PERIOD", 12),
    *("MODEL.JIGSAW.ERF.PERIOD", 12, "MODEL.RESNETS.NORM", "BN"),
)


def shipped_configs() -> dict[str, str]:
    """For each configuration meant for a GPU, the first that runs the same code: name -> name.

    They differ at most in numbers, and in how the loader makes the images.
    """
    first: dict[str, str] = {}
    same = {}
    for path in sorted(CONFIGS.glob("jigsaw_*.yaml")):
        cfg = get_jigsaw_cfg(path.name)
        if cfg.MODEL.DEVICE == "cpu":
            continue
        cfg.MODEL.JIGSAW.TAU = cfg.SOLVER.MAX_ITER = 0
        cfg.INPUT.JIGSAW = cfg.OUTPUT_DIR = None
        same[path.stem] = first.setdefault(cfg.dump(), path.stem)
    return same


def pretrain(output: Path, config: str, *overrides: object, flags: tuple[str, ...] = ()) -> dict:
    """train_net.py with OUTPUT_DIR ``output``.

    Returns:
        "error": the traceback, or "". "told": what the library told. "steps": for each iteration
        what it told since the end of the one before.
    """
    steps: dict[int, list] = {}
    plain, begin, error = JigsawTrainer.run_step, 0, ""
    stores = (str(output.parent / "store"),)
    common = ("OUTPUT_DIR", output, "DATASETS.TEST", stores, "MODEL.DEVICE", "cuda")
    options = tiny_options(output.parent, *common, *overrides)

    with fake_cuda.listening() as told:

        def run_step(self: JigsawTrainer) -> None:
            nonlocal begin
            plain(self)
            steps[self.iter] = told[begin:]
            begin = len(told)

        JigsawTrainer.run_step = run_step
        try:
            jigsaw_d2.commands.pretrain.main(["--config-file", config, *flags, *options])
        except BaseException:
            error = traceback.format_exc()
        finally:
            JigsawTrainer.run_step = plain
    return {"error": error, "told": told, "steps": steps}


def configs(folder: Path) -> dict:
    """The shipped configurations with their own backbones, narrow; each trained, then resumed."""
    found = {}
    for name in set(shipped_configs().values()):
        resnets = get_jigsaw_cfg(f"{name}.yaml").MODEL.RESNETS
        width = 32 // resnets.NUM_GROUPS
        narrow = ("MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", width)
        if resnets.DEPTH > 34:
            narrow += ("MODEL.RESNETS.RES2_OUT_CHANNELS", 32)
        run = (
            folder / name, f"{name}.yaml", *narrow, "MODEL.BACKBONE.NAME", "build_resnet_backbone",
            "MODEL.JIGSAW.ERF.PERIOD", 3, "MODEL.JIGSAW.ERF.FIGURES", True,
            "SOLVER.IMS_PER_BATCH", 2, "INPUT.JIGSAW.EVAL_IMAGES", 2, "SOLVER.MAX_ITER",
        )  # fmt: skip
        found[name] = pretrain(*run, 2)
        found[f"{name} resumed"] = pretrain(*run, 4, flags=("--resume",))
    return found


def precisions(folder: Path) -> dict:
    """A run of three convolutions in each precision."""
    return {
        name: pretrain(folder / name, "Base-JigsawPretrain.yaml", *LONG_RUN, *overrides)
        for name, overrides in PRECISIONS.items()
    }


def compiled(folder: Path) -> dict:
    """MODEL.JIGSAW.COMPILE; PyTorch's compiler without the part that needs a GPU's own compiler."""
    plain = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self, *args, **options: plain(self, backend="aot_eager")
    on = ("MODEL.JIGSAW.COMPILE", True)
    return {"compiled": pretrain(folder, "Base-JigsawPretrain.yaml", *LONG_RUN, *on)}


def one_rank(folder: Path) -> dict:
    return configs(folder) | precisions(folder) | compiled(folder / "compiled")


def rank(folder: Path) -> dict:
    """As one of torchrun's processes; TORCHRUN holds its variables for each run."""
    found = {}
    for variables, (name, overrides) in zip(
        json.loads(os.environ["TORCHRUN"]), PRECISIONS.items()
    ):
        os.environ.update(variables)
        found[name] = pretrain(folder / name, "Base-JigsawPretrain.yaml", *LONG_RUN, *overrides)
    return found


def second_device(folder: Path) -> dict:
    """MODEL.DEVICE cuda:1: a run ("whole"), and the same run in two parts ("begun", "resumed").

    Each with "random_state", of the device's generator afterwards, and "memory_mb" of its metrics.
    """
    found = {}
    for name, output, iterations in (
        ("whole", "whole", 22),
        ("begun", "parts", 20),
        ("resumed", "parts", 22),
    ):
        device = ("MODEL.DEVICE", "cuda:1", "MODEL.JIGSAW.OBJECTIVE", "block_wise")
        options = (*device, *LONG_RUN, "SOLVER.MAX_ITER", iterations)
        flags = ("--resume",) if name == "resumed" else ()
        found[name] = pretrain(folder / output, "Base-JigsawPretrain.yaml", *options, flags=flags)
        found[name]["random_state"] = torch.cuda.get_rng_state(1).tolist()
        lines = (folder / output / "metrics.json").read_text().splitlines()
        found[name]["memory_mb"] = [json.loads(line).get("memory_mb") for line in lines]
    return found


if __name__ == "__main__":
    scenario, folder, result = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    fake_cuda.make_usable()
    torch.set_num_threads(1)
    detectron2.engine.defaults.collect_env_info = str  # seconds of asking compilers for versions
    result.write_text(json.dumps(globals()[scenario](folder)))
    sys.stdout.flush()
    os._exit(0)  # not through the libraries' ends, which ask for more of CUDA
