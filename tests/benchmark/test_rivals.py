"""What a user would pick instead: direct pre-training and LightlyTrain, for the Jigsaw's cost."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from helpers_jobs import RUN, FakeRunner, flag, tiny_set

import compare
from benchmark import runner
from benchmark.dry_run import estimate
from benchmark.plan import DIRECT, LIGHTLY, PRESETS, SCRATCH, check_lightly, jigsaw_arm, parse_arm
from benchmark.report import build_report, render, write_report
from benchmark.runner import DONE, FAILED, Comparison, small_images_overrides
from jigsaw_d2.checkpoint.metadata import WeightsMetadata
from jigsaw_d2.checkpoint.reading import read_converted
from jigsaw_d2.detection.config import load_detection_config
from jigsaw_d2.io import ConfigError
from jigsaw_d2.tools import convert, finetune
from jigsaw_d2.tools.time_budget import Trial

PLAN = dataclasses.replace(
    PRESETS["smoke"],
    arms=(DIRECT, jigsaw_arm(), SCRATCH),
    seeds=(0,),
    pretrain_iterations=45,
    detection_iterations=20,
)


def compared(fake, plan, folder: Path, monkeypatch) -> Comparison:
    monkeypatch.setattr(RUN, fake)
    data = tiny_set(folder / "set")
    comparison = Comparison(plan, data, folder / "out")
    comparison.execute()
    return comparison


@pytest.mark.parametrize("budget, scratch", [("total", 50), ("detection", 20)])
def test_direct_costs_what_jigsaw_costs(budget, scratch, tmp_path, monkeypatch):
    # 10 s extraction + 45 s pre-training + 5 s ERF are 30 steps of 2 s, and 20 of detection follow.
    fake = FakeRunner(lambda weights, seed: 10.0)
    comparison = compared(fake, dataclasses.replace(PLAN, budget=budget), tmp_path, monkeypatch)
    runs = {run.arm.name: run for run in comparison.runs}
    assert runs["direct"].iterations == {"pretraining": 30, "detection": 20}
    assert runs["direct"].cost_before_detection("seconds") == 60.0
    assert runs["scratch"].iterations == {"detection": scratch}
    # With warm-up 50 of the config cut to a tenth, and the steps at their fractions.
    trial, first, second = (argv for argv in fake.calls if "direct/seed0" in argv[-1])
    small = {"INPUT.MIN_SIZE_TRAIN": "(80,)", "INPUT.MAX_SIZE_TRAIN": "128"}
    small |= {"SOLVER.IMS_PER_BATCH": "16", "SOLVER.BASE_LR": "0.04"}
    schedule = {"SOLVER.MAX_ITER": "30", "SOLVER.STEPS": "(24, 28)", "SOLVER.WARMUP_ITERS": "3"}
    assert {key: flag(first, key) for key in {**small, **schedule}} == {**small, **schedule}
    assert {key: flag(trial, key) for key in small} == small | {"SOLVER.BASE_LR": "0.001"}
    assert flag(first, "--weights") == flag(trial, "--weights") == "none"
    assert flag(second, "--weights").endswith("direct/seed0/pretrain/model_final.pth")
    assert flag(second, "SOLVER.MAX_ITER") == "20" and "SOLVER.BASE_LR" not in second
    assert "INPUT.MIN_SIZE_TRAIN" not in second
    text = render(build_report(comparison))
    assert "direct and lightly pre-train for as much as the Jigsaw run" in text
    assert "jigsaw erf_adaptive − direct" in text and "Norms: each arm at its best" in text


def test_sides_are_halved_and_the_batch_has_as_many_pixels():
    cfg = load_detection_config("finetune/faster_rcnn_R_50_FPN_ms_train_6x.yaml")
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (16, 0.02)
    assert small_images_overrides(cfg) == [
        *("INPUT.MIN_SIZE_TRAIN", "(320, 336, 352, 368, 384, 400)", "INPUT.MAX_SIZE_TRAIN", "666"),
        *("SOLVER.IMS_PER_BATCH", "64", "SOLVER.BASE_LR", "0.08"),
    ]


class DirectForReal(FakeRunner):
    """Whose detectors of the arm ``direct`` do train."""

    def _finetune(self, stage, folder, argv):
        if "direct" not in folder.parts:
            return super()._finetune(stage, folder, argv)
        assert finetune.main(argv[1:]) == 0


def test_direct_trains_on_from_all_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "step_seconds", lambda folder: 30.0)  # 60 s are 2 iterations
    monkeypatch.setattr("detectron2.engine.defaults.collect_env_info", str)  # asks compilers
    monkeypatch.setattr("jigsaw_d2.detection.meter.backbone_macs", lambda *size: 1)
    monkeypatch.setattr("jigsaw_d2.tools.job.TRIAL_STEPS", {"cpu": 1, "cuda": 1})
    tiny = ("MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.RPN.POST_NMS_TOPK_TEST", "8")
    tiny += ("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MAX_SIZE_TRAIN", "64")
    tiny += ("INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "64", "SOLVER.BASE_LR", "0.0001")
    tiny += ("SOLVER.IMS_PER_BATCH", "1", "DATALOADER.NUM_WORKERS", "0")
    plan = dataclasses.replace(PLAN, arms=(DIRECT, jigsaw_arm()), detection_iterations=1)
    plan = dataclasses.replace(plan, detector=(*plan.detector, *tiny), evaluations=1)
    comparison = compared(DirectForReal(), plan, tmp_path, monkeypatch)
    run = next(run for run in comparison.runs if run.arm == DIRECT)
    assert run.status == DONE and run.iterations == {"pretraining": 2, "detection": 1}
    folder = comparison.folder(run)
    assert run.costs["pretraining"]["images"] == 2 * 4 and run.costs["finetuning"]["images"] == 1
    first, second = (
        yaml.safe_load((folder / name / "config.yaml").read_text())
        for name in ("pretrain", "detector")
    )
    assert [c["INPUT"]["MIN_SIZE_TRAIN"] for c in (first, second)] == [[32], [64]]
    assert [c["MODEL"]["RESNETS"]["NORM"] for c in (first, second)] == ["BN", "BN"]
    assert "tensors of the detector loaded" in (folder / "detector" / "log.txt").read_text()
    said = (folder / "detector" / "weights_metadata.yaml").read_text()
    assert WeightsMetadata.from_yaml(said).origin == "detector"


def lightly_python(folder: Path, works: bool = True) -> Path:
    """An interpreter that knows one program: it leaves a torchvision state dict, or fails."""
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), folder / "state.pth")
    python = folder / "python"
    python.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, shutil, sys\n"
        "if sys.argv[1] == '-c': sys.exit(0)\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--output') + 1])\n"
        "(out / 'argv.json').write_text(json.dumps(sys.argv))\n"
        f"if not {works}: sys.exit('no memory left')\n"
        "done = {'steps': 9, 'done': 7, 'images': 56, 'seconds': 59.5}\n"
        "(out / 'progress.json').write_text(json.dumps(done))\n"
        f"shutil.copy({str(folder / 'state.pth')!r}, out / 'weights.pth')\n"
    )
    python.chmod(0o755)
    return python


class ConvertForReal(FakeRunner):
    """Converts what is no text."""

    def _convert(self, stage, folder, argv):
        if "lightly" not in folder.parts:
            return super()._convert(stage, folder, argv)
        assert convert.main(argv[1:]) == 0


def test_lightly_gets_the_seconds_goes_on_after_a_failure_and_becomes_weights(
    tmp_path, monkeypatch, capsys
):
    python = lightly_python(tmp_path, works=False)
    plan = dataclasses.replace(PLAN, arms=(LIGHTLY, jigsaw_arm()), lightly=("batch_size=8",))
    plan = dataclasses.replace(plan, lightly_python=str(python))
    comparison = compared(ConvertForReal(), plan, tmp_path, monkeypatch)
    run = comparison.runs[-1]
    assert run.status == FAILED and "status 1: no memory left" in run.error
    lightly_python(tmp_path)
    comparison = compared(ConvertForReal(), plan, tmp_path, monkeypatch)
    run = comparison.runs[-1]
    assert run.status == DONE and run.iterations == {"pretraining": 7, "detection": 20}
    assert run.costs["pretraining"] == {"images": 56, "flops": 0, "seconds": 59.5}
    assert "the time was over after 7 of 9 steps" in capsys.readouterr().out
    folder = comparison.folder(run)
    argv = json.loads((folder / "pretrain" / "argv.json").read_text())
    assert argv[2].endswith("lightly_pretrain.py") and argv[3] == "--resume"
    assert flag(argv, "--seconds") == "60.0" and flag(argv, "--accelerator") == "cpu"
    assert argv[-2:] == ["model=torchvision/resnet18", "batch_size=8"]
    arrays, metadata = read_converted(folder / "weights" / "backbone.pkl")
    assert (metadata.origin, metadata.dataset) == ("lightly_train", "")
    state = torch.load(tmp_path / "state.pth")
    assert torch.equal(torch.from_numpy(arrays["stem.conv1.weight"]), state["conv1.weight"])
    report = write_report(comparison, f"compare --lightly-python {python}")
    texts = report.read_text() + report.with_suffix(".json").read_text()
    assert str(tmp_path) not in texts and "LIGHTLY_PYTHON benchmark/lightly_pretrain.py" in texts
    before = run.cost_before_detection("seconds")
    comparison = compared(ConvertForReal(), plan, tmp_path, monkeypatch)  # all is done
    assert comparison.runs[-1].cost_before_detection("seconds") == before
    changed = dataclasses.replace(plan, lightly=("batch_size=16",))
    with pytest.raises(ConfigError, match="batch_size=8.* -> .*batch_size=16"):
        compared(ConvertForReal(), changed, tmp_path, monkeypatch)


def test_what_cannot_be_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match="take as long as a jigsaw arm"):
        dataclasses.replace(PLAN, arms=(DIRECT, SCRATCH)).checked()
    ours = dataclasses.replace(PLAN, arms=(LIGHTLY, jigsaw_arm()))
    with pytest.raises(ConfigError, match="no --lightly-python; make an environment"):
        ours.checked()
    with pytest.raises(ConfigError, match="FLOPs are not counted"):
        dataclasses.replace(ours, cost="flops").checked()
    with pytest.raises(
        ConfigError, match="(?s)nowhere has no LightlyTrain.*pip install lightly-tr"
    ):
        check_lightly(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="has no LightlyTrain"):
        check_lightly(sys.executable)
    check_lightly(str(lightly_python(tmp_path)))
    assert (parse_arm("direct"), parse_arm("lightly")) == (DIRECT, LIGHTLY)


def test_same_norm_gives_all_arms_the_norm_of_scratch():
    def detector(*argv):
        plan = compare.plan_from(compare.build_parser().parse_args(["--output", "x", *argv]))
        return plan.same_norm, plan.detector

    default = PRESETS["smoke"].detector
    assert detector() == (False, default)
    same = ("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0")
    assert detector("--same-norm") == (True, default + same)
    norm = ("MODEL.JIGSAW.SCRATCH_NORM", "GN")
    with pytest.raises(ConfigError, match="scratch trains with GN, the pre-training with BN"):
        detector("--same-norm", "--detector", *norm)
    gn = ("--pretrain", "MODEL.RESNETS.NORM", "GN", "--detector", *norm)
    assert detector("--same-norm", *gn)[1][-4:] == ("MODEL.RESNETS.NORM", "GN", *same[2:])


def test_a_dry_run_counts_them_as_the_dearest_jigsaw_run():
    # 45 * 0.5 s + 1 refresh of 3 s = 25.5 s, and 20 steps of 2 s.
    trial = Trial(pretrain_step=0.5, erf_refresh=3.0, detection_step=2.0, evaluation=9.0)
    assert estimate(PLAN, DIRECT, trial) == (0, 20, 65.5)
