"""What the tests of the CUDA path run in processes of their own, on the devices of ``fake_cuda``.

    cuda_child.py FOLDER

PyTorch is imported once; each job is a fork, which uses CUDA for itself. It writes its runs, each
as ``attempt`` returns it, to FOLDER/JOB.json.
"""

import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import detectron2.engine.defaults
import fake_cuda
import torch
import torch._dynamo
from helpers_run import PYRAMID, tiny_options, torchrun_variables
from helpers_store import make_store
from helpers_weights import C4, FPN, SMALL, make_coco

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.engine.trainer import JigsawTrainer
from jigsaw_d2.tools import convert, erf, finetune
from jigsaw_d2.tools import pretrain as pretrain_command
from jigsaw_d2.tools import visualize

CONFIGS = Path(__file__).parents[1] / "configs"
PRECISIONS = {
    "fp32": ("SOLVER.AMP.ENABLED", False),
    "bf16": ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"),
    "fp16": ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16"),
}
RUNS = PRECISIONS | {
    "compiled": (*PRECISIONS["fp16"], "MODEL.JIGSAW.COMPILE", True),
    "accumulated": (
        *PRECISIONS["fp16"],
        *("MODEL.JIGSAW.ACTIVATION_CHECKPOINTING", True, "SOLVER.ACCUMULATION_STEPS", 2),
    ),
    "levels": (
        *(*PRECISIONS["fp16"], *PYRAMID, "MODEL.JIGSAW.LEVELS", "assign"),
        *("MODEL.JIGSAW.ASSIGN_BOX_SIZE", 8, "MODEL.JIGSAW.IGNORE_PADDING", True),
    ),
}
# Seconds after which a job has hung.
TIMEOUT = 240
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
    for path in sorted(CONFIGS.glob("jigsaw_*.yaml"), key=lambda path: (len(path.name), path)):
        cfg = get_jigsaw_cfg(path.name)
        if cfg.MODEL.DEVICE == "cpu":
            continue
        cfg.MODEL.JIGSAW.TAU = cfg.SOLVER.MAX_ITER = 0
        cfg.INPUT.JIGSAW = cfg.OUTPUT_DIR = None
        cfg.MODEL.RESNETS.DEPTH = min(cfg.MODEL.RESNETS.DEPTH, 50)  # more of the same blocks
        same[path.stem] = first.setdefault(cfg.dump(), path.stem)
    return same


def attempt(command: Callable[[list[str]], object], *arguments: object) -> dict:
    """Call a command's ``main``.

    Returns:
        "error": the traceback, or "". "told": what the library told. Of each iteration of a
        pre-training, "steps": what it told since the end of the one before, and "graphs": the
        number of graphs compiled by then.
    """
    steps: dict[int, list] = {}
    graphs: dict[int, int] = {}
    plain, begin, error = JigsawTrainer.run_step, 0, ""

    with fake_cuda.listening() as told:

        def run_step(self: JigsawTrainer) -> None:
            nonlocal begin
            plain(self)
            steps[self.iter] = told[begin:]
            begin = len(told)
            graphs[self.iter] = torch._dynamo.utils.counters["stats"]["unique_graphs"]

        JigsawTrainer.run_step = run_step
        try:
            command([str(argument) for argument in arguments])
        except BaseException:
            error = traceback.format_exc()
        finally:
            JigsawTrainer.run_step = plain
    return {"error": error, "told": told, "steps": steps, "graphs": graphs}


def pretrain(output: Path, config: str, *overrides: object, flags: tuple[str, ...] = ()) -> dict:
    """train_net.py on the store beside the OUTPUT_DIR."""
    stores = (str(output.parent / "store"),)
    common = ("OUTPUT_DIR", output, "DATASETS.TEST", stores, "MODEL.DEVICE", "cuda")
    options = tiny_options(output.parent, *common, *overrides)
    return attempt(pretrain_command.main, "--config-file", config, *flags, *options)


def configs(folder: Path) -> dict:
    """The shipped configurations with their own backbones, narrow; each trained, then resumed."""
    found = {}
    for name in sorted(set(shipped_configs().values())):
        model = get_jigsaw_cfg(f"{name}.yaml").MODEL
        resnets = model.RESNETS
        width = 32 // resnets.NUM_GROUPS
        narrow = ("MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", width)
        if resnets.DEPTH > 34:
            narrow += ("MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.RESNETS.DEPTH", 50)
        run = (
            folder / name, f"{name}.yaml", *narrow, "MODEL.BACKBONE.NAME", model.BACKBONE.NAME,
            "MODEL.FPN.OUT_CHANNELS", 8, "MODEL.JIGSAW.ERF.NUM_IMAGES", 3,
            "MODEL.JIGSAW.ERF.PERIOD", 3, "MODEL.JIGSAW.ERF.FIGURES", True,
            "SOLVER.IMS_PER_BATCH", 2, "INPUT.JIGSAW.EVAL_IMAGES", 2, "SOLVER.MAX_ITER",
        )  # fmt: skip
        found[name] = pretrain(*run, 2)
        found[f"{name} resumed"] = pretrain(*run, 4, flags=("--resume",))
    return found


def commands(run: Path) -> dict:
    """What takes up a pre-training: the commands that use a device, each once."""
    config, weights, store = run / "config.yaml", run / "weights.pkl", run.parent / "store"
    images = ("--device", "cuda", "--num-images", 2)
    own = (*images[:2], "--config-file", config, "--weights", run / "model_final.pth")
    found = {
        "eval-only": attempt(
            pretrain_command.main, "--config-file", config, "--resume", "--eval-only"
        ),
        "convert": attempt(convert.main, "--input", run, "--output", weights),
        "erf": attempt(
            erf.main,
            *("--config-file", config, "--weights", weights, "--feature", "res5"),
            *(*images, "--size", 64, 64, "--save-maps", "--output", run / "erf"),
        ),
        "visualize erf": attempt(
            visualize.main, "erf", *own, *images, "--store", store, "--output", run / "erf.png"
        ),
        "visualize labels": attempt(
            visualize.main, "labels", *own, "--store", store, "--output", run / "labels.png"
        ),
    }
    files = make_coco(run / "coco", masks=False)
    sets = (files[0][0],)
    for config in (C4, FPN):
        output = run / Path(config).stem
        found[f"finetune {output.name}"] = attempt(
            finetune.main,
            *("--config-file", config, "--weights", weights, "--match-architecture"),
            *(*SMALL, "MODEL.DEVICE", "cuda", "SOLVER.MAX_ITER", 2, "OUTPUT_DIR", output),
            *("DATASETS.COCO_FILES", files, "DATASETS.TRAIN", sets, "DATASETS.TEST", sets),
        )
    return found


def precisions(folder: Path, variables: Sequence[dict[str, str]] = ({},) * len(RUNS)) -> dict:
    """Runs of three convolutions in each precision, and a compiled one.

    ``variables``: of torchrun, for each run, in a process of its.
    """
    found = {}
    for own, (name, overrides) in zip(variables, RUNS.items()):
        os.environ.update(own)
        output = folder / f"{name}_of_{own.get('WORLD_SIZE', 1)}"
        found[name] = pretrain(output, "Base-JigsawPretrain.yaml", *LONG_RUN, *overrides)
    return found


def one_rank(folder: Path) -> dict:
    return configs(folder) | commands(folder / "jigsaw_R_50") | precisions(folder)


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
        options = (*LONG_RUN, *RUNS["fp16"], "MODEL.JIGSAW.OBJECTIVE", "block_wise")
        options += ("MODEL.DEVICE", "cuda:1", "SOLVER.MAX_ITER", iterations)
        flags = ("--resume",) if name == "resumed" else ()
        found[name] = pretrain(folder / output, "Base-JigsawPretrain.yaml", *options, flags=flags)
        found[name]["random_state"] = torch.cuda.get_rng_state(1).tolist()
        lines = (folder / output / "metrics.json").read_text().splitlines()
        found[name]["memory_mb"] = [json.loads(line).get("memory_mb") for line in lines]
    return found


def work(folder: Path, name: str, scenario: Callable[..., dict], *arguments: object) -> None:
    """One job, in its fork; what it prints goes to FOLDER/JOB.log."""
    with open(folder / f"{name}.log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if scenario is not second_device:  # PyTorch counts no memory then
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    fake_cuda.make_usable()
    torch.set_num_threads(1)
    detectron2.engine.defaults.collect_env_info = str  # seconds of asking compilers for versions
    # PyTorch's compiler without the part that needs the GPU's own.
    compile_module = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self: compile_module(self, backend="aot_eager")
    found = scenario(folder, *arguments)
    (folder / f"{name}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # not through the libraries' ends, which ask for more of CUDA


def main(folder: Path) -> int:
    """0 where every job has written its file."""
    make_store(folder / "store")
    ranks = zip(*(torchrun_variables(2) for _ in RUNS))
    jobs = {f"rank{r}": (precisions, variables) for r, variables in enumerate(ranks)}
    jobs |= {"one_rank": (one_rank,), "second_device": (second_device,)}
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=work, args=(folder, n, *job)) for n, job in jobs.items()]
    for child in children:
        child.start()
    for child in children:
        child.join(TIMEOUT)
        child.kill()
    return 0 if all(child.exitcode == 0 for child in children) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
