"""Counting reasons."""

import pytest

from jigsaw_d2.data.report import FAULT, NOTE, REASONS, RULE, ExtractionError, ExtractionLog


def test_counts_and_first_examples() -> None:
    log, other = ExtractionLog(), ExtractionLog()
    for n in range(2):
        log.add("crowd", f"image {n}")
    for n in range(4):
        other.add("crowd", f"other {n}")
    log.merge(other)
    entry = log.to_dict()["crowd"]
    assert entry["count"] == 6 and entry["kind"] == RULE
    assert entry["examples"] == ["image 0", "image 1", "other 0"]
    assert ExtractionLog.from_dict(log.to_dict()).to_dict() == log.to_dict()


@pytest.mark.parametrize("reason", REASONS)
def test_strict_stops_at_faults_alone(reason: str) -> None:
    log = ExtractionLog(strict=True)
    if REASONS[reason][0] == FAULT:
        with pytest.raises(ExtractionError, match=f"here: .*{reason}.*--strict"):
            log.add(reason, "here")
    else:
        log.add(reason, "here")
        assert log.counts[reason] == 1


def test_unknown_reasons_are_a_mistake_of_ours() -> None:
    with pytest.raises(KeyError):
        ExtractionLog().add("no such reason", "here")
    assert {kind for kind, _ in REASONS.values()} == {FAULT, RULE, NOTE}
