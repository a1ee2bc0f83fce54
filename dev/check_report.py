"""Runs checks one after the other within a time limit, and reports what each of them found.

A check is a function of one argument that yields ``Finding``s; its docstring says what it checks.
"""

import gc
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

PASS, FAIL, NOTE, SKIPPED, NOT_RUN = "PASS", "FAIL", "note", "not on a CPU", "NOT RUN"
# Seconds that a check which is under way at the time limit may still take.
GRACE = 20


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    value: str
    expected: str
    status: str


def expect(what: str, value: str, expected: str, ok: bool) -> Finding:
    """A value that must be as expected."""
    return Finding(what, value, expected, PASS if ok else FAIL)


def note(what: str, value: str) -> Finding:
    """A value of which nothing is expected."""
    return Finding(what, value, "", NOTE)


Check = Callable[[Any], Iterator[Finding]]


class OutOfTime(Exception):
    """The time limit came while a check was under way."""


@dataclass
class Result:
    """What one check found."""

    name: str
    title: str
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)


def run_check(name: str, check: Check, bench: Any, seconds: float) -> Result:
    """Run one check; an exception ends it as a failure, with the findings so far.

    Args:
        bench: handed to the check.
        seconds: after which it is stopped.
    """
    result, start = Result(name, title(check)), time.perf_counter()
    try:
        with _alarm(seconds):
            for found in check(bench):
                result.findings.append(found)
    except Exception as error:
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}"
        result.findings.append(expect("runs to its end", said, "no error", False))
    result.seconds = time.perf_counter() - start
    gc.collect()
    return result


def run_checks(
    checks: Mapping[str, Check],
    bench: Any,
    time_limit: float,
    report: Callable[[list[Result]], None],
) -> list[Result]:
    """Run ``checks`` in their order.

    Args:
        time_limit: seconds after which no check is started, and ``GRACE`` later stopped.
        report: called with all results after each check.
    """
    start, results = time.perf_counter(), []
    for name, check in checks.items():
        left = time_limit - (time.perf_counter() - start)
        if left > 0:
            results.append(run_check(name, check, bench, left + GRACE))
        else:
            late = Finding("time", f"{time_limit:g} s were over", "", NOT_RUN)
            results.append(Result(name, title(check), findings=[late]))
        report(results)
    return results


def title(check: Check) -> str:
    """First line of the check's docstring; of a partial's function."""
    return (getattr(check, "func", check).__doc__ or "").strip().splitlines()[0]


def format_result(result: Result) -> str:
    """For the console: a head line, and a line a finding."""
    lines = [f"{result.name} ({result.seconds:.0f} s): {result.title}"]
    for found in result.findings:
        value = " ".join(found.value.split())
        expected = f"   expected: {found.expected}" if found.expected else ""
        lines.append(f"  {found.status:12} {found.what}: {value}{expected}")
    return "\n".join(lines)


def format_markdown(results: list[Result]) -> str:
    """One table of all findings."""
    head = ("check", "what", "value", "expected", "")
    rows = [
        (result.name, *(text.replace("|", "/") for text in _cells(found)))
        for result in results
        for found in result.findings
    ]
    return tabulate(rows, head, tablefmt="github", disable_numparse=True) + "\n"


def summary(results: list[Result]) -> str:
    """How many findings passed; which checks failed and which were not run."""
    statuses = [found.status for result in results for found in result.findings]
    lines = [f"{statuses.count(PASS)} passed, {statuses.count(FAIL)} failed"]
    for status, words in ((FAIL, "failed"), (NOT_RUN, "not run, the time was over")):
        names = names_with(results, status)
        if names:
            lines.append(f"{words}: {', '.join(names)}")
    return "\n".join(lines)


def names_with(results: list[Result], status: str) -> list[str]:
    """Names of the checks with a finding of ``status``."""
    return [r.name for r in results if any(found.status == status for found in r.findings)]


def write_report(folder: Path, results: list[Result], **facts: Any) -> None:
    """``folder``/gpu_check.json and gpu_check.md."""
    content = {**facts, "checks": [asdict(result) for result in results]}
    (folder / "gpu_check.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "gpu_check.md").write_text(format_markdown(results))


def _cells(found: Finding) -> tuple[str, str, str, str]:
    return found.what, " ".join(found.value.split()), found.expected, found.status


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise ``OutOfTime`` in this block after so many seconds; main thread only."""

    def stop(*_: object) -> None:
        raise OutOfTime("stopped: the time was over")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
