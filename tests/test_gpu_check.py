"""dev/gpu_check.py: all of it runs on a CPU in its dry form; its runner goes on, stops, reports."""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from check_report import (
    FAIL,
    GRACE,
    NOT_RUN,
    NOTE,
    PASS,
    SKIPPED,
    expect,
    format_markdown,
    format_result,
    names_with,
    note,
    run_checks,
    summary,
    write_report,
)

SCRIPT = Path(__file__).resolve().parent.parent / "dev" / "gpu_check.py"


def gpu_check(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *argv], capture_output=True, text=True)


def test_the_dry_form_runs_every_check(tmp_path):
    """On the CPU whatever can be checked there passes, and nothing but a GPU's goals is put off."""
    done = gpu_check("--dry", "--output", str(tmp_path), "--time-limit", "600")
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    found = {check["name"]: check["findings"] for check in report["checks"]}
    failed = [(name, f) for name, fs in found.items() for f in fs if f["status"] in (FAIL, NOT_RUN)]
    assert (failed, done.returncode) == ([], 0), done.stderr[-3000:]
    passed = {name: [f["what"] for f in fs if f["status"] == PASS] for name, fs in found.items()}
    for objective in ("erf_adaptive", "block_wise", "global"):
        assert f"{objective}: gradients, cosine" in passed["objectives"]
    for name in ("environment", "loss_gradient", "erf_numbers", "kill_and_resume", "torchrun"):
        assert passed[name], name
    assert "deterministic: resumed against unbroken" in passed["kill_and_resume"]
    assert {"convert", "finetune", "erf", "visualize"} <= set(passed["commands"])
    assert {"GN: loss", "DCN: loss", "accumulation over 2: loss"} == set(passed["variants"])
    assert "recompilations after the first evaluation" in passed["compiled"]
    put_off = {name for name, fs in found.items() for f in fs if f["status"] == SKIPPED}
    assert {"hidden_waits", "best_mode", "real_loader", "erf_refresh", "cuda_tests"} <= put_off
    for mode in ("fp32", "TF32", "fp16", "bf16", "compiled"):
        for batch in (256, 512):
            assert "images/s" in found[f"speed_{batch}_{mode}"][0]["what"]
    table = (tmp_path / "gpu_check.md").read_text()
    assert table.count("\n") == 2 + sum(len(findings) for findings in found.values())
    assert report["dry"] and "0 failed" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = gpu_check("--output", str(tmp_path))
    assert done.returncode == 2 and "--dry" in done.stderr and done.stderr.count("\n") == 1


def good(bench):
    """A good one"""
    yield expect("a", f"{bench}", "1", bench == 1)
    yield note("b", "x | y")


def broken(bench):
    """A broken one"""
    yield expect("first", "1", "1", True)
    raise ValueError("out of\nmemory")


def slow(bench, seconds):
    """A slow one"""
    yield note("begun", "")
    time.sleep(seconds)
    yield note("ended", "")


def statuses(results):
    return {r.name: [f.status for f in r.findings] for r in results}


def test_a_failure_ends_nothing_and_keeps_what_was_found(tmp_path, capsys):
    reports = []
    checks = {"broken": broken, "good": good}
    results = run_checks(checks, 2, 60, lambda done: reports.append(len(done)))
    assert statuses(results) == {"broken": [PASS, FAIL], "good": [FAIL, NOTE]}
    assert reports == [1, 2]  # after each check, so that a killed run leaves a report
    assert "ValueError: out of memory" in format_result(results[0])
    assert "out of\nmemory" in capsys.readouterr().err  # the traceback
    assert summary(results) == "1 passed, 2 failed\nfailed: broken, good"
    write_report(tmp_path, results, dry=True)
    lines = (tmp_path / "gpu_check.md").read_text().splitlines()
    assert len(lines) == 2 + 4 and all(line.count("|") == 6 for line in lines)
    first = json.loads((tmp_path / "gpu_check.json").read_text())["checks"][1]
    assert first["title"] == "A good one" and first["findings"][0]["expected"] == "1"


def test_after_the_time_limit_no_check_is_started():
    checks = {"slow": partial(slow, seconds=0.1), "good": good}
    results = run_checks(checks, 1, 0.05, lambda done: None)
    assert statuses(results) == {"slow": [NOTE, NOTE], "good": [NOT_RUN]}
    assert results[0].title == "A slow one"
    assert "not run, the time was over: good" in summary(results)
    assert "0.05 s" in format_markdown(results) and names_with(results, NOT_RUN) == ["good"]


def test_a_check_that_hangs_is_stopped(monkeypatch):
    monkeypatch.setattr("check_report.GRACE", 0)
    assert GRACE < 30  # with the default limit of 450 s, eight minutes in all
    results = run_checks({"slow": partial(slow, seconds=60)}, 1, 0.2, lambda done: None)
    assert statuses(results) == {"slow": [NOTE, FAIL]}
    assert "OutOfTime" in results[0].findings[1].value and results[0].seconds < 30
