"""JSON texts read as the standard library reads them, whichever parser took them."""

import json

import orjson
import pytest

from jigsaw_d2.extraction.json_reading import parse_json

# What orjson refuses, or reads as a rounded float.
ODD = [
    "[NaN, Infinity, -Infinity, 1e999]",
    '{"id": 18446744073709551616}',  # 2**64
    '{"id": -9223372036854775809}',  # -2**63 - 1
    "[123456789012345678901234567890]",
    '"\\ud800"',
]
USUAL = [
    '{"a": 1, "a": 2, "b": [0.1, -0.0, 1E5, 1e-400, null, true]}',
    "[18446744073709551615, -9223372036854775808]",
    "[0.12345678901234567890123, 5e-324, 1.7976931348623157e308]",
    ' "\\u00e4 \u00e4" ',
]


@pytest.mark.parametrize("text", ODD + USUAL)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_values_and_types_are_those_of_the_standard_library(text: str, encoding: str) -> None:
    # repr tells -0.0 from 0, integers from floats, and makes NaN equal to itself.
    assert repr(parse_json(text.encode(encoding))) == repr(json.loads(text))


@pytest.mark.parametrize("text", [b"", b"[1,]", b"{", b"[01]", b"\xff\xfe\xff", b"[1] 2"])
def test_faults_are_worded_by_the_standard_library(text: bytes) -> None:
    with pytest.raises(ValueError) as expected:
        json.loads(text)
    with pytest.raises(ValueError) as raised:
        parse_json(text)
    assert (type(raised.value), str(raised.value)) == (type(expected.value), str(expected.value))


def test_usual_texts_take_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orjson, "loads", lambda text: "fast")
    assert parse_json(b'{"id": 123456789012345678}') == "fast"
    assert parse_json(b'{"id": 1234567890123456789}') != "fast"
