"""Pre-trains a ResNet of torchvision's with LightlyTrain, without labels, for a number of seconds.

For the arm ``lightly`` of ``compare.py``; it runs in an environment of its own, which has
LightlyTrain and not this project. LightlyTrain's documentation recommends distillation, whose
teacher would be downloaded. Of the methods that need none, DINOv2 is for vision transformers alone;
DINO is said to work well across kinds of images, and at less compute than SimCLR: so it is DINO,
with LightlyTrain's defaults for all else.

OUTPUT/trial, OUTPUT/training       what LightlyTrain writes
OUTPUT/progress.json                {"settings", "steps" to do, "done", "images", "seconds"}
OUTPUT/weights.pth                  torchvision's state dict, when all is done
"""

import argparse
import json
import math
import os
import shutil
import statistics
import time
from pathlib import Path
from unittest import mock

os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"  # it would report its use over the net

import lightly_train  # noqa: E402
import pytorch_lightning  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

METHOD = "dino"
BATCH_SIZE = 128  # LightlyTrain's default
TRIAL_STEPS = 4  # without the first


class Clock(pytorch_lightning.Callback):
    """Counts training steps and their seconds, data included; start-up and checkpoints are none.

    It ends the training after ``limit`` seconds, and hands itself to ``note`` after each step.
    """

    def __init__(self, limit=math.inf, done=0, seconds=0.0, note=lambda clock: None) -> None:
        self.limit, self.done, self.seconds, self.note = limit, done, seconds, note
        self.steps: list[float] = []  # seconds of each since the start

    def on_train_start(self, trainer, module) -> None:
        """What was lost since the checkpoint is done again, and counts once."""
        self.seconds *= trainer.global_step / max(1, self.done)
        self.done = trainer.global_step
        self._mark = time.perf_counter()  # an epoch gone on with has no start

    def on_train_epoch_start(self, trainer, module) -> None:
        """Before the first batch is asked for."""
        self._mark = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """A step has been taken."""
        now = time.perf_counter()
        self.steps.append(now - self._mark)
        self._mark = now
        self.done, self.seconds = self.done + 1, self.seconds + self.steps[-1]
        self.note(self)
        trainer.should_stop = trainer.should_stop or self.seconds >= self.limit


def main() -> None:
    """Measure a step, then train for as many as fill the time, or until it is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--json", required=True, help="COCO annotations, of which only the images' names are read")
    add("--images", required=True, help="their folder")
    add("--output", required=True, help="folder of everything that is made")
    add("--seconds", type=float, required=True, help="of training")
    add("--seed", type=int, default=0)
    add("--accelerator", choices=("cpu", "gpu"), default="cpu")
    add("--resume", action="store_true", help="go on with what an earlier call left")
    add("options", nargs="*", metavar="KEY=VALUE", help="of lightly_train.pretrain")
    args = parser.parse_args()

    output = Path(args.output)
    names = [entry["file_name"] for entry in json.loads(Path(args.json).read_bytes())["images"]]
    options = {"model": "torchvision/resnet18", "method": METHOD, "batch_size": BATCH_SIZE}
    options |= {"seed": args.seed, "accelerator": args.accelerator, "devices": 1}
    options |= OmegaConf.to_container(OmegaConf.from_dotlist(args.options))
    batch = options["batch_size"] = min(options["batch_size"], len(names))
    options["data"] = [str(Path(args.images, name)) for name in names]

    def train(folder: str, steps: int, clock: Clock, resume: bool = False) -> None:
        epochs = math.ceil(steps / (len(names) // batch))  # it drops the last, smaller batch
        again = {"resume_interrupted": True} if resume else {"overwrite": True}
        fit = pytorch_lightning.Trainer.fit

        def fit_with_clock(trainer, *args, **kwargs) -> None:
            trainer.callbacks.append(clock)  # LightlyTrain takes none of others
            fit(trainer, *args, **kwargs)

        with mock.patch.object(pytorch_lightning.Trainer, "fit", fit_with_clock):
            lightly_train.pretrain(
                **{"out": output / folder, "epochs": epochs, **again, **options},
                trainer_args={"max_steps": steps},
            )

    path = output / "progress.json"
    progress = json.loads(path.read_text()) if args.resume and path.is_file() else {}
    settings = {**options, "data": len(names), "seconds": args.seconds}
    if progress.get("settings") != settings:
        train("trial", TRIAL_STEPS, clock := Clock())
        step = statistics.median(clock.steps[1:])
        progress = {"settings": settings, "steps": max(1, int(args.seconds / step))}
        progress |= {"done": 0, "seconds": 0.0}

    def note(clock: Clock) -> None:
        progress.update(done=clock.done, images=clock.done * batch, seconds=clock.seconds)
        path.with_suffix(".part").write_text(json.dumps(progress, indent=1))
        path.with_suffix(".part").replace(path)

    started = progress["done"] and (output / "training" / "checkpoints" / "last.ckpt").is_file()
    clock = Clock(args.seconds, progress["done"], progress["seconds"], note)
    train("training", progress["steps"], clock, bool(started))
    shutil.copy(output / "training" / "exported_models" / "exported_last.pt", output / "part")
    (output / "part").replace(output / "weights.pth")


if __name__ == "__main__":  # the loader's processes import this file
    main()
