"""trainer.py: runs in Detectron2's engine, with what its users expect to find."""

import functools
import json
import logging

import pytest
import torch
import yaml
from detectron2.engine import HookBase
from helpers_run import tiny_cfg, tiny_options
from torch import nn
from torch._dynamo.utils import counters

from jigsaw_d2.engine.state import (
    check_same_start,
    get_random_state,
    read_checkpoint,
    set_random_state,
)
from jigsaw_d2.engine.trainer import JigsawTrainer
from jigsaw_d2.io import CheckpointError, ConfigError, RunError
from jigsaw_d2.modeling.losses import OBJECTIVES
from jigsaw_d2.modeling.trainable import set_aside_unused
from jigsaw_d2.tools import run_command
from jigsaw_d2.tools.pretrain import main


@pytest.fixture(autouse=True)
def undisturbed():
    """Runs set seeds and reconfigure loggers of the whole process; other tests share it."""
    state = get_random_state(torch.device("cpu"))
    names = ("detectron2", "fvcore", "jigsaw_d2")
    before = {
        n: (list(logging.getLogger(n).handlers), logging.getLogger(n).propagate) for n in names
    }
    yield
    set_random_state(state, torch.device("cpu"))
    for name, (handlers, propagate) in before.items():
        logging.getLogger(name).handlers[:] = handlers
        logging.getLogger(name).propagate = propagate


class Losses(HookBase):
    """The loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def after_step(self) -> None:
        self.values.append(self.trainer.storage.history("total_loss").latest())


def losses_of(folder, *overrides: object, seed: int = 0) -> list[float]:
    """Of four steps on the same images from the same weights."""
    torch.manual_seed(seed)
    common = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 0)
    name = ("MODEL.BACKBONE.NAME", "build_plain_tiny_backbone")
    hook = Losses()
    trainer = JigsawTrainer(tiny_cfg(folder, *common, *name, *overrides))
    trainer.register_hooks([hook])
    trainer.train()
    return hook.values


def test_a_whole_run_leaves_what_detectron2_users_expect(tmp_path):
    store = str(tmp_path / "store")
    options = tiny_options(tmp_path, "SOLVER.MAX_ITER", 20, "DATASETS.TEST", (store,))
    argv = ["--config-file", "Base-JigsawPretrain.yaml", *options, "TEST.EVAL_PERIOD", "10"]
    assert main(argv) == 0
    run = tmp_path / "run"
    names = {p.name for p in run.iterdir()}
    assert {"config.yaml", "log.txt", "metrics.json", "last_checkpoint", "cost.json"} <= names
    assert {"model_0000002.pth", "model_0000017.pth", "model_final.pth"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (run / "figures" / "first_batch.png").stat().st_size > 1000

    records = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    by_iteration = {record["iteration"]: record for record in records}
    first, last = by_iteration[19], records[-1]
    assert "erf/drift" in by_iteration[14]  # ahead of the step of iteration 15
    assert {"jigsaw/top1", "jigsaw/top1_background"} <= set(by_iteration[9])
    expected = {"total_loss", "lr", "time", "data_time", "images_per_s", "data_wait_share"}
    expected |= {"erf_share", "memory_mb"}
    expected |= {f"region/R{r}_{what}" for r in (1, 2, 3, 4) for what in ("loss", "top1", "top5")}
    assert expected <= set(first)
    assert first["images_per_s"] > 0 and 0 <= first["data_wait_share"] <= 1
    assert last["iteration"] == 20 and "jigsaw/top5_R4" in last
    log = (run / "log.txt").read_text()
    assert "eta: " in log and "images/s" in log and "NORM auto -> BN" in log

    checkpoint = read_checkpoint(run / "model_final.pth")
    assert checkpoint["iteration"] == 19
    jigsaw = checkpoint["jigsaw"]
    assert jigsaw["images_seen"] == jigsaw["sampler"]["position"] == 80
    assert jigsaw["store"]["categories"] == ["class0", "class1", "class2"]
    assert yaml.safe_load(jigsaw["config"]) == yaml.safe_load((run / "config.yaml").read_text())
    assert "erf_weights" in checkpoint["model"]
    stages = json.loads((run / "cost.json").read_text())["stages"]
    assert stages["pretraining"]["images"] == 80
    assert stages["pretraining"]["flops"] == 80 * 6 * stages["pretraining"]["macs_per_image"]
    assert stages["erf_refresh"]["images"] == 4 * 2 and stages["evaluation"]["images"] == 2 * 8


def test_evaluation_alone_repeats_what_training_said(tmp_path):
    store = str(tmp_path / "store")
    options = tiny_options(tmp_path, "SOLVER.MAX_ITER", 4, "DATASETS.TEST", (store,))
    main(["--config-file", "Base-JigsawPretrain.yaml", *options])
    run = tmp_path / "run"
    said = json.loads((run / "metrics.json").read_text().splitlines()[-1])
    config = (run / "config.yaml").read_bytes()
    weights = str(run / "model_final.pth")
    for extra in (["--resume"], []):
        overrides = [] if extra else ["MODEL.WEIGHTS", weights]
        cfg = tiny_cfg(tmp_path, "SOLVER.MAX_ITER", 4, "DATASETS.TEST", (store,), *overrides)
        trainer = JigsawTrainer(cfg)
        trainer.load_for_evaluation(resume=bool(extra))
        metrics = trainer.test(trainer.cfg, trainer.checkpointer.model)["jigsaw"]
        assert {f"jigsaw/{k}": v for k, v in metrics.items()}.items() <= said.items()
    argv = ["--eval-only", "--resume", "--config-file", "Base-JigsawPretrain.yaml", *options]
    assert main([*argv, "SOLVER.BASE_LR", "7.0"]) == 0
    assert (run / "config.yaml").read_bytes() == config  # an evaluation changes no run
    with pytest.raises(ConfigError, match="--eval-only: DATASETS.TEST names no"):
        main([*argv, "DATASETS.TEST", "()"])
    argv = ["--resume", "--config-file", "Base-JigsawPretrain.yaml", *options]
    for key, value in (("BASE_LR", "7.0"), ("OPTIMIZER", "AdamW"), ("WEIGHT_DECAY_BIAS", "0.5")):
        with pytest.raises(ConfigError, match=f"SOLVER.{key} was"):  # its state is of the former
            main([*argv, f"SOLVER.{key}", value])


def test_nothing_to_evaluate_is_said(tmp_path):
    trainer = JigsawTrainer(tiny_cfg(tmp_path))
    with pytest.raises(CheckpointError, match="nothing to evaluate: set MODEL.WEIGHTS"):
        trainer.load_for_evaluation()


def test_accumulation_gives_the_losses_of_the_large_batch(tmp_path):
    norm = ("MODEL.RESNETS.NORM", "")  # batch norm sees the passes apart
    whole = losses_of(tmp_path, *norm)
    parts = losses_of(tmp_path, *norm, "SOLVER.ACCUMULATION_STEPS", 4)
    assert parts == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    "overrides, tolerance",
    [
        (("MODEL.JIGSAW.CHANNELS_LAST", True), 1e-4),
        (("SOLVER.TF32", True), 1e-6),  # a CPU has none: the same sums
        (("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"), 2e-2),
        (("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16"), 5e-3),
    ],
)
def test_fast_ways_agree_with_plain_float32(tmp_path, overrides, tolerance):
    assert losses_of(tmp_path, *overrides) == pytest.approx(losses_of(tmp_path), rel=tolerance)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_compiled_backbone_agrees(tmp_path, monkeypatch, objective):
    """Captured and differentiated by torch.compile; its code generator takes minutes on a CPU.

    ERF refreshes and evaluations between the steps compile nothing more.
    """
    compiled = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", compiled)
    overrides = ("MODEL.JIGSAW.OBJECTIVE", objective, "TEST.EVAL_PERIOD", 2)
    overrides += ("MODEL.JIGSAW.ERF.PERIOD", 2, "DATASETS.TEST", (str(tmp_path / "store"),))
    plain = losses_of(tmp_path, *overrides)
    torch._dynamo.reset()
    counters.clear()
    compiled_losses = losses_of(tmp_path, *overrides, "MODEL.JIGSAW.COMPILE", True)
    assert compiled_losses == pytest.approx(plain, rel=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    names = set(read_checkpoint(tmp_path / "run" / "model_final.pth")["model"])
    assert "backbone.layers.0.weight" in names  # no prefix of the compiler's


def test_parts_of_the_backbone_that_do_nothing_are_named(tmp_path):
    """An output that is not classified: DistributedDataParallel would fail in the second step.

    Before anything is measured or trained, and leaving the random state to what is.
    """

    class Idle(JigsawTrainer):
        @classmethod
        def build_model(cls, cfg):
            model = super().build_model(cfg)
            model.backbone.aside = nn.Conv2d(32, 8, 1)
            return model

    message = "2 parameters of the backbone receive no gradient.*: aside.weight, aside.bias; let it"
    message += ".*build the classified outputs alone.*MODEL.JIGSAW.IN_FEATURES"
    cfg = tiny_cfg(tmp_path)
    with pytest.raises(ConfigError, match=message):
        Idle(cfg)
    assert not (tmp_path / "run" / "cost.json").exists()
    model, before = JigsawTrainer(cfg).model, torch.get_rng_state()
    set_aside_unused(model)
    assert torch.equal(torch.get_rng_state(), before) and model.backbone.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_every_rank_waits_until_the_bad_step_is_kept(tmp_path, monkeypatch):
    """The first rank to end takes the others with it; all tell what the bad one kept."""
    kept = f"replay_0000000_rank1.pth lies in {tmp_path}"
    (tmp_path / "run").mkdir()
    for own, gathered in ((1.5, ["", kept]), (float("nan"), None)):
        trainer = JigsawTrainer(tiny_cfg(tmp_path))
        trainer.iter, asked = 0, []

        def all_gather(text, others=gathered, asked=asked):
            asked.append(text)
            asked.append(sorted(p.name for p in (tmp_path / "run").glob("replay*")))
            return others or [text]

        monkeypatch.setattr("jigsaw_d2.engine.trainer.comm.all_gather", all_gather)
        with pytest.raises(RunError) as caught:
            trainer._stop_on_bad_loss({"total_loss": float("nan")}, {"total_loss": own})
        if gathered:  # a healthy rank says what the other one found
            assert asked == ["", []] and kept in str(caught.value)
        else:  # the bad one has written its file before it meets the others
            assert asked[1] == ["replay_0000000_rank0.pth"] and "the loss is nan" in asked[0]


def test_another_batch_size_is_refused_with_both(tmp_path):
    """It would skip images, or show some twice, at rates of another schedule."""
    JigsawTrainer(tiny_cfg(tmp_path, "SOLVER.MAX_ITER", 3)).train()
    trainer = JigsawTrainer(tiny_cfg(tmp_path, "SOLVER.MAX_ITER", 6, "SOLVER.IMS_PER_BATCH", 8))
    with pytest.raises(ConfigError, match="IMS_PER_BATCH was 4 .* is 8.*ACCUMULATION_STEPS"):
        trainer.resume_or_load()


def test_ranks_that_start_apart_are_told_so(monkeypatch):
    model = nn.Linear(2, 1)
    check_same_start(model, 5, "out")
    starts = {}
    monkeypatch.setattr(
        "jigsaw_d2.engine.state.comm.all_gather", lambda own: [own, starts.get("other", own)]
    )
    check_same_start(model, 5, "out")
    _, total = (5, sum(p.double().sum() for p in model.parameters()).item())
    for other in ((0, total), (5, total + 1)):
        starts["other"] = other
        with pytest.raises(
            RunError, match=f"rank 0: iteration 5; rank 1: iteration {other[0]}.*out"
        ):
            check_same_start(model, 5, "out")


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_checkpoint_goes_on_in_the_optimizers_form_of_this_machine(name, tmp_path):
    options = ("SOLVER.OPTIMIZER", name, "SOLVER.BASE_LR", 0.001, "SOLVER.MAX_ITER")
    JigsawTrainer(tiny_cfg(tmp_path, *options, 3)).train()
    path = tmp_path / "run" / "model_final.pth"
    content = torch.load(path, weights_only=True)
    for group in content["optimizer"]["param_groups"]:
        group["fused"] = True  # as a GPU's
    torch.save(content, path)
    trainer = JigsawTrainer(tiny_cfg(tmp_path, *options, 4))
    trainer.resume_or_load()
    assert not any(group["fused"] for group in trainer._trainer.optimizer.param_groups)
    trainer.train()


def test_gradient_clipping_by_config(tmp_path):
    clipped = losses_of(
        *(tmp_path, "SOLVER.CLIP_GRADIENTS.ENABLED", True),
        *("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1e-9),
        *("SOLVER.WEIGHT_DECAY", 0.0, "SOLVER.WEIGHT_DECAY_NORM", 0.0),
    )
    free = losses_of(tmp_path)
    assert clipped[0] == free[0] and clipped[1:] != free[1:]


@pytest.mark.parametrize("key, value", [("MODEL.BACKBONE.FREEZE_AT", 1)])
def test_a_frozen_stage_stops_the_start(tmp_path, key, value):
    with pytest.raises(ConfigError, match=key):
        JigsawTrainer(tiny_cfg(tmp_path, key, value))


def test_a_loss_that_is_not_finite_stops_the_run_and_can_be_repeated(tmp_path, capsys):
    cfg = tiny_cfg(tmp_path, "MODEL.JIGSAW.OBJECTIVE", "block_wise")

    class Spoil(HookBase):
        def before_step(self) -> None:
            if self.trainer.iter == 2:
                with torch.no_grad():
                    self.trainer.model.classifier.weight[0, 0] = float("inf")

    trainer = JigsawTrainer(cfg)
    trainer.register_hooks([Spoil()])
    with pytest.raises(RunError) as caught:
        trainer.train()
    path = tmp_path / "run" / "replay_0000002_rank0.pth"
    message = str(caught.value)
    assert message.startswith("iteration 2: the loss is nan")
    assert str(path) in message
    batch = next(iter(JigsawTrainer.build_train_loader(trainer.cfg, start_iter=2)))
    assert message.endswith(str(batch["sample_ids"].tolist()))
    # The last checkpoint (none was due) and metrics are untouched; the step repeats from the file.
    assert run_command(main, ["--replay", str(path)]) == 0
    said = capsys.readouterr().out
    assert "iteration 2: loss nan (the run saw nan)" in said
    assert "first module with an output that is not finite: classifier" in said
    assert "parameters not finite before the step: 1 classifier.weight" in said


def test_smoothing_windows_and_stateless_parts_survive_a_resume_in_process(tmp_path):
    JigsawTrainer(tiny_cfg(tmp_path, "SOLVER.MAX_ITER", 6)).train()
    trainer = JigsawTrainer(tiny_cfg(tmp_path, "SOLVER.MAX_ITER", 6))
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000002.pth")
    trainer.resume_or_load()
    assert trainer.start_iter == 3 and trainer.scheduler.last_epoch == 3
    trainer.train()
    assert len(trainer.storage.history("total_loss").values()) == 6
