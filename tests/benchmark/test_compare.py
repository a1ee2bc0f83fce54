"""Comparisons: equal budgets, pairs, failures told, several runs at once, and the report."""

import dataclasses
import json
import os
import re
import signal
import time
from pathlib import Path
from unittest import mock
from unittest.mock import ANY

import pytest
from helpers_jobs import RUN, FakeRunner, flag, tiny_set

import compare
from benchmark.plan import (
    ABLATIONS,
    FIT_METHODS,
    OBJECTIVES,
    PRESETS,
    SCRATCH,
    Arm,
    jigsaw_arm,
    parse_arm,
)
from benchmark.pool import Pool
from benchmark.report import (
    build_report,
    curve_figure,
    interval,
    render,
    verdict,
    write_report,
)
from benchmark.runner import DONE, FAILED, PENDING, Comparison
from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.cost import record_stage
from jigsaw_d2.data.assembly import METHODS
from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.detection.config import load_detection_config
from jigsaw_d2.io import ConfigError
from jigsaw_d2.modeling import losses
from jigsaw_d2.modeling.levels import check_levels
from jigsaw_d2.tools.pipeline import Pipeline

PLAN = dataclasses.replace(PRESETS["smoke"], pretrain_iterations=45, detection_iterations=20)


@pytest.fixture
def data(tmp_path):
    return tiny_set(tmp_path / "set")


class Faked(Comparison):
    """Computes nothing, in jobs of other processes too."""

    def __init__(self, runner, *args, **options):
        super().__init__(*args, **options)
        self.runner = runner

    def execute(self, *args, **options):
        with mock.patch(RUN, self.runner):
            return super().execute(*args, **options)

    def execute_run(self, run):
        with mock.patch(RUN, self.runner):
            return super().execute_run(run)


def compare_with(runner, data, tmp_path, plan=PLAN, **options):
    comparison = Faked(runner, plan, data, tmp_path / "out", **options)
    comparison.execute()
    return comparison


def score(weights, seed):
    """Jigsaw is worth 5 AP; seeds move everything by up to 2."""
    return 10.0 + seed % 1000 + (5.0 if "jigsaw" in weights else 0.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole comparison, to be read; its runner is ``finished.runner``."""
    folder = tmp_path_factory.mktemp("finished")
    return compare_with(FakeRunner(score), tiny_set(folder / "set"), folder)


def test_scratch_costs_what_jigsaw_costs_in_all(finished):
    # 10 s extraction + 45 s pre-training + 5 s ERF = 60 s; a detection step is 2 s: 30 more steps.
    lengths = {run.arm.name: run.iterations["detection"] for run in finished.runs}
    assert lengths == {"jigsaw erf_adaptive": 20, "scratch": 50, "scratch again": 50}
    for run in finished.runs:  # equal total cost
        assert run.cost_before_detection("seconds") + run.costs["finetuning"]["seconds"] == 100.0
    finetunings = [argv for argv in finished.runner.calls if "detector" in argv[-1]]
    steps = {flag(argv, "SOLVER.MAX_ITER"): flag(argv, "SOLVER.STEPS") for argv in finetunings}
    # The schedule keeps its shape: the config has steps (640, 750) of 800.
    assert steps == {"20": "(16, 19)", "50": "(40, 47)"}
    # The curve of AP over cost begins behind the cost of pre-training.
    curves = {run.arm.name: run.cost_curve("seconds") for run in finished.runs if run.index == 0}
    assert curves == {
        "jigsaw erf_adaptive": [(100.0, 15.0)],
        "scratch": [(100.0, 10.0)],
        "scratch again": [(100.0, 10.0)],
    }


@pytest.mark.parametrize("step, iterations", [(2.5, 40), (1.0, 100), (5.0, 20), (200.0, 1)])
def test_scratch_is_priced_at_its_own_steps(step, iterations, data, tmp_path):
    """60 s and 20 steps of 2 s are 100 s, whatever the Jigsaw detector's steps cost."""
    plan = dataclasses.replace(PLAN, seeds=(0,), arms=(SCRATCH, jigsaw_arm()))
    comparison = compare_with(FakeRunner(scratch_step=step), data, tmp_path, plan)
    lengths = {run.arm.name: run.iterations["detection"] for run in comparison.runs}
    assert lengths == {"jigsaw erf_adaptive": 20, "scratch": iterations}


def test_equal_detection_cost_and_settings_but_for_weights_and_seed(data, tmp_path):
    runner = FakeRunner(score)
    plan = dataclasses.replace(PLAN, budget="detection", evaluations=3)
    comparison = compare_with(runner, data, tmp_path, plan)
    assert {run.iterations["detection"] for run in comparison.runs} == {20}
    seen = set()
    for argv in (list(argv) for argv in runner.calls if argv[0] == "finetune"):
        # After 7 and 14 of 20 steps; the third is the one at the end. Every 6 would make a fourth.
        assert flag(argv, "TEST.EVAL_PERIOD") == "7"
        for name in ("--weights", "SEED", "OUTPUT_DIR"):
            argv[argv.index(name) + 1] = "*"
        seen.add(tuple(argv))
    assert len(seen) == 1


def test_aa_arm_has_other_seeds_and_the_report_tells_chance(finished):
    seeds = {run.arm.name: [] for run in finished.runs}
    for run in finished.runs:
        seeds[run.arm.name].append(run.seed)
    assert seeds["scratch"] == [0, 1, 2] and seeds["scratch again"] == [1000, 1001, 1002]
    report = build_report(finished, "compare")
    found = {(d["ours"], d["theirs"]): d["AP"] for d in report["differences"]}
    assert found["scratch again", "scratch"]["covers_zero"]
    jigsaw = found["jigsaw erf_adaptive", "scratch"]
    assert jigsaw["mean"] == pytest.approx(5.0) and not jigsaw["covers_zero"]
    text = render(report)
    assert "A/A test" in text and "covers zero" in text and "above zero" in text


def test_finished_runs_are_not_run_again(finished):
    comparison = compare_with(None, finished.data, finished.output.parent)
    assert [vars(run) for run in comparison.runs] == [vars(run) for run in finished.runs]


def test_pairs_cost_the_same_however_much_the_machine_sways(data, tmp_path):
    class Swaying(FakeRunner):
        """Pre-training with seed s costs 10 s seconds more."""

        def _pretrain(self, stage, folder, argv):
            super()._pretrain(stage, folder, argv)
            record_stage(folder, "pretraining", seconds=10.0 * int(flag(argv, "SEED")))

    plan = dataclasses.replace(PLAN, seeds=(0, 1))
    compare_with(Swaying(score), data, tmp_path, plan)
    runner = Swaying(score)
    comparison = compare_with(runner, data, tmp_path)
    # 60 s, 70 s, 80 s before detection, 2 s a step: 30, 35, 40 steps beside the 20 of all.
    lengths = {(r.arm.name, r.index): r.iterations["detection"] for r in comparison.runs}
    for name in ("scratch", "scratch again"):
        assert [lengths[name, index] for index in range(3)] == [50, 55, 60]
    # The third seed changed none of the runs of the first two.
    detectors = [argv for argv in runner.calls if "detector" in argv[-1]]
    assert [flag(argv, "SEED") for argv in detectors] == ["2", "2", "1002"]


def test_a_failed_run_stays_in_the_report_and_its_pair_waits(data, tmp_path):
    def fail(argv):
        return argv[0] == "pretrain" and flag(argv, "SEED") == "1"

    comparison = compare_with(FakeRunner(score, fail), data, tmp_path)
    status = {(run.arm.name, run.seed): run.status for run in comparison.runs}
    waiting = {("scratch", 1), ("scratch again", 1001)}
    assert {key for key, value in status.items() if value == PENDING} == waiting
    assert {key for key, value in status.items() if value == FAILED} == {("jigsaw erf_adaptive", 1)}
    report = build_report(comparison)
    text = render(report)
    assert "failed: pretrain broke " in text and "2 of 3" in text
    assert "not run: its length follows from what jigsaw erf_adaptive, seed 1 costs" in text
    assert "**3 run(s) failed or did not run yet" in text
    entry = next(d for d in report["differences"] if d["ours"] == "jigsaw erf_adaptive")
    assert entry["AP"]["count"] == 2
    # The cause mended, the same command completes it, and changes nothing else.
    runner = FakeRunner(score)
    comparison = compare_with(runner, data, tmp_path)
    assert {run.status for run in comparison.runs} == {DONE}
    calls = [argv[0] for argv in runner.calls]
    assert calls == ["pretrain", "convert"] + 5 * ["finetune"]  # two of them trials


def test_without_a_jigsaw_run_nothing_is_called_equal(data, tmp_path):
    comparison = compare_with(FakeRunner(score, lambda argv: argv[0] == "pretrain"), data, tmp_path)
    assert {run.status for run in comparison.runs} == {FAILED, PENDING}
    text = render(build_report(comparison))
    assert "no Jigsaw run has finished, so nothing here is at equal total cost" in text
    assert "Table 5" not in text and "no common seeds finished" in text
    # Weights from elsewhere need no pre-training.
    weights = tmp_path / "imagenet.pkl"
    weights.write_text("weights")
    plan = dataclasses.replace(PLAN, arms=(parse_arm(f"imagenet={weights}"), SCRATCH), seeds=(0,))
    comparison = compare_with(FakeRunner(score), data, tmp_path / "2", plan)
    assert {argv[0] for argv in comparison.runner.calls} == {"finetune"}
    assert {run.iterations["detection"] for run in comparison.runs} == {20}
    text = render(build_report(comparison))
    assert "no arm pre-trains here" in text and "one seed: no interval" in text


def test_other_settings_are_refused_with_both_shown_and_nothing_changes(data, tmp_path, jobs):
    plan = dataclasses.replace(PLAN, budget="detection", seeds=(0,), arms=(SCRATCH,))
    comparison = compare_with(FakeRunner(score), data, tmp_path, plan)
    write_report(comparison, "compare")
    before = {path: path.read_bytes() for path in comparison.output.rglob("*") if path.is_file()}
    changed = dataclasses.replace(plan, detection_iterations=30)
    for pool in (None, jobs):
        runner = FakeRunner(score)
        comparison = Faked(runner, changed, data, tmp_path / "out")
        with pytest.raises(ConfigError, match="SOLVER.MAX_ITER: 20 -> 30"):
            comparison.execute(lambda: write_report(comparison, "compare"), pool)
        assert runner.calls == []
    after = {path: path.read_bytes() for path in comparison.output.rglob("*") if path.is_file()}
    assert after == before


def test_no_time_leaves_runs_pending_and_listed(data, tmp_path):
    runner = FakeRunner(score)
    comparison = compare_with(runner, data, tmp_path, minutes=0)
    assert runner.calls == []
    assert {run.status for run in comparison.runs} == {PENDING}
    text = render(build_report(comparison))
    assert text.count("not run: the time allowed was over") == 3  # scratch waits for these
    assert text.count("not run: its length follows") == 6


def test_report_is_whole_hides_local_paths_and_tells_where_settings_differ(finished):
    config = finished.folder(finished.runs[0]) / "detector" / "config.yaml"
    config.write_text("SEED: 1\nSOLVER:\n  LENGTH: 99\n")
    for run in finished.runs:  # its own cleaned data are no other setting
        config = finished.folder(run) / "detector" / "config.yaml"
        files = f"DATASETS:\n  COCO_FILES: [[set, {config.parent}/set.json]]\n"
        config.write_text(config.read_text() + files)
    path = write_report(finished, f"compare --output {finished.output}")
    text, report = path.read_text(), json.loads(path.with_suffix(".json").read_text())
    assert str(finished.output.parent) not in text + json.dumps(report)
    assert {arm["name"] for arm in report["arms"]} == {arm.name for arm in PLAN.arms}
    assert "](figures/ap_over_cost.png)" in text
    assert (path.parent / "figures/ap_over_cost.png").stat().st_size > 5000
    assert "differ, beside weights, seed and folder, in:" in text
    assert re.search(r"\| `SOLVER.LENGTH` +\| 99 ", text) and "`SEED`" not in text
    assert "COCO_FILES`" not in text


def test_the_figure_shows_mean_and_range_over_seeds():
    def arm(name, *curves):
        return {"name": name, "runs": [{"cost_curve": curve} for curve in curves]}

    # Two seeds, one of which found nothing at its first evaluation, and an arm not run yet.
    arms = [arm("a", [(1, 2.0), (3, 4.0)], [(5, 8.0)]), arm("b", [])]
    report = {"cost": "seconds", "dataset": {"name": "set"}, "arms": arms}
    axes = curve_figure(report).axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[4.0, 6.0]]]
    low, high = axes.collections[0].get_paths()[0].get_extents().intervaly
    assert (low, high) == (4.0, 8.0)


def test_arms_from_the_command_line(tmp_path):
    weights = tmp_path / "imagenet.pkl"
    weights.touch()
    assert parse_arm("scratch-again").seed_offset > 0
    assert parse_arm("jigsaw:global").pretrain == ("MODEL.JIGSAW.OBJECTIVE", "global")
    assert parse_arm("jigsaw").name == "jigsaw erf_adaptive"
    assert parse_arm(f"imagenet={weights}").weights == weights
    for bad in ("nonsense", "jigsaw:nonsense", f"x={tmp_path / 'none'}"):
        with pytest.raises(ConfigError):
            parse_arm(bad)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_differ_in_one_thing_and_have_names_of_their_own(name):
    arms = ABLATIONS[name]
    assert len({arm.slug for arm in arms}) == len(arms) >= 2
    assert len({(arm.pretrain, arm.extract, arm.length) for arm in arms}) == len(arms)
    dataclasses.replace(PLAN, arms=arms).checked()


@pytest.mark.parametrize(
    "change, what",
    [
        ({"arms": ()}, "names of their own"),
        ({"arms": (Arm("a b", "scratch"), Arm("a-b", "scratch"))}, "names of their own"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"seeds": (0, 1000)}, "within"),  # would meet the A/A arm's
    ],
)
def test_impossible_plans_are_refused(change, what):
    with pytest.raises(ConfigError, match=what):
        dataclasses.replace(PLAN, **change).checked()


def test_no_run_at_a_time_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--jobs is 0"):
        compare.main(["--output", str(tmp_path), "--jobs", "0"])


def test_plans_name_what_there_is():
    assert set(OBJECTIVES) <= set(losses.OBJECTIVES) and FIT_METHODS == METHODS
    for name, plan in PRESETS.items():
        assert plan.checked().preset == name
        get_jigsaw_cfg(plan.pretrain_config, list(plan.pretrain))
        load_detection_config(plan.detector_config, plan.detector)


def test_the_command_line_changes_the_preset():
    argv = ["--output", "x", "--preset", "small", "--seeds", "4", "--budget", "detection"]
    argv += ["--ablation", "tau", "--pretrain", "SEED", "7", "--register", "json"]
    argv += ["--cluster", "slurm", "--num-gpus", "2"]
    plan = compare.plan_from(compare.build_parser().parse_args(argv))
    assert (plan.seeds, plan.budget, plan.num_gpus) == ((4,), "detection", 2)
    assert plan.pipeline(None, seed=4) == Pipeline(
        None, plan.pretrain_config, plan.detector_config, 2, ("json",), False, 4
    )
    assert (plan.cost, plan.evaluations) == (PRESETS["small"].cost, PRESETS["small"].evaluations)
    assert [arm.name for arm in plan.arms] == [
        *(f"tau {value}" for value in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        *("scratch", "scratch again"),
    ]
    # A cluster's GPUs are used where this machine has none.
    assert plan.pretrain[-4:] == ("MODEL.DEVICE", "cuda", "SEED", "7")
    assert plan.detector[-2:] == ("MODEL.DEVICE", "cuda")


def test_dry_run_lists_arms_and_runs_nothing(data, tmp_path, monkeypatch, capsys):
    runner = FakeRunner()
    monkeypatch.setattr(RUN, runner)
    argv = ["--data", str(tmp_path / "set"), "--output", str(tmp_path / "out"), "--dry-run"]
    assert compare.main(argv) == 0
    printed = capsys.readouterr().out
    for name in ("jigsaw erf_adaptive", "scratch again", "0 1 2", "1000 1001 1002", "9 runs"):
        assert name in printed
    assert "a trial here took 1.000 s a step of pre-training" in printed
    assert not (tmp_path / "out").exists()


def test_intervals_equal_the_printed_table_and_the_hand_count():
    # 1, 2, 3: mean 2, s = 1, half width = 4.3027 * 1 / sqrt(3) = 2.4841.
    found = interval([1, 2, 3])
    assert found == {"mean": 2, "half_width": ANY, "count": 3, "covers_zero": True}
    assert found["half_width"] == pytest.approx(2.4841, abs=1e-4)
    # 0, 2: s = sqrt(2), half width = 12.706 * sqrt(2) / sqrt(2).
    assert interval([0, 2])["half_width"] == pytest.approx(12.706, abs=1e-3)
    assert verdict(interval([-1, 0])) == "interval covers zero: not told apart from chance"
    assert verdict(interval([-2.0, -2.0])) == "below zero"
    one = {"mean": 7.0, "half_width": None, "count": 1, "covers_zero": None}
    assert interval([7.0]) == one and interval([]) is None


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """A pool of three local jobs; the environment is restored behind what it sets."""
    for name in ("PYTHONPATH", "SUBMITIT_PREEMPT_SIGNAL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Pool(tmp_path / "jobs", 3)


def test_several_runs_at_once_give_what_one_after_another_gives(data, tmp_path, jobs):
    def fail(argv):
        return argv[0] == "pretrain" and flag(argv, "SEED") == "1"

    plan = dataclasses.replace(PLAN, arms=(jigsaw_arm(), SCRATCH), seeds=(0, 1))
    alone = compare_with(FakeRunner(score, fail), data, tmp_path, plan)
    comparison = Faked(FakeRunner(score, fail), plan, data, tmp_path / "out2")
    seen = []
    comparison.execute(lambda: seen.append(1), jobs)
    assert len(seen) == 4

    def facts(run):
        return (str(run), run.status, run.error, run.metrics, run.curve, run.iterations)

    assert list(map(facts, comparison.runs)) == list(map(facts, alone.runs))


class Waiting(FakeRunner):
    """Says that it trains, and goes on only in a folder that a job before it has left."""

    def _pretrain(self, stage, folder, argv):
        with open(folder.parent / "attempts", "a") as f:
            f.write(" ".join(argv[:2]) + "\n")
        for _ in range(600):
            if len((folder.parent / "attempts").read_text().splitlines()) > 1:
                return super()._pretrain(stage, folder, argv)
            time.sleep(0.1)


def test_a_pre_empted_job_is_queued_again_and_resumes(data, tmp_path, jobs):
    """SIGTERM, as Slurm sends it: submitit calls ``checkpoint`` and starts the job once more."""
    plan = dataclasses.replace(PLAN, arms=(jigsaw_arm(),), seeds=(0,))
    comparison = Faked(Waiting(score), plan, data, tmp_path / "out")
    attempts = comparison.folder(comparison.runs[0]) / "attempts"
    submit = jobs._executor.submit

    def submit_and_pre_empt(*args):
        job = submit(*args)
        while not attempts.is_file():
            time.sleep(0.1)
        children = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
        for _ in range(2):  # Slurm sends a second one while it queues the job again
            os.kill(int(children[0]), signal.SIGTERM)
            time.sleep(0.05)
        return job

    jobs._executor.submit = submit_and_pre_empt
    assert [run.status for run in comparison.execute(pool=jobs)] == [DONE]
    first, second = attempts.read_text().splitlines()
    assert first == "pretrain --config-file" and second == "pretrain --resume"


def test_every_level_of_the_ablation_gets_samples_on_the_smallest_canvas_fitted() -> None:
    arms = [dict(zip(arm.pretrain[::2], arm.pretrain[1::2])) for arm in ABLATIONS["levels"]]
    assigned = [keys for keys in arms if keys.get("MODEL.JIGSAW.LEVELS") == "assign"]
    assert assigned
    for keys in assigned:
        strides = {"p3": 8, "p4": 16, "p5": 32}
        assert keys["MODEL.JIGSAW.IN_FEATURES"] == str([*strides])
        size = int(keys["MODEL.JIGSAW.ASSIGN_BOX_SIZE"])
        check_levels("assign", strides, size, JigsawTemplate(64, 64, 32, 32))
